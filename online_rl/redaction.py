"""Tasks without what identifies people, where that leaves them solvable."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from online_rl.tasks.base import Task

_COUNTS = frozenset({"math", "numeric"})  # verifiers of questions whose numbers matter


@dataclass(frozen=True)
class Redacted:
    """A text, and what was taken out of it."""

    text: str
    removed: Sequence[str]


Redact = Callable[[str], Redacted]


def redact_task(task: Task, redact: Redact) -> Task | str:
    """The task with redacted messages, or why it can't be one: its gold, or numbers that it needs, would be gone."""
    messages: list[dict[str, str]] = []
    removed: list[str] = []
    for message in task.messages:
        clean = redact(message["content"])
        messages.append(message | {"content": clean.text})
        removed += clean.removed
    if redact(task.gold).removed or any(_overlap(task.gold, gone) for gone in removed):
        return "its right answer would be redacted"
    if task.verifier in _COUNTS and any(re.search(r"\d", gone) for gone in removed):
        return "a number of its question would be redacted"
    return replace(task, messages=tuple(messages)) if removed else task


def _overlap(gold: str, gone: str) -> bool:
    """Whether one is a part of the other, the gold by whole words: "5" is no part of 415."""
    gold, gone = gold.strip().casefold(), gone.strip().casefold()
    return bool(gold) and (gone in gold or re.search(rf"(?<!\w){re.escape(gold)}(?!\w)", gone) is not None)
