"""Which training questions are, or hold, a question of an evaluation set: exact n-gram overlap over words.

A question of 13 words or more is contaminated by one shared run of 13 (GPT-3's rule, arXiv 2005.14165, C); of a shorter
one all its words in a row must occur. Numbers and signs are words: the same story with other numbers is another
problem, as long as no 13 words in a row are free of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

N = 13
SHORTEST = 4  # a shorter evaluation question must be the whole training question
_WORD = re.compile(r"\d+(?:\.\d+)?|[^\W\d_]+|[-+*/^=<>%]")


def words(text: str) -> tuple[str, ...]:
    """Lower-case words, numbers (1,000 is 1000) and signs of arithmetic, in order."""
    return tuple(_WORD.findall(re.sub(r"(?<=\d),(?=\d{3}\b)", "", text.casefold())))


class Overlap:
    """An index of evaluation questions. `of` names the set that a question is contaminated by."""

    def __init__(self, n: int = N) -> None:
        self.n = n
        self._runs: dict[int, dict[tuple[str, ...], str]] = {}
        self._whole: dict[tuple[str, ...], str] = {}

    def add(self, name: str, questions: Iterable[str]) -> None:
        for question in questions:
            said = words(question)
            self._whole.setdefault(said, name)
            if len(said) >= SHORTEST:
                length = min(self.n, len(said))
                runs = self._runs.setdefault(length, {})
                for run in _runs(said, length):
                    runs.setdefault(run, name)

    def of(self, question: str) -> str | None:
        said = words(question)
        if said in self._whole:
            return self._whole[said]
        for length, runs in self._runs.items():
            for run in _runs(said, length):
                if run in runs:
                    return runs[run]
        return None


def _runs(said: tuple[str, ...], length: int) -> Iterable[tuple[str, ...]]:
    return (said[start : start + length] for start in range(len(said) - length + 1))
