"""The verifiers by name. A new one is a file with a `VERIFIER` and a line here."""

from __future__ import annotations

from online_rl.verifiers import exact, f1, math_answer, no_tool, numeric
from online_rl.verifiers.base import RIGHT, Score, ValidationReport, Verifier

__all__ = ["RIGHT", "Score", "UnknownVerifier", "ValidationReport", "Verifier", "get", "names"]

_VERIFIERS: dict[str, Verifier] = {
    module.VERIFIER.name: module.VERIFIER for module in (exact, f1, math_answer, no_tool, numeric)
}


class UnknownVerifier(ValueError):
    """No verifier has that name."""


def names() -> list[str]:
    return sorted(_VERIFIERS)


def get(name: str) -> Verifier:
    """The verifier called `name`. Raises UnknownVerifier, which names the known ones."""
    if name not in _VERIFIERS:
        raise UnknownVerifier(f"unknown verifier {name!r}: choose one of {', '.join(names())}")
    return _VERIFIERS[name]
