"""Tainted versions: those trained on what was forgotten since, and all that descend from them."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Connection, func, select

from feedback_store.database import Database
from feedback_store.errors import NotFound
from feedback_store.schema import erased_uses, versions


@dataclass(frozen=True)
class Taint:
    """`runs`: those that trained on something forgotten, the version's own or its ancestors', the nearest first.
    `tasks`: how many of theirs were forgotten. `since`: when the first was."""

    version: str
    runs: list[str]
    tasks: int
    since: datetime


def tainted_versions(connection: Connection) -> dict[str, Taint]:
    """By version, the oldest first. A version's children are tainted too, those of tomorrow included."""
    count = func.count(erased_uses.c.task_id.distinct())
    by_run = {
        row.run_id: (row.n, row.since)
        for row in connection.execute(
            select(erased_uses.c.run_id, count.label("n"), func.min(erased_uses.c.at).label("since"))
            .where(erased_uses.c.taints)
            .group_by(erased_uses.c.run_id)
        )
    }
    if not by_run:
        return {}
    found: dict[str, Taint] = {}
    rows = connection.execute(select(versions).order_by(versions.c.created_at, versions.c.id))
    for row in rows:  # parents are registered before their children
        above = found.get(row.parent) if row.parent else None
        own = by_run.get(row.run_id)
        if own is not None or above is not None:
            found[row.id] = Taint(
                row.id,
                ([row.run_id] if own else []) + (above.runs if above else []),
                (own[0] if own else 0) + (above.tasks if above else 0),
                min(part for part in (own and own[1], above and above.since) if part),
            )
    return found


def clean_ancestor(connection: Connection, version_id: str | None) -> str | None:
    """The newest published ancestor of a version that is not tainted, the version itself included; None for none."""
    tainted = tainted_versions(connection)
    known = {row.id: row for row in connection.execute(select(versions.c.id, versions.c.parent, versions.c.status))}
    while version_id is not None and (row := known.get(version_id)) is not None:
        if version_id not in tainted and row.status == "published":
            return version_id
        version_id = row.parent
    return None


class Taints(Database):
    def tainted(self) -> dict[str, Taint]:
        """Versions that were trained on what was forgotten since, by id, the oldest first."""
        with self._read() as connection:
            return tainted_versions(connection)

    def clean_ancestor(self, version_id: str) -> str | None:
        """The newest published version that `version_id` comes from and that isn't tainted, itself included."""
        with self._read() as connection:
            if connection.execute(select(versions.c.id).where(versions.c.id == version_id)).first() is None:
                raise NotFound("version", version_id)
            return clean_ancestor(connection, version_id)
