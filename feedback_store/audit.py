"""The audit: who decided what about the record, and when. Nothing but a person's or a guard's decision is in it."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, insert, select

from feedback_store.database import Database
from feedback_store.records import AuditEntry
from feedback_store.schema import audit


def note(
    connection: Connection, now: datetime, who: str, action: str, subject: str, detail: Mapping[str, Any] | None = None
) -> None:
    """A line in the caller's own transaction: the decision and its trace come together or not at all."""
    row = {"at": now, "who": who, "action": action, "subject": subject, "detail": dict(detail or {})}
    connection.execute(insert(audit).values(row))


class Audit(Database):
    def audit(self, who: str, action: str, subject: str, detail: Mapping[str, Any] | None = None) -> None:
        """Writes down that `who` did `action` to `subject`; for what isn't one transaction of the store's."""
        with self._write() as connection:
            note(connection, self._now(), who, action, subject, detail)

    def audit_log(self, action: str | None = None, limit: int = 100) -> list[AuditEntry]:
        """The newest first; those whose action is, or begins with, `action` (`quarantine` finds `quarantine.lift`)."""
        query = select(audit).order_by(audit.c.id.desc()).limit(limit)
        if action is not None:
            query = query.where((audit.c.action == action) | audit.c.action.startswith(f"{action}.", autoescape=True))
        with self._read() as connection:
            return [AuditEntry(**row._mapping) for row in connection.execute(query)]
