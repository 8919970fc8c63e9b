"""What a verifier is: a pure judge of (gold, answer), and the check of the judge itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from feedback_store.records import RIGHT

MAX_ANSWER_CHARS = 20_000
"""A longer answer is wrong unread, which bounds the time that any text can cost."""


@dataclass(frozen=True)
class Score:
    """`value` in [0, 1]; `reason` says in a few words why."""

    value: float
    reason: str

    @property
    def right(self) -> bool:
        return self.value > RIGHT


@dataclass(frozen=True)
class ValidationReport:
    """What a verifier made of gold answers and of wrong ones made from them."""

    verifier: str
    golds: int = 0
    wrong_answers: int = 0
    rejected: list[tuple[str, str, str]] = field(default_factory=list)  # gold, right answer, reason
    accepted: list[tuple[str, str, str]] = field(default_factory=list)  # gold, wrong answer, reason

    @property
    def ok(self) -> bool:
        return self.golds > 0 and not self.rejected and not self.accepted

    def __str__(self) -> str:
        lines = [
            f"{self.verifier}: {self.golds} golds, {len(self.rejected)} right answers rejected; "
            f"{self.wrong_answers} wrong answers, {len(self.accepted)} accepted"
        ]
        for said, cases in (("rejected", self.rejected), ("accepted", self.accepted)):
            lines += [f"  {said} {answer!r} for gold {gold!r}: {reason}" for gold, answer, reason in cases[:5]]
        return "\n".join(lines)


def itself(gold: str) -> list[str]:
    """The gold is its own right answer."""
    return [gold]


@dataclass(frozen=True)
class Verifier:
    """A named judge. `rights` and `wrongs` make answers from a gold that it must accept and refuse."""

    name: str
    judge: Callable[[str, str, int], Score]  # gold, answer, tool calls
    wrongs: Callable[[str], list[str]]
    rights: Callable[[str], list[str]] = itself

    def score(self, gold: str, answer: str, *, tool_calls: int = 0) -> Score:
        """How right `answer` is. Never raises, whatever the text, and takes bounded time."""
        if len(answer) > MAX_ANSWER_CHARS:
            return Score(0.0, f"the answer has {len(answer)} characters, more than {MAX_ANSWER_CHARS}")
        return self.judge(gold, answer, tool_calls)

    def validate(self, golds: Iterable[str]) -> ValidationReport:
        """Judge the judge: every gold as an answer must be right, every wrong answer made from it wrong."""
        count = wrong_count = 0
        rejected, accepted = [], []
        for gold in golds:
            count += 1
            for answer in self.rights(gold):
                score = self.score(gold, answer)
                if not score.right:
                    rejected.append((gold, answer, score.reason))
            for answer in self.wrongs(gold):
                wrong_count += 1
                score = self.score(gold, answer)
                if score.right:
                    accepted.append((gold, answer, score.reason))
        return ValidationReport(self.name, count, wrong_count, rejected, accepted)
