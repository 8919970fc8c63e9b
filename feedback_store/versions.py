"""Versions of the policy, which of them serve, and every change of that.

One is current. Another one, the canary, may be tried on a share of the new conversations. A conversation stays on the
version that it began on until it was idle for long, or until that version is no published one any more.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any, get_args

from sqlalchemy import Connection, Row, func, insert, select, update

from feedback_store.audit import note
from feedback_store.database import Database
from feedback_store.errors import InvalidRecord, NotFound
from feedback_store.postgres import Lock, hold
from feedback_store.records import Canary, InService, Version, VersionChange, VersionStatus
from feedback_store.schema import canary_changes, conversations, runs, version_changes, versions

_LONGEST_ID = 100


def _version(row: Row[Any]) -> Version:
    return Version(row.id, row.parent, row.run_id, row.path, row.manifest, row.status, row.created_at)


def _last_change(connection: Connection) -> Row[Any] | None:
    return connection.execute(select(version_changes).order_by(version_changes.c.id.desc()).limit(1)).first()


def current_version_of(connection: Connection) -> str | None:
    last = _last_change(connection)
    return None if last is None else last.version_id


def _canary(connection: Connection) -> Canary | None:
    """The one in effect: neither ended, nor in service already, nor withdrawn since."""
    row = connection.execute(
        select(canary_changes.c.version_id, canary_changes.c.share, versions.c.status)
        .join(versions, versions.c.id == canary_changes.c.version_id)
        .order_by(canary_changes.c.id.desc())
        .limit(1)
    ).first()
    if row is None or not row.share or row.status != "published" or row.version_id == current_version_of(connection):
        return None
    return Canary(row.version_id, row.share)


def may_keep(connection: Connection, version_id: str, kept: str | None) -> bool:
    """Whether a conversation may stay on the version that a turn of it begins with.

    It may on the one that was in service a moment ago, which another process may still answer with, but not when
    conversations were moved away from it meanwhile.
    """
    last = _last_change(connection)
    canary = _canary(connection)
    serving = () if last is None else (last.version_id, None if last.moved else last.previous)
    return version_id in (kept, canary.version if canary else None, *serving)


def _let_go(connection: Connection, *but: str | None) -> int:
    """Frees the conversations that stay on other versions than these; returns how many."""
    others = conversations.c.version.not_in([version for version in but if version is not None])
    return connection.execute(update(conversations).where(others).values(version=None)).rowcount


def _is_full(connection: Connection, version_id: str | None) -> bool:
    """Whether a version is full weights, beside which an engine can hold no other."""
    manifest = connection.execute(select(versions.c.manifest).where(versions.c.id == version_id)).scalar()
    return isinstance(manifest, dict) and manifest.get("kind") == "weights"


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
        if not id or len(id) > _LONGEST_ID:
            raise InvalidRecord(f"A version's id has 1 to {_LONGEST_ID} characters, not {len(id)}.")
        named = manifest.get("run_id")
        made_by = run_id or (named if isinstance(named, str) and named else None)
        now = self._now()
        with self._write() as connection:
            hold(connection, Lock.VERSIONS)
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
            hold(connection, Lock.VERSIONS)
            _status_of(connection, id)
            if status != "published" and current_version_of(connection) == id:
                raise InvalidRecord(f"Version {id!r} is in service; make another one current before it is {status}.")
            connection.execute(
                update(versions).where(versions.c.id == id).values(status=status, updated_at=self._now())
            )

    def set_current(self, id: str, reason: str, move_conversations: bool = False, who: str = "whetstone") -> int:
        """Puts a published version in service and records the change; nothing changes if it serves already. Its trial
        as a canary ends with that.

        `move_conversations`: those that stay on other versions, the canary's apart, go on with the new one too, as
        they do in any case to and from full weights. Returns how many there are.
        """
        with self._write() as connection:
            hold(connection, Lock.VERSIONS)
            status = _status_of(connection, id)
            if status != "published":
                raise InvalidRecord(f"Version {id!r} is {status}; only a published version can serve.")
            previous, canary = current_version_of(connection), _canary(connection)
            if previous != id:
                connection.execute(
                    insert(version_changes).values(version_id=id, previous=previous, reason=reason, at=self._now())
                )
                note(connection, self._now(), who, "version.use", id, {"previous": previous, "reason": reason})
                if canary is not None and canary.version == id:
                    self._record_canary(connection, id, 0.0, "put in service", who)
                    canary = None
            if _is_full(connection, id) or _is_full(connection, previous):
                move_conversations = True
                if canary is not None:
                    self._record_canary(connection, canary.version, 0.0, f"full weights changed: {id}", who)
                    canary = None
            if not move_conversations:
                return 0
            newest = select(func.max(version_changes.c.id)).scalar_subquery()
            connection.execute(update(version_changes).where(version_changes.c.id == newest).values(moved=True))
            return _let_go(connection, id, canary.version if canary else None)

    def current_version(self) -> str | None:
        with self._read() as connection:
            return current_version_of(connection)

    def version_changes(self, limit: int = 100) -> list[VersionChange]:
        """What served when and why, the newest change first."""
        with self._read() as connection:
            rows = connection.execute(select(version_changes).order_by(version_changes.c.id.desc()).limit(limit))
            return [VersionChange(row.version_id, row.previous, row.reason, row.at) for row in rows]

    def set_canary(
        self, id: str, share: float, reason: str, move_conversations: bool = False, who: str = "whetstone"
    ) -> int:
        """Tries a published version on a share of the new conversations, in place of any other canary; 0 ends it.

        `move_conversations`, at the end of a trial: those that began on it go on with the current one. Returns how
        many there are.
        """
        if not 0 <= share <= 1:
            raise InvalidRecord(f"A canary's share is between 0 and 1, not {share}; 0.1 is every tenth owner.")
        if move_conversations and share:
            raise InvalidRecord("Conversations are moved away from a canary when it ends, with share 0.")
        with self._write() as connection:
            hold(connection, Lock.VERSIONS)
            status = _status_of(connection, id)
            canary = _canary(connection)
            if share:
                if status != "published":
                    raise InvalidRecord(f"Version {id!r} is {status}; only a published version can be tried.")
                if current_version_of(connection) == id:
                    raise InvalidRecord(f"Version {id!r} is in service already; a canary is another version.")
                for full in (id, current_version_of(connection)):
                    if _is_full(connection, full):
                        raise InvalidRecord(
                            f"Version {full!r} is full weights, of which an engine has one set: no other version can "
                            "be tried beside it."
                        )
                if canary != Canary(id, share):
                    self._record_canary(connection, id, share, reason, who)
                return 0
            if canary is not None and canary.version != id:
                raise InvalidRecord(f"Version {id!r} isn't on trial; {canary.version!r} is.")
            if canary is not None:
                self._record_canary(connection, id, 0.0, reason, who)
            if not move_conversations or current_version_of(connection) == id:
                return 0
            on_it = conversations.c.version == id
            return connection.execute(update(conversations).where(on_it).values(version=None)).rowcount

    def canary(self) -> Canary | None:
        """The version that is tried on a share of the new conversations."""
        with self._read() as connection:
            return _canary(connection)

    def in_service(self, conversation_id: str | None, owner: str, idle_seconds: float) -> InService:
        """What a turn of this owner's conversation, or of a new one (None), may be answered with."""
        with self._read() as connection:
            kept = None
            if conversation_id is not None:
                kept = connection.execute(
                    select(conversations.c.version)
                    .join(versions, versions.c.id == conversations.c.version)
                    .where(
                        conversations.c.id == conversation_id,
                        conversations.c.owner == owner,
                        conversations.c.updated_at > self._idle_since(idle_seconds),
                        versions.c.status == "published",
                    )
                ).scalar()
            return InService(current_version_of(connection), _canary(connection), kept)

    def conversations_on(self, idle_seconds: float) -> dict[str, int]:
        """How many conversations that aren't idle stay on each version; versions without any are left out."""
        c = conversations.c
        query = (
            select(c.version, func.count())
            .where(c.updated_at > self._idle_since(idle_seconds), c.version.is_not(None))
            .group_by(c.version)
        )
        with self._read() as connection:
            return {version: count for version, count in connection.execute(query)}

    def _idle_since(self, idle_seconds: float) -> datetime:
        return self._now() - timedelta(seconds=idle_seconds)

    def _record_canary(self, connection: Connection, id: str, share: float, reason: str, who: str) -> None:
        now = self._now()
        connection.execute(insert(canary_changes).values(version_id=id, share=share, reason=reason, at=now))
        note(connection, now, who, "version.canary", id, {"share": share, "reason": reason})
