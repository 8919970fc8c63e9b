"""Seeded task sets from the generators, in two splits that share no prompt, no operands and no subject.

Nothing here needs a network. The gold of each task follows from how it was made.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from typing import Literal, get_args

from online_rl.tasks.arithmetic import LEVELS, arithmetic
from online_rl.tasks.base import Task
from online_rl.tasks.lookup import lookup
from online_rl.tasks.mixed import mixed
from online_rl.tasks.plain import plain

__all__ = ["KINDS", "Kind", "Split", "arithmetic", "generate", "lookup", "mixed", "plain", "split_of"]

Kind = Literal["arithmetic", "lookup", "mixed", "plain"]
Split = Literal["train", "heldout"]
KINDS: tuple[Kind, ...] = get_args(Kind)
_HELDOUT_ONE_IN = 5
_PATIENCE = 20_000  # draws in a row that bring nothing new before the pool counts as empty


def split_of(task: Task) -> Split | None:
    """The split that the task's content belongs to: its operands, or every subject that it asks about.

    None when its subjects lie in different splits; such a task belongs to neither.
    """
    splits = {_split_of_key(key) for key in task.meta["key"].split("|")}
    return splits.pop() if len(splits) == 1 else None


def _split_of_key(key: str) -> Split:
    digest = hashlib.sha256(key.encode()).digest()
    return "heldout" if int.from_bytes(digest[:8]) % _HELDOUT_ONE_IN == 0 else "train"


def generate(kind: Kind, n: int, seed: int, split: Split, *, level: int | None = None) -> list[Task]:
    """`n` distinct tasks of one kind and split, the same for the same arguments.

    `level` fixes the level of arithmetic tasks (default: all three in turn). Raises ValueError for an unknown kind or
    split, and when the kind has fewer than `n` distinct tasks in the split.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown task kind {kind!r}: choose one of {', '.join(KINDS)}")
    if split not in get_args(Split):
        raise ValueError(f"unknown split {split!r}: choose one of {', '.join(get_args(Split))}")
    if level is not None and kind != "arithmetic":
        raise ValueError(f"level {level!r} was given for {kind!r} tasks: only arithmetic has levels")
    rng = random.Random(f"{kind}/{seed}/{split}")
    draw = _drawers(rng, level)[kind]
    tasks: list[Task] = []
    seen: set[str] = set()
    misses = 0
    while len(tasks) < n:
        task = draw(len(tasks))
        if task.question in seen or split_of(task) != split:
            misses += 1
            if misses > _PATIENCE:
                raise ValueError(f"only {len(tasks)} distinct {kind!r} tasks in split {split!r}, {n} were asked for")
            continue
        misses = 0
        seen.add(task.question)
        tasks.append(task)
    return tasks


def _drawers(rng: random.Random, level: int | None) -> dict[Kind, Callable[[int], Task]]:
    """By kind, a function from the number of tasks made so far to the next candidate."""
    levels = sorted(LEVELS)
    return {
        "arithmetic": lambda made: arithmetic(rng, level if level is not None else levels[made % len(levels)]),
        "lookup": lambda made: lookup(rng),
        "mixed": lambda made: mixed(rng),
        "plain": lambda made: plain(rng),
    }
