"""Keeps versions loaded while they are used, and never more of them than memory has room for."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from pathlib import Path

from feedback_store import NotFound, Store
from serving.engines.base import Engine, EngineError, UnknownVersion
from serving.manifest import CorruptVersion, read_version

log = logging.getLogger(__name__)


class NoRoom(EngineError):
    """As many versions are loaded as may be, and answers use them all."""


class LoadedVersions:
    """An engine's versions. One is loaded or unloaded at a time; what is loaded can be held meanwhile.

    `at_most` versions are loaded at once; `pinned`, the one in service, isn't unloaded to make room.
    """

    def __init__(self, store: Store, engine: Engine, base_fingerprint: str | None, at_most: int) -> None:
        if at_most < 2:
            raise ValueError(f"At least 2 versions must fit beside each other, not {at_most}: a swap needs both.")
        self._store = store
        self._engine = engine
        self._base = base_fingerprint
        self._at_most = at_most
        self._users: Counter[str] = Counter()
        self._used_at: dict[str, float] = {}
        self._changing = asyncio.Lock()
        self._leaving: set[str] = set()
        self._freed = asyncio.Event()
        self.pinned: str | None = None

    def __contains__(self, version: str) -> bool:
        return version in self._engine.loaded() and version not in self._leaving

    @asynccontextmanager
    async def hold(self, version: str, wait_s: float = 0.0) -> AsyncIterator[None]:
        """Loaded until the block ends. `wait_s`: how long to wait for room.

        Raises UnknownVersion, NoRoom, EngineError (by CorruptVersion, if its files aren't what they were).
        """
        self._users[version] += 1
        try:
            if version not in self:
                await self._load(version, wait_s)
            yield
        finally:
            self._used_at[version] = time.monotonic()
            self._users[version] -= 1
            if not self._users[version]:
                del self._users[version]
                self._freed.set()

    def to_give_way(self) -> str | None:
        """When there is no room: of the versions beside the one in service, the one that fewest answers use."""
        loaded = [version for version in self._engine.loaded() if version != self.pinned]
        if len(loaded) + 1 < self._at_most or self._idle():
            return None
        return min(loaded, key=lambda version: self._users[version])

    async def unload_but(self, wanted: Collection[str]) -> None:
        """Unload what isn't wanted and no answer uses."""
        async with self._changing:
            while unwanted := [version for version in self._idle() if version not in wanted]:
                await self._unload(unwanted[0])
        self._freed.set()

    async def _load(self, version: str, wait_s: float) -> None:
        path = await asyncio.to_thread(self._checked_path, version)
        deadline = time.monotonic() + wait_s
        while True:
            async with self._changing:
                if version in self:
                    return
                idle = self._idle()
                while len(self._engine.loaded()) >= self._at_most and idle:
                    log.info("unloading %s to make room for %s", idle[0], version)
                    await self._unload(idle[0])
                    idle = self._idle()
                if len(self._engine.loaded()) < self._at_most:
                    await self._engine.load(version, path)
                    return
                self._freed.clear()
            try:
                await asyncio.wait_for(self._freed.wait(), max(0.0, deadline - time.monotonic()))
            except TimeoutError:
                raise NoRoom(
                    f"Version {version!r} can't be loaded now: {self._at_most} others are in use "
                    f"({', '.join(self._engine.loaded())}). Try again in a moment, or raise max_loaded_versions."
                ) from None

    def _idle(self) -> list[str]:
        """What could be unloaded, the longest unused first."""
        idle = [v for v in self._engine.loaded() if v != self.pinned and not self._users[v]]
        return sorted(idle, key=lambda version: self._used_at.get(version, 0.0))

    async def _unload(self, version: str) -> None:
        self._leaving.add(version)  # whoever wants it from now on loads it anew
        try:
            await self._engine.unload(version)
        finally:
            self._leaving.discard(version)
            self._used_at.pop(version, None)

    def _checked_path(self, version: str) -> Path:
        try:
            found = self._store.version(version)
        except NotFound:
            found = None
        if found is None or found.status != "published":
            published = ", ".join(v.id for v in self._store.versions() if v.status == "published")
            raise UnknownVersion(f"There is no published version {version!r}; published are: {published}.")
        try:
            read_version(Path(found.path), self._base)
        except CorruptVersion as error:
            raise EngineError(str(error)) from error
        return Path(found.path)
