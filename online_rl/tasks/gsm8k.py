"""GSM8K (arXiv 2110.14168): school word problems, from the files that its authors publish (MIT licence)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from online_rl.tasks.base import Task
from online_rl.tasks.jsonl import TaskFileError, rows

_GOLD = re.compile(r"####\s*(-?[0-9][0-9,]*(?:\.[0-9]+)?)\s*$")


def gsm8k(path: Path, split: Literal["train", "test"]) -> list[Task]:
    """Every problem of `path/{split}.jsonl` as a `numeric` task of kind "gsm8k".

    Raises TaskFileError, naming the file and line, when the file is missing or a row has no question or no "#### gold".
    """
    file = path / f"{split}.jsonl"
    tasks = []
    for number, row in rows(file):
        question, solution = row.get("question"), row.get("answer")
        gold = _GOLD.search(solution) if isinstance(solution, str) else None
        if not isinstance(question, str) or not question.strip():
            raise TaskFileError(file, number, "question", "is missing or empty")
        if gold is None:
            raise TaskFileError(file, number, "answer", "does not end in '#### ' and a number")
        message = {"role": "user", "content": question.strip()}
        tasks.append(Task((message,), "numeric", gold[1].replace(",", ""), "gsm8k", source=f"gsm8k/{split}"))
    return tasks
