"""Seeded task sets from the generators, in two splits that share no prompt, no operands and no subject.

Nothing here needs a network. The gold of each task follows from how it was made.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from typing import Literal, get_args

from online_rl.tasks import arithmetic as _arithmetic
from online_rl.tasks import dates as _dates
from online_rl.tasks import digits as _digits
from online_rl.tasks import mental as _mental
from online_rl.tasks import two_hop as _two_hop
from online_rl.tasks import units as _units
from online_rl.tasks.base import Task
from online_rl.tasks.lookup import lookup
from online_rl.tasks.mixed import mixed
from online_rl.tasks.plain import plain

__all__ = ["KINDS", "LEVELS", "Kind", "Split", "generate", "split_of"]

Kind = Literal["arithmetic", "lookup", "mixed", "plain", "digits", "units", "dates", "two_hop", "mental"]
Split = Literal["train", "heldout"]
KINDS: tuple[Kind, ...] = get_args(Kind)
LEVELS: dict[Kind, tuple[int, ...]] = {
    "arithmetic": tuple(sorted(_arithmetic.LEVELS)),
    "mixed": (1, 2),  # facts to look up
    "digits": tuple(_digits.DIGITS),
    "units": _units.LEVELS,
    "dates": _dates.LEVELS,
    "two_hop": _two_hop.LEVELS,
    "mental": _mental.LEVELS,
}
"""The levels of difficulty of the kinds that have them, easiest first."""
_BY_LEVEL: dict[str, Callable[[random.Random, int], Task]] = {
    "arithmetic": _arithmetic.arithmetic,
    "digits": _digits.digits,
    "units": _units.units,
    "dates": _dates.dates,
    "two_hop": _two_hop.two_hop,
    "mental": _mental.mental,
}
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

    `level` fixes the difficulty of the kinds in `LEVELS` (default: all in turn; of `mixed`, as they come). Raises
    ValueError for an unknown kind, split or level, and when there are fewer than `n` distinct tasks in the split.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown task kind {kind!r}: choose one of {', '.join(KINDS)}")
    if split not in get_args(Split):
        raise ValueError(f"unknown split {split!r}: choose one of {', '.join(get_args(Split))}")
    if level is not None and level not in LEVELS.get(kind, ()):
        has = ", ".join(map(str, LEVELS[kind])) if kind in LEVELS else "none"
        raise ValueError(f"unknown level {level!r} of {kind!r} tasks, whose levels are: {has}")
    rng = random.Random(f"{kind}/{seed}/{split}")
    draw = _drawer(rng, kind, level)
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


def _drawer(rng: random.Random, kind: Kind, level: int | None) -> Callable[[int], Task]:
    """A function from the number of tasks made so far to the next candidate."""
    if kind in _BY_LEVEL:
        make, levels = _BY_LEVEL[kind], LEVELS[kind]
        return lambda made: make(rng, level if level is not None else levels[made % len(levels)])
    if kind == "mixed":
        return lambda _: _mixed(rng, level)
    return lambda _: lookup(rng) if kind == "lookup" else plain(rng)


def _mixed(rng: random.Random, level: int | None) -> Task:
    while True:
        task = mixed(rng)
        if level is None or len(json.loads(task.meta["facts"])) == level:
            return task
