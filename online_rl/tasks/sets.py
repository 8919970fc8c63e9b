"""The sets by name: where each is published, under which licence, in which layout, and how to load it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from online_rl.tasks import jsonl
from online_rl.tasks.base import Task
from online_rl.tasks.files import SUFFIXES, file_rows, hub_rows
from online_rl.tasks.generated import KINDS, generate
from online_rl.tasks.jsonl import TaskFileError
from online_rl.tasks.layouts import LAYOUTS, BadField


class UnknownSet(ValueError):
    """No set has that name."""


@dataclass(frozen=True)
class TaskSet:
    """A published set. `rows` is about how many it has; `use`: trained on, or evaluated and kept out of training."""

    name: str
    title: str
    layout: str
    repository: str
    config: str | None
    split: str
    rows: int
    licence: str
    use: Literal["evaluation", "training"] = "evaluation"


_FLASHRAG = "RUC-NLPIR/FlashRAG_datasets"  # the form that Search-R1 and its followers report on
SETS: dict[str, TaskSet] = {
    found.name: found
    for found in (
        TaskSet("gsm8k", "GSM8K, test", "gsm8k", "openai/gsm8k", "main", "test", 1_319, "MIT"),
        TaskSet("math500", "MATH-500", "maths", "HuggingFaceH4/MATH-500", None, "test", 500, "MIT"),
        TaskSet("aime24", "AIME 2024", "maths", "Maxwell-Jia/AIME_2024", None, "train", 30, "MIT"),
        TaskSet("aime25", "AIME 2025", "maths", "math-ai/aime25", None, "test", 30, "Apache-2.0"),
        TaskSet("nq", "Natural Questions, open", "qa", _FLASHRAG, "nq", "test", 3_610, "CC BY-SA 3.0"),
        TaskSet("triviaqa", "TriviaQA", "qa", _FLASHRAG, "triviaqa", "test", 11_313, "Apache-2.0"),
        TaskSet("hotpotqa", "HotpotQA", "qa", _FLASHRAG, "hotpotqa", "dev", 7_405, "CC BY-SA 4.0"),
        TaskSet("2wiki", "2WikiMultihopQA", "qa", _FLASHRAG, "2wikimultihopqa", "dev", 12_576, "Apache-2.0"),
        TaskSet("musique", "MuSiQue", "qa", _FLASHRAG, "musique", "dev", 2_417, "CC BY 4.0"),
        TaskSet("bamboogle", "Bamboogle", "qa", _FLASHRAG, "bamboogle", "test", 125, "MIT"),
        TaskSet("tapo-easy-test", "TAPO-easy, test", "tapo", "Goer17/TAPO", "easy", "test", 0, "see its page"),
        TaskSet("tapo-hard-test", "TAPO-hard, test", "tapo", "Goer17/TAPO", "hard", "test", 0, "see its page"),
        TaskSet("nq-train", "Natural Questions, open", "qa", _FLASHRAG, "nq", "train", 79_168, "CC BY-SA 3.0",
                "training"),
        TaskSet("gsm8k-train", "GSM8K, train", "gsm8k", "openai/gsm8k", "main", "train", 7_473, "MIT", "training"),
        TaskSet("dapo-math", "DAPO-Math-17k", "dapo", "BytedTsinghua-SIA/DAPO-Math-17k", None, "train", 17_398,
                "Apache-2.0", "training"),
        TaskSet("deepmath", "DeepMath-103K", "maths", "zwhe99/DeepMath-103K", None, "train", 103_022, "MIT",
                "training"),
        TaskSet("tapo-easy-hub", "TAPO-easy-60K", "tapo", "Goer17/TAPO", "easy", "train", 60_000, "see its page",
                "training"),
        TaskSet("tapo-hard-hub", "TAPO-hard-18K", "tapo", "Goer17/TAPO", "hard", "train", 18_000, "see its page",
                "training"),
    )
}  # fmt: skip
GENERATED = ("generated", *KINDS)
EVALUATION = [name for name, found in SETS.items() if found.use == "evaluation"]


def load_set(
    name: str, n: int | None = None, seed: int = 0, *, file: Path | None = None, folder: Path | None = None
) -> list[Task]:
    """`n` tasks of a set (None: all, of generated ones 50 a kind), the same for the same seed.

    From `file`; else from `folder`/NAME.jsonl, .json or .parquet if there is one; else from the hub. Raises UnknownSet,
    TaskFileError for a row without a gold, HubUnavailable, and ValueError for more tasks than there are.
    """
    if file is None and name in GENERATED:
        kinds = KINDS if name == "generated" else [kind for kind in KINDS if kind == name]
        return [task for kind in kinds for task in generate(kind, _of_kind(kind, n), seed, "heldout")]
    found = SETS.get(name)
    if found is None and file is None:
        raise UnknownSet(f"unknown set {name!r}: choose one of {', '.join([*SETS, *GENERATED])}, or give a --file")
    file = file or _local(name, folder)
    if found is None:
        assert file is not None
        tasks = jsonl.load(file)
    else:
        tasks = list(read_tasks(found, file))
    where = str(file) if file else f"{found.repository if found else ''} on the hub"
    if not tasks:
        raise TaskFileError(file or Path(name), 0, "", "no task in it")
    if n is None or n == len(tasks):
        return tasks
    if n > len(tasks):
        raise ValueError(f"{name} has {len(tasks)} tasks ({where}), {n} were asked for")
    chosen = sorted(random.Random(f"{name}/{seed}").sample(range(len(tasks)), n))
    return [tasks[index] for index in chosen]


def read_tasks(found: TaskSet, file: Path | None) -> Iterator[Task]:
    """Every task of a published set, each question once. Raises TaskFileError with the row and the field."""
    at = file or Path(found.repository)
    read = LAYOUTS[found.layout]
    numbered = file_rows(file) if file else hub_rows(found.repository, found.config, found.split, found.name)
    seen: set[str] = set()
    for number, row in numbered:
        try:
            task = read(row, found.name.removesuffix("-train"))
        except BadField as error:
            raise TaskFileError(at, number, error.field, error.problem) from error
        if task.question not in seen:  # DAPO's file has each of its problems a hundred times
            seen.add(task.question)
            yield replace(task, source=f"{found.name} ({found.split})")


def _local(name: str, folder: Path | None) -> Path | None:
    files = [folder / f"{name}{suffix}" for suffix in SUFFIXES] if folder else []
    return next((path for path in files if path.is_file()), None)


def _of_kind(kind: str, n: int | None) -> int:
    """Of the plain prompts there are few held out."""
    return min(n or 50, 20) if kind == "plain" else n or 50


def about(name: str) -> dict[str, Any]:
    """What `whetstone tasks list` tells of a set."""
    if name in GENERATED:
        return {
            "name": name,
            "use": "both",
            "rows": None,
            "licence": "none: made here",
            "from": "generators",
        }
    found = SETS[name]
    where = "/".join(filter(None, (found.repository, found.config)))
    return {"name": name, "use": found.use, "rows": found.rows or None, "licence": found.licence, "from": where}
