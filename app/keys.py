"""Who may call: the keys of the settings and those of the store, for the endpoint and the chat alike.

A key of the settings is the operator's own and may chat and judge, as it always could. What an administrator may do
takes a key of the store that was made for it, so that nobody's rights grow by an update.

The store's keys are read every few seconds, all of them; that is how long a new or a revoked one takes to count.
Once the store has a key, a caller needs one, even when all are expired or revoked: time alone opens nothing.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection
from dataclasses import dataclass
from datetime import UTC, datetime

from app.owners import LOCAL_OWNER, owner_of
from app.settings import Settings
from feedback_store import ApiKey, Scope, Store, StoreError
from feedback_store.keys import USED_EVERY, key_hash

REFRESH_SECONDS = 2.0
log = logging.getLogger(__name__)


class NotAKey(Exception):
    """A key that isn't known, has expired or was revoked. The message says which, and never the key."""


@dataclass(frozen=True)
class Holder:
    """Who calls, and what they may. A limit of None is the settings'."""

    owner: str
    name: str
    scopes: Collection[Scope]
    requests_per_minute: int | None = None
    answers_at_once: int | None = None


class KeyRing:
    def __init__(self, store: Store, settings: Settings) -> None:
        self._store = store
        self._settings = settings
        own = [key.get_secret_value().encode() for key in settings.api_keys]
        self._own = {key_hash(key): Holder(owner_of(key), "of the settings", ("chat", "feedback")) for key in own}
        self._owners = {holder.owner for holder in self._own.values()}
        self._stored: dict[str, ApiKey] = {}
        self._read_at = float("-inf")
        self._noted: dict[str, float] = {}
        self._notes: set[asyncio.Task[None]] = set()

    @property
    def local(self) -> Holder:
        """Whoever calls where no key is needed."""
        scopes: list[Scope] = ["chat", "feedback", "metrics"]
        return Holder(LOCAL_OWNER, "local", [*scopes, "admin"] if self._settings.admin_open_on_loopback else scopes)

    def refresh(self) -> None:
        """Read the store's keys anew where they are a few seconds old. Blocks; raises StoreError."""
        if self._stale:
            self._stored = {key.hash: key for key in self._store.api_keys()}
            self._read_at = time.monotonic()

    async def refreshed(self) -> KeyRing:
        """This ring, with what the store says now. Raises StoreError: nobody is let in unseen."""
        if self._stale:
            await asyncio.to_thread(self.refresh)
        return self

    @property
    def needed(self) -> bool:
        """Whether a caller needs a key: there is one, in the settings or in the store."""
        return bool(self._own or self._stored)

    def holder(self, key: str) -> Holder:
        """Whose `key` is. Raises NotAKey.

        Keys are looked up by their hashes, so the time that it takes tells nothing about a key.
        """
        digest = key_hash(key)
        if (holder := self._own.get(digest)) is not None:
            return holder
        if (stored := self._stored.get(digest)) is None:
            raise NotAKey("this API key isn't known: use one from WHETSTONE_API_KEYS or `whetstone keys add`.")
        if ended := _ended(stored):
            raise NotAKey(f"this API key {ended}: ask for a new one (`whetstone keys add`).")
        return Holder(stored.owner, stored.name, stored.scopes, stored.requests_per_minute, stored.answers_at_once)

    def may(self, owner: str, scope: Scope) -> bool:
        """Whether an owner who once showed a key may still do what `scope` names."""
        if owner in self._owners:
            return scope in ("chat", "feedback")
        return any(key.owner == owner and scope in key.scopes and not _ended(key) for key in self._stored.values())

    def used(self, holder: Holder) -> None:
        """Have it noted, off the request's path, that the key was used."""
        if holder.owner in self._owners or holder.owner == LOCAL_OWNER:
            return
        now = time.monotonic()
        if now - self._noted.get(holder.owner, float("-inf")) < USED_EVERY.total_seconds():
            return
        self._noted[holder.owner] = now
        note = asyncio.create_task(self._note(holder.owner))
        self._notes.add(note)
        note.add_done_callback(self._notes.discard)

    async def _note(self, owner: str) -> None:
        try:
            await asyncio.to_thread(self._store.used_key, owner)
        except StoreError as error:
            log.warning("when the key of %s was last used isn't noted: %s", owner, error)

    @property
    def _stale(self) -> bool:
        return time.monotonic() - self._read_at >= REFRESH_SECONDS


def check_reach(store: Store, settings: Settings) -> None:
    """Raises ValueError where a service would be open to strangers, or would hold back an owner whom nobody has."""
    ring = KeyRing(store, settings)
    ring.refresh()
    if not ring.needed and not settings.is_loopback:
        raise ValueError(
            f"host {settings.host!r} can be reached by other machines, and there is no API key: anyone could run code "
            "in the sandbox and teach the model. Make one with `whetstone keys add NAME`, or set WHETSTONE_API_KEYS "
            "to one or more secrets, or keep WHETSTONE_HOST=127.0.0.1."
        )
    if not ring.needed and "*" in settings.cors_origins:
        raise ValueError(
            "cors_origins has '*', and there is no API key: any web page that somebody on this machine opens could "
            "call the endpoint. Name the origins, or make a key with `whetstone keys add NAME`."
        )
    known = {key.owner for key in ring._stored.values()} | ring._owners
    if known and (unknown := [owner for owner in settings.key_tools if owner not in known | {LOCAL_OWNER}]):
        raise ValueError(
            f"key_tools names {unknown[0]!r}, which is no key's owner, so that it would hold nobody back: "
            "`whetstone keys list` names the store's, `whetstone up` those of WHETSTONE_API_KEYS."
        )


def _ended(key: ApiKey) -> str:
    """Why a key of the store counts no more; "" where it does."""
    if key.revoked_at is not None:
        return "was revoked"
    if key.expires_at is not None and key.expires_at <= datetime.now(UTC):
        return f"expired on {key.expires_at:%Y-%m-%d}"
    return ""
