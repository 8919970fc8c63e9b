"""`f1`: how much of the gold's words the answer has, and how little else (SQuAD, arXiv 1606.05250)."""

from __future__ import annotations

from collections import Counter

from online_rl.verifiers.base import Score, Verifier
from online_rl.verifiers.exact import words


def judge(gold: str, answer: str, _tool_calls: int = 0) -> Score:
    """The harmonic mean of precision and recall over words, with no case, punctuation, articles or accents."""
    wanted, said = words(gold), words(answer)
    if not wanted:
        return Score(0.0, f"the gold {gold[:60]!r} has no words")
    if not said:
        return Score(0.0, "no answer")
    common = sum((Counter(wanted) & Counter(said)).values())
    value = 2 * common / (len(wanted) + len(said))
    return Score(value, f"{common} of the gold's {len(wanted)} words in an answer of {len(said)}")


def wrongs(gold: str) -> list[str]:
    """Answers with too little of the gold, or too much beside it."""
    padding = "Atlantis Lemuria Utopia Avalon " * (1 + len(gold) // 10)
    return ["", "I don't know.", "Atlantis", f"{gold} {padding}", f"{padding}{gold}"]


VERIFIER = Verifier("f1", judge, wrongs)
