"""Which version serves, and the swap to the next one.

The store says which version is current, which one is tried on a share of the new conversations, and which one a
conversation stays on. A router in each serving process follows it: it loads the new version beside the old one, sends
new conversations there, and unloads the old one when its conversations have ended or gone idle. No answer changes its
version midway, none waits, none fails.

Full weights are the exception: an engine has one set. All conversations move with them. From one set to the next,
answers under way go on and tell which weights drew what; between adapters and full weights, new answers wait until
those under way have ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from feedback_store import InvalidRecord, Store, StoreError
from serving.engines.base import Engine, EngineError, WeightsRefused
from serving.loading import LoadedVersions
from serving.manifest import CorruptVersion, copy_version, read_version, remove_unfinished
from serving.routing import preferred

log = logging.getLogger(__name__)

SHIPPED = Path(__file__).parent / "shipped"
_DAMAGED_FOR_S = 60.0  # a version whose files or weights can't serve is looked at again after so long


class NoVersion(EngineError):
    """There is no version that could serve."""


def install_shipped(store: Store, home: Path) -> None:
    """Put the versions that come with Whetstone in the registry, and the first of them in service if none is.

    What a kill left half-written among the versions is removed.
    """
    remove_unfinished(home / "versions")
    known = {version.id for version in store.versions()}
    for source in sorted(path for path in SHIPPED.iterdir() if (path / "manifest.json").exists()):
        target = home / "versions" / source.name
        if not (target / "manifest.json").exists():
            copy_version(source, target)
        if source.name not in known:
            manifest = read_version(target)
            try:
                store.add_version(manifest.id, manifest.parent, str(target), manifest.model_dump(), "published")
            except InvalidRecord:  # another process of the same store starts, too
                if manifest.id not in {version.id for version in store.versions()}:
                    raise
        if store.current_version() is None:
            store.set_current(source.name, "came with Whetstone")


class VersionRouter:
    """Follows the store's current version. `start` it before the first `lease`, `close` it at the end.

    A version that can't be loaded leaves the one in service where it is; `refused` says why. It is tried again: at the
    next poll when the reason may pass (a locked store, a full machine), once a minute when its files or weights are to
    blame.

    `idle_s`: how long a conversation may rest before it no longer stays on its version. `at_most`: versions loaded at
    once. `wait_s`: how long a request for a version by id waits for room.
    """

    def __init__(
        self,
        store: Store,
        engine: Engine,
        base_fingerprint: str | None = None,
        poll_s: float = 1.0,
        idle_s: float = 1800.0,
        at_most: int = 4,
        wait_s: float = 10.0,
    ) -> None:
        self._store = store
        self._engine = engine
        self._poll_s = poll_s
        self._idle_s = idle_s
        self._wait_s = wait_s
        self._loaded = LoadedVersions(store, engine, base_fingerprint, at_most)
        self._follower: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self.refused: dict[str, str] = {}
        self._not_before: dict[str, float] = {}
        self._giving_way: str | None = None

    @property
    def current(self) -> str:
        if self._loaded.pinned is None:
            raise NoVersion("No version is in service. `whetstone doctor` says what is missing.")
        return self._loaded.pinned

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
            if await self._adopt(version):
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
    async def lease(
        self, version: str | None = None, owner: str = "", conversation_id: str | None = None
    ) -> AsyncIterator[str]:
        """A version to answer with, kept loaded until the block ends: a published one by id, or by None the one that
        this owner's conversation (a new one: None) stays on, its canary, or the one in service.

        Raises UnknownVersion, NoRoom, EngineError for a version by id; by None the one in service stands in for what
        can't be loaded.
        """
        async with AsyncExitStack() as held:
            if version is None:
                yield await self._hold_preferred(held, owner, conversation_id)
            else:
                await held.enter_async_context(self._loaded.hold(version, self._wait_s))
                yield version

    async def refresh(self) -> None:
        """Swap to the store's current version if it is another one, load its canary, and unload what no answer and no
        conversation needs any more."""
        choice = await asyncio.to_thread(self._store.in_service, None, "", self._idle_s)
        before = self._loaded.pinned
        if choice.current is None or choice.current == before:
            self._giving_way = None
        elif await self._adopt(choice.current):
            log.info("swapped from %s to %s", before, choice.current)
            self._giving_way = None
        elif self._giving_way is None and (crowding := self._loaded.to_give_way()) is not None:
            log.warning("%s can't be loaded beside the others: the conversations on %s go on", choice.current, crowding)
            self._giving_way = crowding
        needed = await asyncio.to_thread(self._store.conversations_on, self._idle_s)
        if choice.canary is not None:
            needed[choice.canary.version] = needed.get(choice.canary.version, 0)
            async with AsyncExitStack() as held:
                await self._try(held, choice.canary.version)
        await self._loaded.unload_but(needed)

    async def use(self, version: str, reason: str, move_conversations: bool = False) -> int:
        """Put a published version in service, at once here and within a poll in other processes; returns how many
        conversations were moved along (see `Store.set_current`). Raises EngineError when it can't be loaded."""
        async with self._loaded.hold(version, self._wait_s, to_serve=True):
            moved = await asyncio.to_thread(self._store.set_current, version, reason, move_conversations)
            self._loaded.pinned = version
        return moved

    async def try_on(self, version: str, share: float, reason: str, move_conversations: bool = False) -> int:
        """Try a published version on a share of the new conversations; 0 ends that (see `Store.set_canary`). Raises
        EngineError when it can't be loaded."""
        async with AsyncExitStack() as held:
            if share:
                await held.enter_async_context(self._loaded.hold(version, self._wait_s))
            return await asyncio.to_thread(self._store.set_canary, version, share, reason, move_conversations)

    async def status(self) -> dict[str, object]:
        """What serves in this process, what is tried, what is loaded, and how many conversations stay on each."""
        canary = await asyncio.to_thread(self._store.canary)
        return {
            "current": self.current,
            "canary": canary and {"version": canary.version, "share": canary.share},
            "loaded": self.loaded(),
            "conversations": await asyncio.to_thread(self._store.conversations_on, self._idle_s),
            "refused": dict(self.refused),
        }

    async def _hold_preferred(self, held: AsyncExitStack, owner: str, conversation_id: str | None) -> str:
        choice = await asyncio.to_thread(self._store.in_service, conversation_id, owner, self._idle_s)
        for version in preferred(choice, owner):
            if version == self._giving_way:  # else conversations that never rest would keep a swap out
                continue
            if version == choice.current != self.current:
                if version not in self.refused:
                    self._wake.set()
                if version not in self._loaded:  # no answer waits for a swap: the next ones have it
                    continue
            if await self._try(held, version):
                return version
        while True:
            current = self.current
            try:
                await held.enter_async_context(self._loaded.hold(current))
            except WeightsRefused:
                if current == self.current:
                    raise
            else:
                return current

    async def _follow(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), self._poll_s)
            self._wake.clear()
            try:
                await self.refresh()
            except (StoreError, EngineError) as error:
                log.warning("can't follow the registry, %s stays in service: %s", self._loaded.pinned, error)
            except Exception:  # without its follower a server would never swap again, and nobody would know
                log.exception("can't follow the registry, %s stays in service", self._loaded.pinned)

    async def _adopt(self, version: str) -> bool:
        async with AsyncExitStack() as held:  # until it is pinned
            if await self._try(held, version, to_serve=True):
                self._loaded.pinned = version
                return True
        return False

    async def _try(self, held: AsyncExitStack, version: str, to_serve: bool = False) -> bool:
        """Hold a version if that can be. One that failed for good a moment ago isn't tried."""
        if time.monotonic() < self._not_before.get(version, 0.0):
            return False
        try:
            await held.enter_async_context(self._loaded.hold(version, to_serve=to_serve))
        except (EngineError, StoreError) as error:
            if isinstance(error, WeightsRefused) and not to_serve:
                return False  # nothing is wrong with it: other weights serve
            said = f"version {version} was refused: {error}"
            if self.refused.get(version) != said:
                log.error("%s; %s stays in service", said, self._loaded.pinned)
                if to_serve:
                    await self._tell_run(version, str(error))
            self.refused[version] = said
            if isinstance(error, WeightsRefused) or isinstance(error.__cause__, CorruptVersion):
                self._not_before[version] = time.monotonic() + _DAMAGED_FOR_S
            return False
        self.refused.pop(version, None)
        return True

    async def _tell_run(self, version: str, why: str) -> None:
        """The journal of the run that made the version says that it couldn't be put in service."""
        with contextlib.suppress(StoreError):  # the store may be what failed; the log has it in any case
            made_by = (await asyncio.to_thread(self._store.version, version)).run_id
            if made_by is not None:
                await asyncio.to_thread(self._store.add_note, made_by, "swap failed", {"version": version, "why": why})
