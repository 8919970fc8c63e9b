"""Which prompts are nearly the same, and which overlap an evaluation item. Texts are compared, not meanings.

Two prompts are near-duplicates when four fifths of their word pairs are shared and their numbers and signs are the
same in the same order: "what is 12*13" and "what is 12*14" are two questions, and so are Peru's and Chile's capital.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise

from datasketch import MinHash, MinHashLSH

from feedback_store.codec import clean

ALIKE = 0.8  # Jaccard similarity of the word pairs
RUN = 13  # words in a row, shared with an evaluation item, that are no accident (as in arXiv 2005.14165)
SHORTEST = 4  # words of an item that count where another prompt holds the whole item
_HASHES, _BANDS = 128, 32  # bands of 4: what is four fifths alike is missed once in ten million
_TOKEN = re.compile(r"\d+(?:[.,]\d+)*|[^\W\d_]+|[-+*/^=<>%×÷√()|]")  # noqa: RUF001 - people write the sign
_EMPTY = MinHash(num_perm=_HASHES, seed=1)


def tokens(text: str) -> list[str]:
    """Words, numbers and signs, without case. A hyphen or slash between two words is no sign."""
    found = _TOKEN.findall(unicodedata.normalize("NFKC", clean(text)).casefold())

    def joins(i: int) -> bool:
        around = found[i - 1 : i] + found[i + 1 : i + 2]
        return found[i] in "-/()" and all(len(token) > 1 and token.isalpha() for token in around)

    return [token for i, token in enumerate(found) if not joins(i)]


class Seen:
    """Prompts by name, and the question whether another is nearly one of them."""

    def __init__(self) -> None:
        self._index = MinHashLSH(num_perm=_HASHES, params=(_BANDS, _HASHES // _BANDS))
        self._prompts: dict[str, tuple[set[str], list[str]]] = {}

    def add(self, name: str, text: str) -> None:
        pairs, marks = _features(text)
        if name not in self._prompts:
            self._prompts[name] = (pairs, marks)
            self._index.insert(name, _sketch(pairs))

    def like(self, text: str) -> str | None:
        """The name of a near-duplicate, the first added; None if there is none."""
        pairs, marks = _features(text)
        found = set(self._index.query(_sketch(pairs)))
        for name in (name for name in self._prompts if name in found) if found else ():
            other, its_marks = self._prompts[name]
            if its_marks == marks and len(pairs & other) >= ALIKE * len(pairs | other):
                return name
        return None


class HeldOut:
    """Evaluation items, and the question whether a prompt gives one away: nearly the same, holding a whole item of at
    least 4 words, or sharing 13 words in a row with one item alone (shared by several, they are a template's)."""

    def __init__(self, items: Iterable[str]) -> None:
        self._near = Seen()
        self._whole: set[tuple[str, ...]] = set()
        runs: Counter[tuple[str, ...]] = Counter()
        for item in dict.fromkeys(items):
            words = tokens(item)
            self._near.add(item, item)
            if len(words) >= SHORTEST:
                self._whole.add(tuple(words))
            runs.update(set(_windows(words, RUN)))
        self._runs = {run for run, count in runs.items() if count == 1}
        self._lengths = sorted({len(whole) for whole in self._whole})

    def overlaps(self, text: str) -> bool:
        words = tokens(text)
        return (
            self._near.like(text) is not None
            or any(run in self._runs for run in _windows(words, RUN))
            or any(window in self._whole for length in self._lengths for window in _windows(words, length))
        )


def _features(text: str) -> tuple[set[str], list[str]]:
    words = tokens(text)
    pairs = {f"{a} {b}" for a, b in pairwise(words)} or set(words) or {text}
    return pairs, [word for word in words if not word.isalpha()]


def _sketch(pairs: set[str]) -> MinHash:
    sketch = _EMPTY.copy()
    sketch.update_batch([pair.encode() for pair in pairs])
    return sketch


def _windows(words: list[str], length: int) -> Iterable[tuple[str, ...]]:
    return (tuple(words[i : i + length]) for i in range(len(words) - length + 1))
