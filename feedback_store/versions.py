"""Versions of the policy, which of them serves, and every change of that."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from sqlalchemy import Connection, Row, insert, select, update

from feedback_store.database import Database
from feedback_store.errors import InvalidRecord, NotFound
from feedback_store.records import Version, VersionChange, VersionStatus
from feedback_store.schema import runs, version_changes, versions


def _version(row: Row[Any]) -> Version:
    return Version(row.id, row.parent, row.run_id, row.path, row.manifest, row.status, row.created_at)


def _current(connection: Connection) -> str | None:
    return connection.execute(
        select(version_changes.c.version_id).order_by(version_changes.c.id.desc()).limit(1)
    ).scalar()


def _check_status(status: str) -> None:
    if status not in get_args(VersionStatus):
        raise InvalidRecord(f"A version's status is one of {', '.join(get_args(VersionStatus))}, not {status!r}.")


def _status_of(connection: Connection, version_id: str) -> str:
    status = connection.execute(select(versions.c.status).where(versions.c.id == version_id)).scalar()
    if status is None:
        raise NotFound("version", version_id)
    return str(status)


class Versions(Database):
    def add_version(
        self,
        id: str,
        parent: str | None,
        path: str,
        manifest: Mapping[str, Any],
        status: VersionStatus,
        run_id: str | None = None,
    ) -> None:
        """Registers an immutable version; `parent` must be registered. `run_id` defaults to the manifest's."""
        _check_status(status)
        if not id:
            raise InvalidRecord("A version needs an id.")
        named = manifest.get("run_id")
        made_by = run_id or (named if isinstance(named, str) and named else None)
        now = self._now()
        with self._write() as connection:
            if connection.execute(select(versions.c.id).where(versions.c.id == id)).first() is not None:
                raise InvalidRecord(f"There is a version {id!r} already, and versions are immutable; choose a new id.")
            if parent is not None:
                _status_of(connection, parent)
            if (
                made_by is not None
                and connection.execute(select(runs.c.id).where(runs.c.id == made_by)).first() is None
            ):
                raise NotFound("run", made_by)
            connection.execute(
                insert(versions).values(
                    id=id,
                    parent=parent,
                    run_id=made_by,
                    path=path,
                    manifest=dict(manifest),
                    status=status,
                    created_at=now,
                    updated_at=now,
                )
            )

    def version(self, id: str) -> Version:
        with self._read() as connection:
            row = connection.execute(select(versions).where(versions.c.id == id)).first()
        if row is None:
            raise NotFound("version", id)
        return _version(row)

    def versions(self) -> list[Version]:
        """All of them, the oldest first."""
        with self._read() as connection:
            rows = connection.execute(select(versions).order_by(versions.c.created_at, versions.c.id))
            return [_version(row) for row in rows]

    def set_version_status(self, id: str, status: VersionStatus) -> None:
        _check_status(status)
        with self._write() as connection:
            _status_of(connection, id)
            if status != "published" and _current(connection) == id:
                raise InvalidRecord(f"Version {id!r} is in service; make another one current before it is {status}.")
            connection.execute(
                update(versions).where(versions.c.id == id).values(status=status, updated_at=self._now())
            )

    def set_current(self, id: str, reason: str) -> None:
        """Puts a published version in service and records the change; nothing changes if it serves already."""
        with self._write() as connection:
            status = _status_of(connection, id)
            if status != "published":
                raise InvalidRecord(f"Version {id!r} is {status}; only a published version can serve.")
            previous = _current(connection)
            if previous != id:
                connection.execute(
                    insert(version_changes).values(version_id=id, previous=previous, reason=reason, at=self._now())
                )

    def current_version(self) -> str | None:
        with self._read() as connection:
            return _current(connection)

    def version_changes(self, limit: int = 100) -> list[VersionChange]:
        """What served when and why, the newest change first."""
        with self._read() as connection:
            rows = connection.execute(select(version_changes).order_by(version_changes.c.id.desc()).limit(limit))
            return [VersionChange(row.version_id, row.previous, row.reason, row.at) for row in rows]
