"""Which version serves: shipped versions, swaps without a failed answer, and what can't be swapped to."""

import asyncio
import json
import shutil

import pytest

from feedback_store import Store
from serving.engines.base import EngineError, UnknownVersion
from serving.manifest import CorruptVersion, copy_version, read_version
from serving.versions import SHIPPED, NoVersion, VersionRouter, install_shipped
from tests.fakes import ScriptedEngine


@pytest.fixture
def store(tmp_path):
    with Store.open(tmp_path / "whetstone.db") as store:
        install_shipped(store, tmp_path)
        yield store


@pytest.fixture
def engine(base):
    engine = ScriptedEngine(base.tokenizer, lambda context: "x")
    engine._loaded = []
    return engine


def publish(store, tmp_path, name, parent="v0"):
    """A copy of v0's weights under another name."""
    folder = tmp_path / "versions" / name
    shutil.copytree(SHIPPED / "v0", folder)
    manifest = json.loads((folder / "manifest.json").read_text()) | {"id": name, "parent": parent}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    store.add_version(name, parent, str(folder), manifest, "published")
    return folder


def test_what_ships_is_whole_and_fits_the_base(base):
    manifest = read_version(SHIPPED / "v0", base.fingerprint)
    assert manifest.id == "v0"
    assert manifest.command.startswith("whetstone warmup")
    assert sum(f.stat().st_size for f in (SHIPPED / "v0").iterdir()) < 12_000_000


def test_shipped_versions_are_installed_once(store, tmp_path):
    install_shipped(store, tmp_path)
    assert [v.id for v in store.versions()] == ["v0"]
    assert store.current_version() == "v0"


async def test_a_swap_leaves_answers_under_way_on_their_version(store, engine, tmp_path):
    router = VersionRouter(store, engine, poll_s=0.02)
    await router.start()
    publish(store, tmp_path, "v1")
    async with router.lease() as old:
        store.set_current("v1", "test")
        async with asyncio.timeout(5):
            while router.current != "v1":  # noqa: ASYNC110 - it polls a store, which has no event
                await asyncio.sleep(0.01)
        assert old == "v0"
        assert set(engine.loaded()) == {"v0", "v1"}
        async with router.lease() as new:
            assert new == "v1"
    await router.refresh()
    assert engine.loaded() == ["v1"]
    await router.close()


async def test_a_corrupt_version_is_refused_and_the_old_one_serves(store, engine, tmp_path):
    router = VersionRouter(store, engine, poll_s=60)
    await router.start()
    folder = publish(store, tmp_path, "v1")
    (folder / "adapter_model.safetensors").write_bytes(b"rot")
    store.set_current("v1", "test")
    await router.refresh()
    assert router.current == "v0"
    assert "altered" in router.refused["v1"]
    await router.close()


async def test_a_swap_that_failed_for_a_passing_reason_is_tried_again(store, engine, tmp_path, monkeypatch):
    router = VersionRouter(store, engine, poll_s=60)
    await router.start()
    publish(store, tmp_path, "v1")
    store.set_current("v1", "test")
    load = engine.load

    async def refuse_once(version, path):
        monkeypatch.setattr(engine, "load", load)
        raise EngineError("out of memory")

    monkeypatch.setattr(engine, "load", refuse_once)
    await router.refresh()
    assert router.current == "v0"
    await router.refresh()
    assert router.current == "v1"
    assert not router.refused
    await router.close()


async def test_a_server_starts_on_the_last_version_that_loads(store, engine, tmp_path):
    folder = publish(store, tmp_path, "v1")
    store.set_current("v1", "test")
    shutil.rmtree(folder)
    router = VersionRouter(store, engine)
    await router.start()
    assert router.current == "v0"
    await router.close()


async def test_without_any_version_the_error_says_why(tmp_path, engine):
    with Store.open(tmp_path / "empty.db") as store, pytest.raises(NoVersion, match="registry is empty"):
        await VersionRouter(store, engine).start()


async def test_a_lease_can_name_a_version(store, engine, tmp_path):
    router = VersionRouter(store, engine, poll_s=60)
    await router.start()
    publish(store, tmp_path, "v1")
    async with router.lease("v1") as version:
        assert version == "v1"
        await router.refresh()
        assert "v1" in engine.loaded()
    with pytest.raises(UnknownVersion, match="v7"):
        async with router.lease("v7"):
            pass
    await router.close()


def test_an_altered_copy_is_not_made(tmp_path):
    source = tmp_path / "v0"
    shutil.copytree(SHIPPED / "v0", source)
    (source / "adapter_config.json").write_text("{}")
    with pytest.raises(CorruptVersion, match=r"adapter_config\.json"):
        copy_version(source, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


async def test_an_engine_that_refuses_leaves_the_old_version_in_service(store, engine, tmp_path, monkeypatch):
    router = VersionRouter(store, engine, poll_s=60)
    await router.start()
    publish(store, tmp_path, "v1")
    store.set_current("v1", "test")

    async def refuse(version, path):
        raise EngineError("out of memory")

    monkeypatch.setattr(engine, "load", refuse)
    await router.refresh()
    assert router.current == "v0"
    assert "out of memory" in router.refused["v1"]
    await router.close()
