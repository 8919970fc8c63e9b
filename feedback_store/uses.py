"""Which tasks a run trained on."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, select

from feedback_store.schema import run_stages


def set_aside(connection: Connection, run_id: str) -> set[str]:
    """The tasks that a run claimed and didn't train on, as its journal tells."""
    claims = select(run_stages.c.detail).where(run_stages.c.run_id == run_id, run_stages.c.stage == "claim")
    return {id for detail in connection.execute(claims).scalars() for id in _unused(detail)}


def _unused(detail: dict[str, Any]) -> list[str]:
    if "unused" in detail:
        return list(detail["unused"])
    # An older journal: ids by the reason, or how many beside some of the ids. What it doesn't name counts as used.
    named = [*(detail.get("set_aside") or {}).values(), *(detail.get("examples") or {}).values()]
    return [id for ids in named if isinstance(ids, list) for id in ids]
