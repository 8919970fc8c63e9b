"""`exact`: the gold's words, alone or as the one thing that a short sentence says.

Words are compared as SQuAD does (arXiv 1606.05250): no case, punctuation or articles; accents don't count either.
"""

from __future__ import annotations

import re
import unicodedata

from online_rl.verifiers.base import Score, Verifier

MAX_WORDS = 12
"""A longer answer must be the gold itself: prose around it is a place to hide other guesses."""
SHORT_GOLD = 2
"""Golds of so few characters (symbols, codes) also occur as words: only as the last word, in their own case."""

_ARTICLES = {"a", "an", "the"}
_HEDGES = {
    "or", "and", "either", "neither", "nor", "not", "no", "never", "maybe", "perhaps", "possibly", "isnt", "arent",
    "wasnt", "cannot", "cant", "instead", "unlike", "except", "unknown", "unsure",
}  # fmt: skip
_FUNCTION_WORDS = {"of", "s", "i", "it", "its", "city", "country", "so", "yes"}
_COPULA = re.compile(r"\b(?:is|are|was|were)\b", re.I)
_LINK = re.compile(r"\b(?:is|are|was|were|uses?|used|with|called|named|in|on|at|to|from)\b|[:;=\n]", re.I)


def words(text: str) -> list[str]:
    """The words of `text`, folded: `words("The U.S. Dollar") == ["us", "dollar"]`."""
    bare = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    tokens = re.findall(r"[^\W_]+", re.sub(r"[.'\u2019`]", "", bare.casefold()))
    return [t for t in tokens if t not in _ARTICLES] or tokens


def contains(sequence: list[str], part: list[str]) -> bool:
    return any(sequence[i : i + len(part)] == part for i in range(len(sequence) - len(part) + 1))


def judge(gold: str, answer: str, _tool_calls: int = 0) -> Score:
    """1 for the gold itself, or for a sentence of at most 12 words that says the gold and nothing beside it; else 0.

    A sentence says the gold when the gold stands after its last linking word, or before its first "is", with at most
    one more word of content there ("Japanese yen", "Tallinn, Estonia"). Words that hedge or list ("or", "and",
    "not", "maybe", …) make it wrong. Two guesses in a bare fragment of two can't be told from a name with its
    epithet; that limit is accepted.
    """
    wanted, said = words(gold), words(answer)
    if not wanted:
        return Score(0.0, f"the gold {gold[:60]!r} has no words")
    if not said:
        return Score(0.0, "no answer")
    if said == wanted:
        return Score(1.0, "the gold itself")
    if len(said) > MAX_WORDS:
        return Score(0.0, f"{len(said)} words, more than {MAX_WORDS}")
    if not contains(said, wanted):
        return Score(0.0, "another answer")
    beside = _without(said, wanted)
    hedges = _HEDGES.intersection(beside)
    if hedges:
        return Score(0.0, f"a hedge or a list: {sorted(hedges)[0]!r}")
    if len(gold.strip()) <= SHORT_GOLD:
        last = answer.split()[-1].strip(".,;:!?\"'()*`")
        closes = last == gold.strip() and len(_LINK.split(answer)) > 1
        return Score(1.0, "the sentence closes with the gold") if closes else Score(0.0, "a short gold in passing")
    copula = _COPULA.split(answer, maxsplit=1)
    places = [_LINK.split(answer)[-1], *(copula[:1] if len(copula) == 2 else [])]
    if any(_says(words(place), wanted) for place in places) or _says(said, wanted):
        return Score(1.0, "a short sentence that says the gold")
    return Score(0.0, "the gold among other words")


def _without(sequence: list[str], part: list[str]) -> list[str]:
    """`sequence` less the first occurrence of `part`."""
    for i in range(len(sequence) - len(part) + 1):
        if sequence[i : i + len(part)] == part:
            return sequence[:i] + sequence[i + len(part) :]
    return sequence


def _says(place: list[str], wanted: list[str]) -> bool:
    """Whether the gold is there with at most one other word of content."""
    return contains(place, wanted) and sum(w not in _FUNCTION_WORDS for w in _without(place, wanted)) <= 1


def wrongs(gold: str) -> list[str]:
    """Negations, hedges, lists and fragments made from a gold."""
    return [
        "",
        "I don't know.",
        f"It is not {gold}.",
        f"{gold} or Atlantis",
        f"Atlantis, {gold}, Lemuria, Utopia",
        f"Atlantis Lemuria {gold} Utopia Shangri-La",
        f"{gold}x",
        f"{gold} " + "and many other places besides that one " * 4,
    ]


VERIFIER = Verifier("exact", judge, wrongs)
