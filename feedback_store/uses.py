"""Which tasks a run trained on."""

from __future__ import annotations

from sqlalchemy import Connection, select

from feedback_store.schema import run_stages


def set_aside(connection: Connection, run_id: str) -> set[str]:
    """The tasks that a run claimed and didn't train on, as its journal tells."""
    claims = select(run_stages.c.detail).where(run_stages.c.run_id == run_id, run_stages.c.stage == "claim")
    details = connection.execute(claims).scalars().all()
    return {id for detail in details for ids in (detail.get("set_aside") or {}).values() for id in ids}
