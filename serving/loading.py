"""Keeps versions loaded while they are used, and never more of them than memory has room for.

Adapters lie beside each other over the model's own weights. A version of full weights takes the place of all: it comes
in only where it is to serve, and so do adapters again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from pathlib import Path

from feedback_store import NotFound, Store, Version
from serving.engines.base import Engine, EngineError, UnknownVersion, WeightsRefused
from serving.manifest import CorruptVersion, read_version

log = logging.getLogger(__name__)


class NoRoom(EngineError):
    """As many versions are loaded as may be, and answers use them all."""


class LoadedVersions:
    """An engine's versions. One is loaded or unloaded at a time; what is loaded can be held meanwhile.

    `at_most` versions are loaded at once; `pinned`, the one in service, isn't unloaded to make room. `patience_s`: how
    long a change between adapters and full weights waits for the answers under way.
    """

    def __init__(
        self,
        store: Store,
        engine: Engine,
        base_fingerprint: str | None,
        at_most: int,
        patience_s: float = 60.0,
    ) -> None:
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
        self._patience_s = patience_s
        self._swapping = asyncio.Lock()
        self._open = asyncio.Event()  # cleared while new answers wait for other weights
        self._open.set()
        self.pinned: str | None = None

    def __contains__(self, version: str) -> bool:
        return version in self._engine.loaded() and version not in self._leaving

    @asynccontextmanager
    async def hold(self, version: str, wait_s: float = 0.0, to_serve: bool = False) -> AsyncIterator[None]:
        """Loaded until the block ends. `wait_s`: how long to wait for room. `to_serve`: as the one in service, for
        which the weights under all versions may change; it is pinned then.

        Raises UnknownVersion, NoRoom, EngineError (by CorruptVersion, if its files aren't what they were),
        WeightsRefused for a version of other weights than are in place, or when those can't change.
        """
        if to_serve and version not in self:
            async with self._swapping:
                await self._change_weights(version)
        else:
            while not self._open.is_set():  # it may be closed again before who waits is woken
                await self._open.wait()
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

    async def _change_weights(self, version: str) -> None:
        """Put the weights in place that the version needs, if they aren't."""
        found = await asyncio.to_thread(self._published, version)
        full = _is_full(found)
        if self._engine.weights == (version if full else None):
            return
        if full and not self._engine.can_swap:
            raise WeightsRefused(
                f"Version {version!r} is full weights, which this engine can't change while it serves: serve them with "
                "engine = sglang."
            )
        path = await asyncio.to_thread(self._verified, found)
        smooth = full and self._engine.weights is not None  # answers under way go on with the new weights
        try:
            if not smooth:
                self._open.clear()
                await self._until_unused(version)
            async with self._changing:
                await self._swap(version, path, full)
        except EngineError as error:
            raise WeightsRefused(f"The weights of {version!r} weren't put in service: {error}") from error
        finally:
            self._open.set()
        self.pinned = version
        log.info("the weights of %s are in place", version)

    async def _until_unused(self, version: str) -> None:
        """Until the answers under way have ended; new ones wait meanwhile."""
        deadline = time.monotonic() + self._patience_s
        while self._users:
            self._freed.clear()
            try:
                await asyncio.wait_for(self._freed.wait(), max(0.0, deadline - time.monotonic()))
            except TimeoutError:
                raise EngineError(
                    f"{self._users.total()} answers with {', '.join(self._users)} didn't end within "
                    f"{self._patience_s:g} s; {version!r} is tried again later."
                ) from None

    async def _swap(self, version: str, path: Path, full: bool) -> None:
        before = self._engine.loaded()
        try:
            if self._engine.weights is None:
                for adapter in before:
                    await self._unload(adapter)
            await self._engine.swap(version if full else None, path if full else None)
            if not full:
                await self._engine.load(version, path)
        except EngineError:
            if self.pinned in before and self.pinned not in self._engine.loaded():
                await self._take_back(self.pinned)
            raise

    async def _take_back(self, version: str) -> None:
        """The one that served, after a change that failed."""
        found = await asyncio.to_thread(self._published, version)
        path = Path(found.path)
        if _is_full(found):
            await self._engine.swap(version, path)
        else:
            await self._engine.swap(None, None)
            await self._engine.load(version, path)

    async def _load(self, version: str, wait_s: float) -> None:
        found = await asyncio.to_thread(self._published, version)
        full = _is_full(found)
        if full or self._engine.weights is not None:
            raise WeightsRefused(
                f"Version {version!r} is {'full weights' if full else 'an adapter'}, and an engine has one set of "
                f"weights, now {self._engine.weights or 'the own ones of the model'}: put it in service for all, or "
                "not at all."
            )
        path = await asyncio.to_thread(self._verified, found)
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

    def _published(self, version: str) -> Version:
        try:
            found = self._store.version(version)
        except NotFound:
            found = None
        if found is None or found.status != "published":
            published = ", ".join(v.id for v in self._store.versions() if v.status == "published")
            raise UnknownVersion(f"There is no published version {version!r}; published are: {published}.")
        return found

    def _verified(self, version: Version) -> Path:
        """Its folder. Hashes the files: of full weights that takes seconds."""
        try:
            read_version(Path(version.path), self._base)
        except CorruptVersion as error:
            raise EngineError(str(error)) from error
        return Path(version.path)


def _is_full(version: Version) -> bool:
    return version.manifest.get("kind") == "weights"
