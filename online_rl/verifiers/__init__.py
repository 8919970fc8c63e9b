"""The verifiers by name. A new one is a file with a `VERIFIER` and a line here."""

from __future__ import annotations

from feedback_store.records import RIGHT
from online_rl.verifiers import approximate, em, exact, f1, math_answer, no_tool, numeric
from online_rl.verifiers.base import Score, ValidationReport, Verifier
from online_rl.verifiers.gold_key import gold_key

__all__ = [
    "RIGHT",
    "BadGold",
    "Score",
    "UnknownVerifier",
    "ValidationReport",
    "Verifier",
    "check_gold",
    "get",
    "gold_key",
    "names",
]

_VERIFIERS: dict[str, Verifier] = {
    module.VERIFIER.name: module.VERIFIER for module in (approximate, em, exact, f1, math_answer, no_tool, numeric)
}


class UnknownVerifier(ValueError):
    """No verifier has that name."""


class BadGold(ValueError):
    """A verifier would call its own gold wrong, so no answer to it could ever be right."""


def names() -> list[str]:
    return sorted(_VERIFIERS)


def get(name: str) -> Verifier:
    """The verifier called `name`. Raises UnknownVerifier, which names the known ones."""
    if name not in _VERIFIERS:
        raise UnknownVerifier(f"unknown verifier {name!r}: choose one of {', '.join(names())}")
    return _VERIFIERS[name]


def check_gold(name: str, gold: str) -> None:
    """Raises UnknownVerifier, or BadGold for a gold that the verifier can't recognise."""
    if get(name).validate([gold]).rejected:
        raise BadGold(f"the verifier {name!r} can't judge by the gold {gold[:80]!r}: give one that it reads as right")
