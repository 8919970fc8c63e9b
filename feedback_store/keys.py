"""API keys: who may call the endpoint, and for what. The key itself is shown once and kept by nobody but its holder.

A key is 256 random bits, so a plain SHA-256 of it is safe to keep: there is nothing to guess, which is all that a slow
hash with a salt (of a password that people choose) would make harder, and it would cost its time at every request.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any, Final, get_args

from sqlalchemy import Row, delete, insert, or_, select, update
from sqlalchemy.exc import IntegrityError

from feedback_store.codec import check_zone
from feedback_store.database import Database
from feedback_store.errors import InvalidRecord, NotFound
from feedback_store.records import ApiKey, Scope
from feedback_store.schema import api_keys

PREFIX: Final = "wsk-"  # so that a secret scanner finds one that was published
USED_EVERY: Final = timedelta(minutes=1)  # `last_used_at` is no finer: not every request shall write


def key_hash(key: str | bytes) -> str:
    return hashlib.sha256(key.encode() if isinstance(key, str) else key).hexdigest()


def owner_of_hash(digest: str) -> str:
    """The owner's name in the record: it tells keys apart and doesn't give them away."""
    return f"key-{digest[:16]}"


def _api_key(row: Row[Any]) -> ApiKey:
    return ApiKey(
        owner=row.owner,
        hash=row.hash,
        name=row.name,
        scopes=tuple(row.scopes),
        requests_per_minute=row.requests_per_minute,
        answers_at_once=row.answers_at_once,
        created_at=row.created_at,
        expires_at=row.expires_at,
        revoked_at=row.revoked_at,
        last_used_at=row.last_used_at,
    )


class Keys(Database):
    def add_key(
        self,
        name: str,
        scopes: Sequence[Scope],
        expires_at: datetime | None = None,
        requests_per_minute: int | None = None,
        answers_at_once: int | None = None,
    ) -> tuple[ApiKey, str]:
        """A new key: its record, and the key itself, which can't be had again. The limits None: as the settings say."""
        if not name.strip():
            raise InvalidRecord("A key needs a name that says whose it is or what for.")
        if not scopes or (unknown := [scope for scope in scopes if scope not in get_args(Scope)]):
            wrong = f"{unknown[0]!r} is none" if scopes else "it has no scope: give at least one"
            raise InvalidRecord(f"The key {name!r}: {wrong} of {', '.join(get_args(Scope))}.")
        now = self._now()
        check_zone(expires_at, "The key's end")
        if expires_at is not None and expires_at <= now:
            raise InvalidRecord(f"The key {name!r} would have expired on {expires_at:%Y-%m-%d}; give a later day.")
        for limit, what in ((requests_per_minute, "requests a minute"), (answers_at_once, "answers at once")):
            if limit is not None and limit < 1:
                raise InvalidRecord(f"The key {name!r}: {limit} {what} would allow none; give 1 or more.")
        key = PREFIX + secrets.token_urlsafe(32)
        digest = key_hash(key)
        row = {
            "owner": owner_of_hash(digest),
            "hash": digest,
            "name": name.strip(),
            "scopes": sorted(set(scopes)),
            "requests_per_minute": requests_per_minute,
            "answers_at_once": answers_at_once,
            "created_at": now,
            "expires_at": expires_at,
        }
        with self._write() as connection:
            try:
                with connection.begin_nested():
                    connection.execute(insert(api_keys).values(row))
            except IntegrityError:
                raise InvalidRecord(
                    f"There is a key {name.strip()!r} already; revoke it first, or choose another name."
                ) from None
            made = connection.execute(select(api_keys).where(api_keys.c.owner == row["owner"])).one()
        return _api_key(made), key

    def api_keys(self) -> list[ApiKey]:
        """All of them, expired and revoked ones too, the oldest first."""
        with self._read() as connection:
            rows = connection.execute(select(api_keys).order_by(api_keys.c.created_at, api_keys.c.owner))
            return [_api_key(row) for row in rows]

    def revoke_key(self, name: str) -> ApiKey:
        """Ends a key for good, by its name or its owner's. What was said with it stays in the record."""
        named = or_(api_keys.c.name == name, api_keys.c.owner == name)
        with self._write() as connection:
            row = connection.execute(select(api_keys).where(named, api_keys.c.revoked_at.is_(None))).first()
            if row is None:
                raise NotFound("key in use", name)
            its = api_keys.c.owner == row.owner
            connection.execute(update(api_keys).where(its).values(revoked_at=self._now()))
            return _api_key(connection.execute(select(api_keys).where(its)).one())

    def forget_keys(self, name: str) -> int:
        """Removes the revoked keys of a name, or of an owner's; returns how many there were."""
        named = or_(api_keys.c.name == name, api_keys.c.owner == name)
        with self._write() as connection:
            gone = connection.execute(delete(api_keys).where(named, api_keys.c.revoked_at.is_not(None))).rowcount
        if not gone:
            raise NotFound("revoked key", name)
        return gone

    def used_key(self, owner: str) -> None:
        """Notes that a key was used, at most once a minute."""
        now = self._now()
        stale = or_(api_keys.c.last_used_at.is_(None), api_keys.c.last_used_at < now - USED_EVERY)
        with self._write() as connection:
            connection.execute(update(api_keys).where(api_keys.c.owner == owner, stale).values(last_used_at=now))
