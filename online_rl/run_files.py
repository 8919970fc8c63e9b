"""A run's own copies of its tasks: taken out of its folder when the tasks are erased from the record."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from online_rl.report import markdown
from online_rl.result_record import EVALUATION, ROLLOUTS
from online_rl.tasks.base import Task


def forget_tasks(folder: Path, queue_ids: Collection[str], whole: bool = False) -> bool:
    """Takes the text of queued tasks out of a run's folder; whether there was any. May be repeated.

    `whole`: the folder goes with all that is in it, as that of a run which made no version and can't go on. The list
    of tasks, which says what belongs to them, is changed last. Raises OSError, and ValueError for a damaged file.
    """
    if not folder.is_dir():
        return False
    if whole:
        shutil.rmtree(folder)
        return True
    listed = folder / "tasks.json"
    try:
        rows: list[dict[str, Any]] = json.loads(listed.read_text(encoding="utf-8")) if listed.exists() else []
        gone = [row for row in rows if row["meta"].get("queue_id") in queue_ids and row["messages"]]
        tasks = [Task(**row | {"messages": tuple(row["messages"])}) for row in gone]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{listed} is no list of tasks ({error!r}): restore it, or delete the folder") from error
    if not gone:
        return False
    for name in (ROLLOUTS, EVALUATION):
        _rewrite(folder / name, lambda text: _without_results(text, {task.id for task in tasks}))
    questions = {task.question for task in tasks}
    for name in ("evaluated.json", "report.json"):
        _rewrite(folder / name, lambda text: _without_examples(text, questions))
    report = folder / "report.json"
    if report.exists():
        _rewrite(folder / "report.md", lambda _: markdown(json.loads(report.read_text(encoding="utf-8"))))
    for row in gone:
        row |= {"messages": [], "gold": ""}
    _rewrite(listed, lambda _: json.dumps(rows))
    return True


def forget_results(folder: Path, hashes: Collection[str], in_use: bool = False) -> bool:
    """Takes erased tool results out of a run's folder, whichever of its tasks saw them; whether there were any. A task
    that asks again, asks the tool.

    Raises OSError, and ValueError for a damaged file or, `in_use`, one that a run is writing to.
    """
    changed = False
    for name in (ROLLOUTS, EVALUATION):
        file = folder / name
        if not file.exists() or not any(each in hashes for each in _hashes(file)):
            continue
        if in_use:
            raise ValueError("a run that is under way has seen them: repeat when it has ended")
        _rewrite(file, lambda text: "".join(line for line, entry in _lines(text) if _hash(entry) not in hashes))
        changed = True
    return changed


def _hashes(file: Path) -> Iterator[str]:
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            if line.endswith("\n"):
                yield _hash(_entry(line))


def _hash(entry: dict[str, Any]) -> str:
    return str(entry.get("result") or entry.get("saw"))


def _lines(text: str) -> list[tuple[str, dict[str, Any]]]:
    """The whole lines of a `ResultRecord`, each with its entry."""
    return [(line, _entry(line)) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def _entry(line: str) -> dict[str, Any]:
    entry = json.loads(line)
    if not isinstance(entry, dict) or not ("result" in entry or {"saw", "task"} <= entry.keys()):
        raise ValueError(f"a line of tool results isn't one of this record: {line[:40]!r}")
    return entry


def _without_results(text: str, task_ids: Collection[str]) -> str:
    """Lines of a `ResultRecord` without what these tasks asked, nor what they alone saw."""
    lines = _lines(text)
    kept = {entry["saw"] for _, entry in lines if "saw" in entry and entry["task"] not in task_ids}
    return "".join(
        line
        for line, entry in lines
        if (entry["result"] in kept if "result" in entry else entry["task"] not in task_ids)
    )


def _without_examples(text: str, questions: Collection[str]) -> str:
    report = json.loads(text)
    try:
        left = [one for one in report.get("examples", []) if one["question"] not in questions]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"a report's examples aren't what was written ({error!r}): delete the file") from error
    return json.dumps(report | {"examples": left}, indent=2) + "\n"


def _rewrite(file: Path, change: Callable[[str], str]) -> None:
    """Whole or not at all. A file that isn't there stays away."""
    if not file.exists():
        return
    draft = file.with_name(f"{file.name}.part")
    with draft.open("w", encoding="utf-8") as writing:
        writing.write(change(file.read_text(encoding="utf-8")))
        writing.flush()
        os.fsync(writing.fileno())
    os.replace(draft, file)
