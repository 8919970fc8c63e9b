"""`em`: exact match with one of several golds, as open-domain question answering is scored.

The gold is a JSON list of texts; words are compared as SQuAD does (arXiv 1606.05250). Unlike `exact`, a sentence around
the gold is wrong: published figures (arXiv 2503.09516 and others) are of this strict kind.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

from online_rl.verifiers.base import Score, Verifier
from online_rl.verifiers.exact import words


def gold_of(texts: Iterable[str]) -> str:
    """The gold of a task with these right answers, in their order, once each."""
    return json.dumps(list(dict.fromkeys(text.strip() for text in texts if text.strip())), ensure_ascii=False)


def texts_of(gold: str) -> list[str]:
    """The right answers of a gold; none when it isn't a JSON list of texts."""
    try:
        found = json.loads(gold)
    except ValueError:
        return []
    return found if isinstance(found, list) and all(isinstance(text, str) for text in found) else []


def judge(gold: str, answer: str, _tool_calls: int = 0) -> Score:
    """1 for the words of one of the golds and nothing beside them; else 0."""
    wanted = [words(text) for text in texts_of(gold)]
    if not any(wanted):
        return Score(0.0, f"the gold {gold[:60]!r} is no JSON list of texts")
    said = words(answer)
    if not said:
        return Score(0.0, "no answer")
    return Score(1.0, "one of the golds") if said in wanted else Score(0.0, "another answer")


def wrongs(gold: str) -> list[str]:
    """Nothing, and each gold with something beside it."""
    beside = [made for text in texts_of(gold)[:5] for made in (f"{text} or Atlantis", f"It is not {text}.", f"{text}x")]
    return ["", "I don't know.", *beside]


VERIFIER = Verifier("em", judge, wrongs, texts_of)
