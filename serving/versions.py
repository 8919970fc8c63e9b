"""Which version serves, and the swap to the next one.

The store says which version is current. A router in each serving process follows it: it loads the new version beside
the old one, sends the next answers there, and unloads the old one when its answers have ended. No answer changes
its version midway, none waits, none fails.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from feedback_store import Store, StoreError
from serving.engines.base import Engine, EngineError, UnknownVersion
from serving.manifest import CorruptVersion, copy_version, read_version

log = logging.getLogger(__name__)

SHIPPED = Path(__file__).parent / "shipped"


class NoVersion(EngineError):
    """There is no version that could serve."""


def install_shipped(store: Store, home: Path) -> None:
    """Put the versions that come with Whetstone in the registry, and the first of them in service if none is."""
    known = {version.id for version in store.versions()}
    for source in sorted(path for path in SHIPPED.iterdir() if (path / "manifest.json").exists()):
        target = home / "versions" / source.name
        if not (target / "manifest.json").exists():
            copy_version(source, target)
        if source.name not in known:
            manifest = read_version(target)
            store.add_version(manifest.id, manifest.parent, str(target), manifest.model_dump(), "published")
        if store.current_version() is None:
            store.set_current(source.name, "came with Whetstone")


class VersionRouter:
    """Follows the store's current version. `start` it before the first `lease`, `close` it at the end.

    A version that can't be loaded leaves the one in service where it is; `refused` says why. What may pass (a locked
    store, a full machine) is tried again at the next poll; an altered or foreign version isn't, until it is repaired.
    """

    def __init__(self, store: Store, engine: Engine, base_fingerprint: str | None = None, poll_s: float = 1.0) -> None:
        self._store = store
        self._engine = engine
        self._base = base_fingerprint
        self._poll_s = poll_s
        self._current: str | None = None
        self._in_use: Counter[str] = Counter()
        self._loads: dict[str, asyncio.Lock] = {}
        self._follower: asyncio.Task[None] | None = None
        self.refused: dict[str, str] = {}
        self._altered: set[str] = set()

    @property
    def current(self) -> str:
        if self._current is None:
            raise NoVersion("No version is in service. `whetstone doctor` says what is missing.")
        return self._current

    def loaded(self) -> list[str]:
        return self._engine.loaded()

    async def start(self) -> None:
        """Load the current version, or the newest published one before it that can be loaded, and follow from there.

        Raises NoVersion when none can.
        """
        wanted = await asyncio.to_thread(self._store.current_version)
        versions = await asyncio.to_thread(self._store.versions)
        fallbacks = [v.id for v in reversed(versions) if v.status == "published" and v.id != wanted]
        for version in [*([wanted] if wanted else []), *fallbacks]:
            if await self._try(version):
                self._current = version
                break
        else:
            reasons = "; ".join(self.refused.values()) or "the registry is empty"
            raise NoVersion(f"No published version can be loaded: {reasons}")
        self._follower = asyncio.create_task(self._follow(), name="version follower")

    async def close(self) -> None:
        if self._follower is not None:
            self._follower.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._follower

    @asynccontextmanager
    async def lease(self, version: str | None = None) -> AsyncIterator[str]:
        """A version to answer with, kept loaded until the block ends: the current one, or a published one by id."""
        chosen = version or self.current
        self._in_use[chosen] += 1
        try:
            if chosen not in self._engine.loaded():
                await self._load(chosen)
            yield chosen
        finally:
            self._in_use[chosen] -= 1

    async def refresh(self) -> None:
        """Swap to the store's current version if it is another one, and unload what no answer needs any more."""
        wanted = await asyncio.to_thread(self._store.current_version)
        if wanted is not None and wanted != self._current and wanted not in self._altered and await self._try(wanted):
            log.info("swapped from %s to %s", self._current, wanted)
            self._current = wanted
        for version in self._engine.loaded():
            if version != self._current and not self._in_use[version]:
                await self._engine.unload(version)

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(self._poll_s)
            try:
                await self.refresh()
            except (StoreError, EngineError) as error:
                log.warning("can't follow the registry, %s stays in service: %s", self._current, error)
            except Exception:  # without its follower a server would never swap again, and nobody would know
                log.exception("can't follow the registry, %s stays in service", self._current)

    async def _try(self, version: str) -> bool:
        try:
            await self._load(version)
        except (EngineError, StoreError) as error:
            said = f"version {version} was refused: {error}"
            if self.refused.get(version) != said:
                log.error("%s; %s stays in service", said, self._current)
            self.refused[version] = said
            if isinstance(error.__cause__, CorruptVersion):
                self._altered.add(version)
            return False
        self.refused.pop(version, None)
        return True

    async def _load(self, version: str) -> None:
        async with self._loads.setdefault(version, asyncio.Lock()):
            if version in self._engine.loaded():
                return
            known = {v.id: v for v in await asyncio.to_thread(self._store.versions)}
            if version not in known or known[version].status != "published":
                published = ", ".join(v.id for v in known.values() if v.status == "published")
                raise UnknownVersion(f"There is no published version {version!r}; published are: {published}.")
            path = Path(known[version].path)
            try:
                await asyncio.to_thread(read_version, path, self._base)
            except CorruptVersion as error:
                raise EngineError(str(error)) from error
            await self._engine.load(version, path)
