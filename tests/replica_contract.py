"""What every engine of several servers promises, as tests: a class for one inherits these and gives `cluster`."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from serving.engines.base import EngineError, GenerateRequest, Sampling
from serving.engines.http_worker import Patience
from serving.engines.replicas import Replicas
from tests.engine_contract import collect
from tests.recorded_server import RecordedServer, served

PATIENCE = Patience(connect=5, silence=20, control=20, look=0.1)
Cluster = Callable[..., Awaitable[tuple[Any, list[Any]]]]


@contextlib.asynccontextmanager
async def clusters(
    model: Path, make_server: type[RecordedServer], make_engine: type[Replicas[Any, Any]]
) -> AsyncIterator[Cluster]:
    """`await cluster(n)`: an engine on n servers, and the servers."""
    async with contextlib.AsyncExitStack() as stack:

        async def start(count=1, patience=PATIENCE, key="secret", **options):
            servers = [make_server(model, **options) for _ in range(count)]
            urls = [stack.enter_context(served(server.app())) for server in servers]
            engine = make_engine(urls, key, patience=patience)
            stack.push_async_callback(engine.close)
            await engine.start()
            await engine.load("base", None)
            return engine, servers

        yield start


def ask(version="base", schema=None, **sampling):
    options = {"temperature": 0.0, "max_tokens": 6} | sampling
    return GenerateRequest([70, 71, 72, 73], version, Sampling(**options), json_schema=schema)


async def until(condition):
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - of a server in another thread
            await asyncio.sleep(0.02)


class ReplicaContract:
    async def test_a_load_reaches_every_worker_and_requests_go_round(self, cluster, home):
        engine, servers = await cluster(3)
        await engine.load("vx", home / "vx")
        assert all(server.adapters == {"vx": str(home / "vx")} for server in servers)
        await asyncio.gather(*(collect(engine, ask("vx", max_tokens=4, temperature=1.0)) for _ in range(9)))
        assert min(server.generated for server in servers) > 0
        await engine.unload("vx")
        assert not any(server.adapters for server in servers)

    async def test_a_dying_worker_is_drained_named_and_its_requests_go_elsewhere(self, cluster, home):
        engine, servers = await cluster(2)
        servers[0].die_after = 0
        both = await asyncio.gather(*(collect(engine, ask(temperature=1.0)) for _ in range(4)))
        assert all(ids for ids, _, _ in both)
        servers[0].die_after = 2
        await until(lambda: not engine.workers[0].problem)  # looked at again, it answers
        with pytest.raises(EngineError, match=engine.workers[0].url):  # in mid-answer nothing can take its place
            await asyncio.gather(*(collect(engine, ask(max_tokens=30)) for _ in range(2)))

    async def test_a_silent_worker_is_given_up_and_comes_back_with_what_it_missed(self, cluster, home):
        engine, servers = await cluster(2, patience=Patience(connect=5, silence=1, control=20, look=0.1))
        servers[0].silent = True
        for _ in range(2):
            assert (await collect(engine, ask()))[0]
        health = await engine.health()
        assert health["ok"] is True
        assert "said nothing" in health["workers"][engine.workers[0].url]["problem"]
        await engine.load("vx", home / "vx")
        assert not servers[0].adapters
        servers[0].silent = False
        await until(lambda: not engine.workers[0].problem)
        assert servers[0].adapters == servers[1].adapters == {"vx": str(home / "vx")}

    async def test_an_engine_without_workers_says_so_until_one_is_back(self, cluster, home):
        engine, [server] = await cluster(1, patience=Patience(connect=5, silence=1, control=20, look=0.1))
        server.silent = True
        with pytest.raises(EngineError, match="said nothing"):
            await collect(engine, ask())
        assert (await engine.health())["ok"] is False
        with pytest.raises(EngineError, match=r"No \w+ worker"):
            await collect(engine, ask())
        server.silent = False
        await until(lambda: not engine.workers[0].problem)
        assert (await collect(engine, ask()))[0]

    async def test_a_worker_that_was_started_anew_gets_its_adapters_back(self, cluster, home):
        engine, [server] = await cluster()
        await engine.load("vx", home / "vx")
        server.adapters.clear()
        server._load(server.first_path)
        with contextlib.suppress(EngineError):
            await collect(engine, ask("vx"))
        await until(lambda: server.adapters and not engine.workers[0].problem)
        assert (await collect(engine, ask("vx")))[0]

    async def test_a_worker_that_refuses_what_another_took_is_drained(self, cluster, home):
        engine, servers = await cluster(2)
        servers[1].adapters["vx"] = "/another/path"
        await engine.load("vx", home / "vx")
        assert engine.loaded() == ["base", "vx"]
        await until(lambda: servers[1].adapters.get("vx") == str(home / "vx") and not engine.workers[1].problem)

    async def test_versions_that_an_earlier_whetstone_loaded_are_taken_over(self, cluster, home):
        first, _ = await cluster()
        await first.load("vx", home / "vx")
        second = type(first)([first.workers[0].url], "secret", patience=PATIENCE)
        await second.start()
        await second.load("vx", home / "vx")
        assert (await collect(second, ask("vx")))[0]
        await second.close()

    async def test_a_wrong_key_or_an_address_where_nothing_listens_is_told(self, cluster, home):
        async def with_a_wrong_key():
            engine, _ = await cluster(key="wrong")
            await engine.load("vx", home / "vx")

        with pytest.raises(EngineError, match="engine_admin_key"):
            await with_a_wrong_key()
        engine, _ = await cluster()
        nowhere = type(engine)(["http://127.0.0.1:9"], patience=PATIENCE)
        with pytest.raises(EngineError, match=r"127.0.0.1:9.*running"):
            await nowhere.start()
        await nowhere.close()
