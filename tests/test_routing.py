"""Which version a conversation gets, in one process and in several, and how many versions are loaded meanwhile."""

from __future__ import annotations

import asyncio
import fcntl
import logging
import shutil
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from feedback_store import Canary, InService, InvalidRecord, Store
from serving.engines.base import EngineError, UnknownVersion
from serving.loading import NoRoom
from serving.manifest import _locked, remove_unfinished
from serving.routing import on_canary, preferred
from serving.versions import VersionRouter, install_shipped
from tests.fakes import ScriptedEngine, until
from tests.test_versions import publish

ASK = [{"role": "user", "content": "?"}]


def empty_engine() -> ScriptedEngine:
    engine = ScriptedEngine(None, lambda context: "x")
    engine._loaded = []
    return engine


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """v0 serves; v1, v2 and v3 are published."""
    with Store.open(tmp_path / "whetstone.db") as store:
        install_shipped(store, tmp_path)
        for name in ("v1", "v2", "v3"):
            publish(store, tmp_path, name)
        yield store


@pytest.fixture
def engine() -> ScriptedEngine:
    return empty_engine()


@pytest.fixture
async def router(store: Store, engine: ScriptedEngine) -> AsyncIterator[VersionRouter]:
    router = VersionRouter(store, engine, poll_s=60, wait_s=0.2)
    await router.start()
    yield router
    await router.close()


async def turn(router: VersionRouter, store: Store, conversation: str | None = None, owner: str = "ada") -> list[str]:
    """[conversation, version] of one more turn, recorded as the service does it."""
    async with router.lease(None, owner, conversation) as version:
        conversation = conversation or store.create_conversation(owner)
        finished = store.begin_turn(conversation, ASK, version, [1], stays=True)
        store.finish_turn(finished, "!", "done")
    return [conversation, version]


def break_version(store: Store, version: str) -> None:
    (Path(store.version(version).path) / "adapter_model.safetensors").write_bytes(b"rot")


async def test_a_conversation_keeps_its_version_and_new_ones_get_the_new(
    router: VersionRouter, store: Store, engine: ScriptedEngine
) -> None:
    old, _ = await turn(router, store)
    store.set_current("v1", "better")
    await router.refresh()
    assert engine.loaded() == ["v0", "v1"], "a conversation is still on v0"
    assert await turn(router, store, old) == [old, "v0"]
    assert (await turn(router, store))[1] == "v1"
    async with router.lease("v2", "ada", old) as version:
        assert version == "v2", "a version by id wins"
    assert await turn(router, store, old) == [old, "v0"]


async def test_an_idle_conversation_goes_on_with_the_current_version(store: Store, engine: ScriptedEngine) -> None:
    router = VersionRouter(store, engine, poll_s=60, idle_s=0.3)
    await router.start()
    old, _ = await turn(router, store)
    store.set_current("v1", "better")
    await router.refresh()
    await asyncio.sleep(0.35)
    await router.refresh()
    assert engine.loaded() == ["v1"]
    assert await turn(router, store, old) == [old, "v1"]
    await router.close()


async def test_a_rollback_to_a_loaded_version_counts_from_the_next_answer(router: VersionRouter, store: Store) -> None:
    old, _ = await turn(router, store)
    assert await router.use("v1", "better") == 0
    new, version = await turn(router, store)
    assert (router.current, version) == ("v1", "v1")
    assert store.set_current("v0", "worse: another process says so", move_conversations=True) == 1
    assert await turn(router, store, new) == [new, "v0"], "no poll was needed"
    assert await turn(router, store, old) == [old, "v0"]


async def test_an_answer_doesnt_wait_for_a_swap(router: VersionRouter, store: Store) -> None:
    store.set_current("v1", "better")
    late, version = await turn(router, store)
    assert version == "v0"
    await until(lambda: router.current == "v1")  # the lease woke the follower, which polls once a minute here
    assert await turn(router, store, late) == [late, "v0"]
    assert (await turn(router, store))[1] == "v1"


@pytest.mark.parametrize("how", ["altered", "vanished", "withdrawn", "engine"])
async def test_a_version_that_cant_serve_gives_way_to_the_current_one(
    router: VersionRouter,
    store: Store,
    engine: ScriptedEngine,
    how: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    await router.use("v1", "better")
    conversation, _ = await turn(router, store)
    await router.use("v2", "better still")
    await engine.unload("v1")  # as a restart would
    if how == "altered":
        break_version(store, "v1")
    elif how == "vanished":
        shutil.rmtree(store.version("v1").path)
    elif how == "withdrawn":
        store.set_version_status("v1", "refused")
    else:

        async def refuse(version: str, path: Path | None) -> None:
            raise EngineError("out of memory")

        monkeypatch.setattr(engine, "load", refuse)
    with caplog.at_level(logging.ERROR):
        assert await turn(router, store, conversation) == [conversation, "v2"]
    assert ("v1 was refused" in caplog.text) == (how != "withdrawn")
    assert store.in_service(conversation, "ada", 60).kept == "v2"


async def test_owners_fall_to_a_canary_by_their_share(router: VersionRouter, store: Store) -> None:
    owners = [f"owner {n}" for n in range(60)]
    conversation, _ = await turn(router, store, owner=owners[0])
    await router.try_on("v1", 0.5, "try it")
    got = {owner: (await turn(router, store, owner=owner))[1] for owner in owners}
    assert got == {owner: (await turn(router, store, owner=owner))[1] for owner in owners}
    assert 15 < sum(version == "v1" for version in got.values()) < 45
    assert (await turn(router, store, conversation, owners[0]))[1] == "v0", "only new conversations are tried"
    status = await router.status()
    assert status["canary"] == {"version": "v1", "share": 0.5}
    assert status["current"] == "v0"
    await router.try_on("v1", 0, "enough", move_conversations=True)
    assert {(await turn(router, store, owner=owner))[1] for owner in owners} == {"v0"}


async def test_a_canary_that_cant_be_loaded_fails_nobody(
    router: VersionRouter, store: Store, engine: ScriptedEngine
) -> None:
    break_version(store, "v1")
    with pytest.raises(EngineError, match="altered"):
        await router.try_on("v1", 1, "try it")
    assert store.canary() is None
    store.set_canary("v1", 1, "by a process that didn't look")
    assert (await turn(router, store))[1] == "v0"
    await router.refresh()
    assert engine.loaded() == ["v0"]
    with pytest.raises(EngineError, match="altered"):
        await router.use("v1", "no")
    assert store.current_version() == "v0"


def test_the_share_is_of_owners_and_grows_in_place() -> None:
    owners = [f"key-{n:016x}" for n in range(4000)]
    tenth = {owner for owner in owners if on_canary(owner, "v1", 0.1)}
    half = {owner for owner in owners if on_canary(owner, "v1", 0.5)}
    assert 300 < len(tenth) < 500
    assert tenth < half
    assert tenth != {owner for owner in owners if on_canary(owner, "v2", 0.1)}
    assert not any(on_canary(owner, "v1", 0.0) for owner in owners)
    assert all(on_canary(owner, "v1", 1.0) for owner in owners)
    known = [owner for owner in ("ada", "ben", "cyd", "dee", "eve", "local") if on_canary(owner, "v1", 0.5)]
    assert known == ["local"], "a release that sorts owners otherwise would move them in the middle of a trial"


def test_what_is_preferred() -> None:
    canary = Canary("v2", 1.0)
    assert preferred(InService("v1", canary, "v0"), "ada") == ["v0", "v1"]
    assert preferred(InService("v1", canary, None), "ada") == ["v2", "v1"]
    assert preferred(InService("v1", Canary("v2", 0.0), None), "ada") == ["v1"]
    assert preferred(InService("v1", None, "v1"), "ada") == ["v1"]
    assert preferred(InService(None, None, None), "ada") == []


async def test_no_more_versions_are_loaded_than_may_be(store: Store, engine: ScriptedEngine) -> None:
    router = VersionRouter(store, engine, poll_s=60, at_most=2, wait_s=0.2)
    await router.start()
    for version in ("v1", "v2", "v3", "v1"):
        async with router.lease(version):
            assert sorted(engine.loaded()) == ["v0", version], "the one in service is never unloaded for another"
    async with router.lease("v1"):
        with pytest.raises(NoRoom, match=r"'v2' can't be loaded now.*v0, v1.*max_loaded_versions"):
            async with router.lease("v2"):
                pass
        waiting = asyncio.create_task(turn(router, store))  # what serves needs no room
        assert (await waiting)[1] == "v0"
    await router.close()


async def test_a_request_waits_for_room(store: Store, engine: ScriptedEngine) -> None:
    router = VersionRouter(store, engine, poll_s=60, at_most=2, wait_s=20)
    await router.start()

    async def ask(version: str) -> None:
        async with router.lease(version):
            assert version in engine.loaded()
            assert len(engine.loaded()) <= 2
            await asyncio.sleep(0.01)

    await asyncio.gather(*(ask(version) for version in ("v1", "v2", "v3") * 5))
    assert len(engine.loaded()) == 2
    await router.close()


async def test_the_longest_idle_version_makes_room(store: Store, engine: ScriptedEngine) -> None:
    router = VersionRouter(store, engine, poll_s=60, at_most=3)
    await router.start()
    async with AsyncExitStack() as held:
        for version in ("v1", "v2", "v1"):
            async with router.lease(version):
                pass
        await held.enter_async_context(router.lease("v3"))
    assert sorted(engine.loaded()) == ["v0", "v1", "v3"]
    await router.close()


async def test_conversations_that_never_rest_dont_keep_a_swap_out(store: Store, engine: ScriptedEngine) -> None:
    router = VersionRouter(store, engine, poll_s=60, at_most=2)
    await router.start()
    await router.use("v1", "better")
    conversation, _ = await turn(router, store)
    await router.use("v0", "back")
    async with router.lease(None, "ada", conversation) as version:
        assert version == "v1"
        store.set_current("v2", "better still")
        await router.refresh()
        assert router.current == "v0"
        async with router.lease(None, "ada", conversation) as version:  # its next turn comes before the last one ends
            assert version == "v0"
    await router.refresh()
    assert (router.current, engine.loaded()) == ("v2", ["v2"])
    await router.close()


async def test_a_version_isnt_handed_out_while_it_is_unloaded(
    router: VersionRouter, store: Store, engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine elsewhere lists a version until its unloading is through."""
    async with router.lease("v1"):
        pass
    unload, began, go_on = engine.unload, asyncio.Event(), asyncio.Event()

    async def slowly(version: str) -> None:
        began.set()
        await go_on.wait()
        await unload(version)

    monkeypatch.setattr(engine, "unload", slowly)
    refreshing = asyncio.create_task(router.refresh())
    await began.wait()

    async def ask() -> bool:
        async with router.lease("v1"):
            return go_on.is_set() and "v1" in engine.loaded()

    asking = asyncio.create_task(ask())
    await asyncio.sleep(0.05)
    go_on.set()
    assert await asking
    await refreshing


async def test_two_processes_agree(store: Store, tmp_path: Path) -> None:
    """Two stores on one file, as two servers have them: a conversation may meet either at each turn."""
    with Store.open(tmp_path / "whetstone.db") as other_store:
        sides = [(VersionRouter(s, empty_engine(), poll_s=0.02), s) for s in (store, other_store)]
        for router, _ in sides:
            await router.start()
        (first, _), (second, _) = sides
        old, _ = await turn(*sides[0])
        await first.use("v1", "better")
        assert [await turn(*side, old) for side in sides * 2] == [[old, "v0"]] * 4
        await until(lambda: second.current == "v1")
        new, version = await turn(*sides[1])
        assert version == "v1"
        assert [await turn(*side, new) for side in sides * 2] == [[new, "v1"]] * 4

        await second.try_on("v2", 0.4, "try it")
        for owner in (f"owner {n}" for n in range(12)):
            assert len({(await turn(*side, owner=owner))[1] for side in sides}) == 1
        assert await first.use("v0", "back", move_conversations=True) >= 1
        assert [await turn(*side, new) for side in sides] == [[new, "v0"]] * 2
        assert (await first.status())["conversations"] == (await second.status())["conversations"]
        for router, _ in sides:
            await router.close()


async def test_unknown_versions_and_bad_shares_are_refused(router: VersionRouter) -> None:
    for wrong in (router.use("v9", "no"), router.try_on("v9", 0.5, "no")):
        with pytest.raises(UnknownVersion, match="'v9'; published are: v0, v1, v2, v3"):
            await wrong
    with pytest.raises(InvalidRecord, match="between 0 and 1"):
        await router.try_on("v1", 7, "no")
    with pytest.raises(InvalidRecord, match="in service"):
        await router.try_on("v0", 0.5, "no")


def test_what_a_kill_left_half_written_is_removed_at_start(store: Store, tmp_path: Path) -> None:
    versions = tmp_path / "versions"
    left, mine = versions / ".v4-a1b2c3_4", versions / ".git"
    for folder in (left, mine):
        folder.mkdir()
        (folder / "adapter_model.safetensors").write_bytes(b"half")
    with _locked(versions, fcntl.LOCK_SH):  # another process writes a version, which could be this very folder
        assert remove_unfinished(versions) == []
    install_shipped(store, tmp_path)
    assert (left.exists(), mine.exists()) == (False, True)
    assert {f.name for f in versions.iterdir()} == {".git", "v0", "v1", "v2", "v3"}
    assert remove_unfinished(tmp_path / "none") == []
