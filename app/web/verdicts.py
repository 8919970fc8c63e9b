"""What a person says about an answer: a thumb, or the right answer, which the queue then holds for tonight."""

from __future__ import annotations

import re

from app.service import Service
from feedback_store import Outcome, StoreError
from online_rl import verifiers
from online_rl.verifiers import BadGold, UnknownVerifier

AUTO = "automatic"
KINDS = {AUTO: "", "number": "numeric", "text": "exact", "maths": "math"}
_NUMBER = re.compile(r"[-+]?(\d[\d,  ]*)?\.?\d+([eE][-+]?\d+)?%?")
TAKEN = "Thank you"
_QUEUED = ("queued", "known", "reopened")


def verifier_for(gold: str, chosen: str = AUTO) -> str:
    """The verifier's name for a right answer: the one chosen, else `numeric` for a number and `exact` for text."""
    if name := KINDS.get(chosen):
        return name
    return "numeric" if _NUMBER.fullmatch(gold.strip()) else "exact"


async def thumb(service: Service, owner: str, turn_id: str | None, up: bool) -> str:
    """Record a thumb; returns what to tell the person."""
    if turn_id is None:
        return "That answer isn't in the record, so there is nothing to judge."
    try:
        await service.feedback(turn_id, owner, "person", score=1.0 if up else 0.0, reason="thumb")
    except StoreError as error:
        return f"Not recorded: {error}"
    return f"{TAKEN}: recorded as {'good' if up else 'bad'}." + (
        "" if up else " With the right answer below, the model can learn from it."
    )


async def correct(service: Service, owner: str, turn_id: str | None, gold: str, chosen: str = AUTO) -> str:
    """Record the right answer to a turn; returns what to tell the person."""
    gold = gold.strip()
    if turn_id is None:
        return "Ask something first: the right answer belongs to the last question."
    if not gold:
        return "Write the right answer first."
    name = verifier_for(gold, chosen)
    try:
        outcome = await service.feedback(turn_id, owner, "person", verifier=name, gold=gold)
    except UnknownVerifier:
        return f"Not recorded: there is no verifier {name!r}; there are {', '.join(verifiers.names())}."
    except (BadGold, StoreError) as error:
        return f"Not recorded: {error}"
    return told(outcome)


def told(outcome: Outcome) -> str:
    verdict = "the answer was right" if (outcome.score or 0.0) > 0.9 else "the answer was not right"
    if outcome.became in _QUEUED:
        return f"{TAKEN}: {verdict}, and the question is queued for tonight. {outcome.note}".rstrip()
    return f"{TAKEN}: recorded, {verdict}. {outcome.note}".rstrip()
