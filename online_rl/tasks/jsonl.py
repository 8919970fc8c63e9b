"""Tasks from a user's own file: one JSON object a line.

    {"question": "What is 2 * 21?", "answer": "42", "verifier": "numeric", "kind": "sums"}
    {"messages": [{"role": "user", "content": "Capital of Estonia?"}], "answer": "Tallinn", "verifier": "exact"}

`kind` (default "user") is the slice that reports group by. With the verifier `em`, `answer` is a list of right answers.
`source` and `meta` are what `whetstone tasks build` adds. Blank lines are skipped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from online_rl import verifiers
from online_rl.tasks.base import Task
from online_rl.verifiers import em

ROLES = ("system", "user", "assistant")
_FIELDS = {"question", "messages", "answer", "verifier", "kind", "source", "meta"}


class TaskFileError(ValueError):
    """A task file can't be read. The message names the file, the line and the field."""

    def __init__(self, path: Path, line: int, field: str, problem: str) -> None:
        where = f"{path}, line {line}" if line else str(path)  # line 0: the file as a whole
        super().__init__(f"{where}: {f'{field!r} ' if field else ''}{problem}")
        self.path, self.line, self.field = path, line, field


def load(path: Path) -> list[Task]:
    """The tasks of a file, in its order. Raises TaskFileError at the first bad row, and for a task given twice."""
    tasks: list[Task] = []
    first_line: dict[str, int] = {}
    for line, row in rows(path):
        task = _task(path, line, row)
        if task.id in first_line:
            raise TaskFileError(path, line, "", f"repeats the task of line {first_line[task.id]}")
        first_line[task.id] = line
        tasks.append(task)
    if not tasks:
        raise TaskFileError(path, 0, "", "no task in the file")
    return tasks


def rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, object) of every line that isn't blank."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise TaskFileError(path, 0, "", f"cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        at = error.object[: error.start].count(b"\n") + 1
        raise TaskFileError(path, at, "", "is not UTF-8 text: save the file as UTF-8") from error
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines: JSON strings may hold U+2028
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise TaskFileError(path, number, "", f"is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise TaskFileError(path, number, "", f"is a JSON {type(row).__name__}, not an object")
        yield number, row


def _task(path: Path, line: int, row: dict[str, Any]) -> Task:
    def fail(field: str, problem: str) -> TaskFileError:
        return TaskFileError(path, line, field, problem)

    unknown = sorted(set(row) - _FIELDS)
    if unknown:
        raise fail(unknown[0], f"is not a field of a task: use {', '.join(sorted(_FIELDS))}")
    if ("question" in row) == ("messages" in row):
        raise fail("question", "or 'messages' must be given, and not both")
    messages = _messages(row["messages"], fail) if "messages" in row else _question(row["question"], fail)
    name = row.get("verifier")
    if not isinstance(name, str):
        raise fail("verifier", f"must be one of {', '.join(verifiers.names())}")
    try:
        verifier = verifiers.get(name)
    except verifiers.UnknownVerifier as error:
        raise fail("verifier", f"is wrong: {error}") from error
    gold = row.get("answer")
    if name == "em" and isinstance(gold, list) and all(isinstance(text, str) for text in gold):
        gold = em.gold_of(gold)
    if isinstance(gold, (int, float)) and not isinstance(gold, bool):
        gold = repr(gold)
    if not isinstance(gold, str):
        raise fail("answer", f"must be text or a number, not {type(gold).__name__}")
    report = verifier.validate([gold])
    if report.rejected:
        raise fail("answer", f"cannot be judged by {name!r}: {report.rejected[0][2]}")
    kind = row.get("kind", "user")
    if not isinstance(kind, str) or not kind.strip():
        raise fail("kind", "must be text")
    source, meta = row.get("source", path.name), row.get("meta", {})
    if not isinstance(source, str):
        raise fail("source", "must be text")
    if not isinstance(meta, dict) or not all(isinstance(value, str) for value in meta.values()):
        raise fail("meta", "must be an object of texts")
    return Task(messages, name, gold, kind.strip(), source, meta)


def write(path: Path, tasks: Iterable[Task]) -> None:
    """A file that `load` reads, whole or not at all."""
    draft = path.with_name(f".{path.name}.part")
    with draft.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(as_row(task), ensure_ascii=False) + "\n" for task in tasks)
    os.replace(draft, path)


def as_row(task: Task) -> dict[str, Any]:
    """A task as a line of a file that `load` reads."""
    asked = {"question": task.question} if len(task.messages) == 1 else {"messages": list(task.messages)}
    row = {**asked, "answer": task.gold, "verifier": task.verifier, "kind": task.kind, "source": task.source}
    return row | ({"meta": task.meta} if task.meta else {})


def _question(value: Any, fail: Any) -> tuple[dict[str, str], ...]:
    if not isinstance(value, str) or not value.strip():
        raise fail("question", "must be text and not empty")
    return ({"role": "user", "content": value},)


def _messages(value: Any, fail: Any) -> tuple[dict[str, str], ...]:
    if not isinstance(value, list) or not value:
        raise fail("messages", "must be a list with at least one message")
    for i, message in enumerate(value):
        if not isinstance(message, dict) or set(message) != {"role", "content"}:
            raise fail(f"messages[{i}]", "must be an object of 'role' and 'content'")
        if message["role"] not in ROLES:
            raise fail(f"messages[{i}].role", f"is {message['role']!r}: use one of {', '.join(ROLES)}")
        if not isinstance(message["content"], str) or not message["content"].strip():
            raise fail(f"messages[{i}].content", "must be text and not empty")
    if value[-1]["role"] != "user":
        raise fail("messages", "must end with the user's message")
    return tuple(dict(m) for m in value)
