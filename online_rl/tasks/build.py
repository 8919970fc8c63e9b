"""Training sets of the make-up of TAPO-easy-60K and TAPO-hard-18K (arXiv 2510.07038), and the card that tells how.

The paper's code names the sources (NQ, GSM8K, a calculator set, a mixed search-and-compute set, DAPO-Math-17K,
DeepMath), not their shares; those in `MAKEUP` are ours. Every task passes the same gates: one of each question, no two
golds for one, nothing that an evaluation set asks, a gold that its verifier can judge.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from online_rl import verifiers
from online_rl.tasks.base import Task
from online_rl.tasks.generated import Kind, generate
from online_rl.tasks.jsonl import write
from online_rl.tasks.overlap import N, Overlap, words
from online_rl.tasks.sets import SETS

MADE: dict[str, tuple[Kind, ...]] = {"calculator": ("arithmetic", "digits"), "complex": ("mixed",)}
"""The parts that generators make: numbers to compute with, and figures to look up first."""

MAKEUP: dict[str, dict[str, int]] = {
    "tapo-easy": {"nq-train": 32_000, "gsm8k-train": 7_000, "calculator": 13_000, "complex": 8_000},
    "tapo-hard": {"dapo-math": 9_000, "deepmath": 9_000},
}
"""By set, how many tasks of each part: 60,000 and 18,000 in all."""

FROM_HUB: dict[str, dict[str, int]] = {"tapo-easy": {"tapo-easy-hub": 60_000}, "tapo-hard": {"tapo-hard-hub": 18_000}}


class TooFewTasks(ValueError):
    """A set has fewer tasks than training needs."""


@dataclass
class Part:
    """One source: what was read, what was left out and why, what is kept."""

    name: str
    wanted: int
    read: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    kept: list[Task] = field(default_factory=list)


@dataclass(frozen=True)
class Built:
    """A set, and what its card says. `missing`: sources and evaluation sets that were not at hand."""

    name: str
    seed: int
    parts: list[Part]
    evaluated: dict[str, int]
    missing: dict[str, str]

    @property
    def tasks(self) -> list[Task]:
        """All parts, shuffled by the seed."""
        together = [task for part in self.parts for task in part.kept]
        random.Random(f"{self.name}/{self.seed}").shuffle(together)
        return together


def build(
    name: str,
    makeup: dict[str, int],
    read: Callable[[str], Iterable[Task]],
    evaluation: Mapping[str, Sequence[Task]],
    seed: int = 0,
    missing: dict[str, str] | None = None,
    on_part: Callable[[str, int], None] = lambda part, kept: None,
) -> Built:
    """A set of `makeup`, whose sources `read` opens and none of whose tasks is in `evaluation`.

    Parts that are missing are left out. Raises TooFewTasks when nothing is left.
    """
    overlap = Overlap()
    for set_name, tasks in evaluation.items():
        overlap.add(set_name, (task.question for task in tasks))
    parts: list[Part] = []
    asked: dict[tuple[str, ...], str] = {}  # words of a question that is taken: its gold
    for part_name, wanted in makeup.items():
        if part_name in (missing or {}):
            continue
        part = Part(part_name, wanted)
        found = _made(part_name, wanted, seed) if part_name in MADE else list(read(part_name))
        _sift(part, found, overlap, asked, seed)
        parts.append(part)
        on_part(part_name, len(part.kept))
    built = Built(name, seed, parts, {key: len(tasks) for key, tasks in evaluation.items()}, dict(missing or {}))
    if not built.tasks:
        raise TooFewTasks(f"{name}: no task is left of {sum(part.read for part in parts)} that were read")
    return built


def _made(part: str, wanted: int, seed: int) -> list[Task]:
    kinds = MADE[part]
    return [task for kind in kinds for task in generate(kind, -(-wanted // len(kinds)), seed, "train")]


def _sift(part: Part, found: list[Task], overlap: Overlap, asked: dict[tuple[str, ...], str], seed: int) -> None:
    part.read = len(found)
    golds: dict[tuple[str, ...], set[str]] = {}
    for task in found:
        golds.setdefault(words(task.question), set()).add(task.gold)
    random.Random(f"{part.name}/{seed}").shuffle(found)
    for task in found:
        said = words(task.question)
        if len(golds[said]) > 1:
            part.dropped["another row has another gold for this question"] += 1
        elif said in asked:
            part.dropped["the same question"] += 1
        elif hit := overlap.of(task.question):
            part.dropped[f"in the evaluation set {hit}"] += 1
        elif len(part.kept) == part.wanted:
            part.dropped["not needed for the make-up"] += 1
        elif verifiers.get(task.verifier).validate([task.gold]).rejected:
            part.dropped[f"a gold that the verifier {task.verifier} can't judge"] += 1
        else:
            asked[said] = task.gold
            part.kept.append(task)


def save(built: Built, out: Path) -> Path:
    """The tasks as `out`, one a line, and the card beside it, whose path is returned. Whole or not at all."""
    out.parent.mkdir(parents=True, exist_ok=True)
    write(out, built.tasks)
    path = out.with_suffix(".md")
    draft = path.with_name(f".{path.name}.part")
    draft.write_text(card(built), encoding="utf-8")
    os.replace(draft, path)
    return path


def card(built: Built) -> str:
    """The data card, in Markdown: sources, counts, licences, what was dropped and why, what it was kept apart from."""
    total = len(built.tasks)
    lines = [
        f"# {built.name}: {total:,} tasks",
        "",
        f"Built by `whetstone tasks build {built.name}`, seed {built.seed}. One JSON object a line: `question`, "
        "`answer`, `verifier`, `kind`, `source`.",
        "",
        "## Sources",
        "",
        "| part | from | licence | read | kept | wanted |",
        "|---|---|---|---|---|---|",
    ]
    for part in built.parts:
        known = SETS.get(part.name)
        where = (
            f"{known.title} ({known.repository}, {known.split})"
            if known
            else f"generators {', '.join(MADE[part.name])}"
        )
        licence = known.licence if known else "none: made here"
        lines.append(f"| {part.name} | {where} | {licence} | {part.read:,} | {len(part.kept):,} | {part.wanted:,} |")
    verified = Counter(task.verifier for task in built.tasks)
    lines += ["", "Verifiers: " + ", ".join(f"`{name}` {count:,}" for name, count in verified.most_common()) + "."]
    lines += ["", "## Left out", "", "| part | why | rows |", "|---|---|---|"]
    lines += [f"| {p.name} | {why} | {count:,} |" for p in built.parts for why, count in p.dropped.most_common()]
    lines += [
        "",
        "## Kept apart from",
        "",
        f"A question that shares {N} words in a row with one of an evaluation set, or holds all words in a row of a "
        "shorter one, is left out. Numbers and signs count as words.",
        "",
        "| evaluation set | questions |",
        "|---|---|",
        *(f"| {name} | {count:,} |" for name, count in built.evaluated.items()),
    ]
    if built.missing:
        lines += ["", "## Not at hand", "", "Neither trained on nor kept apart from:", ""]
        lines += [f"- {name}: {why}" for name, why in built.missing.items()]
    return "\n".join([*lines, ""])
