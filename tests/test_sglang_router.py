"""Behind sglang-router itself: it chooses who generates, and what changes versions goes to every worker.

Its workers answer as SGLang does; test_sglang_real.py has SGLang itself behind it. Needs the package sglang-router
where WHETSTONE_SGLANG_PYTHON points; `make test-sglang` installs it there.
"""

import asyncio
import contextlib

import pytest
import pytest_asyncio

from serving.engines.base import EngineError, GenerateRequest, Sampling
from serving.engines.http_worker import Patience
from serving.engines.sglang import SGLangEngine
from tests.engine_contract import Bench, EngineContract, collect
from tests.fakes import until
from tests.recorded_server import served
from tests.sglang_contract import RecordedSGLang
from tests.sglang_router import has_router, running_router
from tests.test_sglang import ask, folders  # noqa: F401 - a fixture
from tests.tiny_model import tiny_tokenizer

pytestmark = [
    pytest.mark.sglang,
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.skipif(not has_router(), reason="WHETSTONE_SGLANG_PYTHON names no interpreter with sglang-router"),
]
PATIENCE = Patience(connect=5, silence=30, control=30, look=0.2)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(folders, tmp_path_factory):  # noqa: F811
    """An engine behind the router, its two servers, and the folder of models."""
    home, _ = folders
    servers = [RecordedSGLang(home / "base", incremental=True) for _ in range(2)]
    log = tmp_path_factory.mktemp("router") / "router.log"
    async with contextlib.AsyncExitStack() as stack:
        urls = [stack.enter_context(served(server.app())) for server in servers]
        router = await stack.enter_async_context(running_router(urls, "secret", log, "--policy", "round_robin"))
        engine = SGLangEngine(urls, "secret", router, PATIENCE)
        stack.push_async_callback(engine.close)
        await engine.start()
        await engine.load("base", None)
        yield engine, servers, home


class TestRouted(EngineContract):
    @pytest_asyncio.fixture(loop_scope="module")
    async def bench(self, folders, cluster):  # noqa: F811
        engine, _, home = cluster
        await engine.load("vx", home / "vx")
        tokenizer = tiny_tokenizer()
        yield Bench(engine, tokenizer, tokenizer.encode, folders[1], home / "vx", median=1e-4, mean=1e-4)
        await engine.unload("vx")


async def test_it_spreads_generation_and_versions_go_to_every_worker(cluster):
    engine, servers, home = cluster
    before = [server.generated for server in servers]
    await engine.load("vx", home / "vx")
    assert all(server.adapters == {"vx": str(home / "vx")} for server in servers)
    for _ in range(4):
        assert (await collect(engine, ask("vx")))[0]
    assert all(server.generated > count + 6 for server, count in zip(servers, before, strict=True))
    await engine.unload("vx")
    assert not any(server.adapters for server in servers)
    await engine.unload("base")
    await engine.swap("w1", home / "other")
    assert {server.weight_version for server in servers} == {"w1"}
    assert {server.path for server in servers} == {str(home / "other")}
    said = [await collect(engine, ask("w1", max_tokens=12)) for _ in range(4)]
    assert all(one == said[0] for one in said), "whichever worker"
    await engine.swap(None, None)
    assert {server.weight_version for server in servers} == {"default"}
    await engine.load("base", None)


async def test_a_closed_stream_stops_the_worker_that_the_router_chose(cluster):
    engine, servers, _ = cluster
    stream = engine.generate(GenerateRequest([70, 71], "base", Sampling(1.0, max_tokens=400)))
    await anext(stream)
    await stream.aclose()
    await until(lambda: not any(server.running for server in servers))


async def test_a_version_that_one_worker_lacks_isnt_loaded(cluster):
    engine, servers, home = cluster
    servers[1].adapters["vx"] = "/another/path"
    with pytest.raises(EngineError, match=f"vx.*{engine.workers[1].url}"):
        await engine.load("vx", home / "vx")
    assert engine.loaded() == ["base"]
    assert "vx" not in servers[0].adapters
    servers[1].adapters.clear()


async def test_a_worker_without_answer_is_left_out_by_the_router(cluster):
    engine, servers, _ = cluster
    servers[0].silent = True
    async with asyncio.timeout(240):
        answered = 0
        while answered < 2:
            with contextlib.suppress(EngineError):
                answered += bool((await collect(engine, ask()))[0])
    servers[0].silent = False
