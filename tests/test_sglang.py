"""SGLang behind the seam, against a small server that answers as SGLang does: the contract, replicas, weights."""

import asyncio
import contextlib
import itertools
import json
import os
import shutil
from dataclasses import replace

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from app.cli import app
from app.runtime import running_service
from app.service import Finished, Question
from app.settings import Settings, SettingsError, load
from feedback_store import Store
from serving.engines.base import EngineError, GenerateRequest, GrammarFailed, PromptTooLong, Sampling
from serving.engines.sglang import SGLangEngine
from serving.engines.sglang_weights import swap_weights
from serving.fresh import install_fresh
from serving.model import folder_model
from tests.engine_contract import Bench, EngineContract, collect
from tests.recorded_server import served, tiny_versions
from tests.replica_contract import PATIENCE, ReplicaContract, ask, clusters, until
from tests.sglang_contract import RecordedSGLang
from tests.tiny_model import tiny_tokenizer


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    home = tmp_path_factory.mktemp("tiny")
    return home, tiny_versions(home)


@pytest.fixture
def home(folders):
    return folders[0]


@pytest.fixture
async def cluster(home):
    async with clusters(home / "base", RecordedSGLang, SGLangEngine) as start:
        yield start


class TestReplicas(ReplicaContract):
    pass


class TestRecorded(EngineContract):
    @pytest.fixture
    async def bench(self, folders, cluster):
        engine, _ = await cluster(incremental=True)
        home, models = folders
        await engine.load("vx", home / "vx")
        tokenizer = tiny_tokenizer()
        return Bench(engine, tokenizer, tokenizer.encode, models, home / "vx", median=1e-4, mean=1e-4)


async def test_events_with_all_tokens_so_far_say_the_same_as_those_with_the_new_ones(cluster):
    alone, together = [await cluster(incremental=incremental) for incremental in (True, False)]
    request = ask(temperature=1.0, seed=3, max_tokens=12)
    assert await collect(alone[0], request) == await collect(together[0], request)


async def test_a_closed_stream_is_aborted_on_the_server(cluster):
    engine, [server] = await cluster()
    async for _ in engine.generate(ask(max_tokens=400)):
        break
    await until(lambda: server.aborted and not server.running)
    assert server.generated < 400


async def test_a_cancelled_task_is_aborted_too(cluster):
    engine, [server] = await cluster()
    task = asyncio.create_task(collect(engine, ask(max_tokens=400, temperature=1.0)))
    await until(lambda: server.running)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until(lambda: server.aborted and not server.running)


async def test_a_server_whose_logprobs_follow_temperature_is_refused(cluster):
    with pytest.raises(EngineError, match="SGLANG_RETURN_ORIGINAL_LOGPROB"):
        await cluster(original_logprobs=False)


async def test_what_would_kill_a_server_never_reaches_it(cluster, home, tmp_path):
    engine, [server] = await cluster(max_lora_rank=8)
    with pytest.raises(EngineError, match="vocabulary"):
        await collect(engine, GenerateRequest([5, 10_000], "base"))
    foreign = tmp_path / "foreign"
    shutil.copytree(home / "vx", foreign)
    weights = load_file(foreign / "adapter_model.safetensors")
    save_file({k: v[:, :8].contiguous() for k, v in weights.items()}, foreign / "adapter_model.safetensors")
    with pytest.raises(EngineError, match="another base"):
        await engine.load("foreign", foreign)
    config = json.loads((home / "vx" / "adapter_config.json").read_text())
    for change, told in (({"r": 64}, "max-lora-rank"), ({"target_modules": ["lm_head"]}, "lora-target-modules")):
        (foreign / "adapter_config.json").write_text(json.dumps(config | change))
        with pytest.raises(EngineError, match=told):
            await engine.load("foreign", foreign)
    assert not server.adapters


async def test_behind_a_router_a_version_is_on_all_workers_or_not_loaded(cluster, home):
    _, servers = await cluster(2)
    router = RecordedSGLang(home / "base")
    router.adapters["vx"] = str(home / "vx")
    router._load(router.first_path)
    with contextlib.ExitStack() as stack:
        urls = [stack.enter_context(served(server.app())) for server in servers]
        engine = SGLangEngine(urls, "secret", stack.enter_context(served(router.app())), PATIENCE)
        await engine.start()
        await engine.load("vx", home / "vx")
        before = [server.generated for server in servers]
        assert (await collect(engine, ask("vx")))[0]
        assert router.generated
        assert (await engine.health())["router"]["problem"] is None
        assert [server.generated for server in servers] == before
        servers[1].adapters["vy"] = "/another/path"
        with pytest.raises(EngineError, match=f"vy.*{urls[1]}"):
            await engine.load("vy", home / "vx")
        assert "vy" not in servers[0].adapters
        assert "vy" not in engine.loaded()
        await engine.close()


async def test_weights_change_under_an_answer_that_goes_on(cluster, home):
    engine, servers = await cluster(2)
    before = await collect(engine, ask(max_tokens=20))
    stream = engine.generate(ask(max_tokens=120, temperature=1.0))
    versions = [(await anext(stream)).version]
    await swap_weights(engine, "w1", home / "other")
    versions += [chunk.version async for chunk in stream]
    assert versions[0] == "base"
    assert versions == sorted(versions)  # never back
    assert versions[-1] == "w1" or len(versions) < 10  # it may have ended before
    assert engine.loaded() == ["w1"]
    assert {server.weight_version for server in servers} == {"w1"}
    after = await collect(engine, ask("w1", max_tokens=20))
    assert after[0] != before[0]
    async for chunk in engine.generate(ask("base")):  # an answer of several steps asks on by the old name
        assert chunk.version == "w1"
    with pytest.raises(EngineError, match="replaced"):
        await engine.load("bare", None)
    await swap_weights(engine, "w2", home / "base")
    assert await collect(engine, ask("w2", max_tokens=20)) == before


async def test_a_failed_swap_leaves_the_old_weights_and_names_the_worker(cluster, home, tmp_path):
    engine, servers = await cluster(2)
    before = await collect(engine, ask(max_tokens=20))
    servers[1].refuse_updates = True
    with pytest.raises(EngineError, match=f"{engine.workers[1].url}.*no space"):
        await swap_weights(engine, "w1", home / "other")
    servers[1].refuse_updates = False
    with pytest.raises(EngineError, match="logprobs"):
        await swap_weights(engine, "w1", home / "other", expected=[0.0, 0.0, 0.0, 0.0])
    assert engine.loaded() == ["base"]
    assert {server.weight_version for server in servers} == {"default"}
    for worker, server in zip(engine.workers, servers, strict=True):
        assert not worker.problem
        assert server.path == str(home / "base")
    assert await collect(engine, ask(max_tokens=20)) == before


async def test_weights_that_are_broken_foreign_or_under_adapters_are_refused(cluster, home, tmp_path):
    engine, [server] = await cluster()
    broken = tmp_path / "broken"
    shutil.copytree(home / "other", broken)
    file = broken / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(EngineError, match="no whole weights"):
        await swap_weights(engine, "w1", broken)
    save_file({"model.embed_tokens.weight": torch.zeros(3, 3)}, file)
    with pytest.raises(EngineError, match="no version of"):
        await swap_weights(engine, "w1", broken)
    await engine.load("vx", home / "vx")
    with pytest.raises(EngineError, match="unload them first"):
        await swap_weights(engine, "w1", home / "other")
    assert server.weight_version == "default"


async def test_a_worker_that_lost_swapped_weights_is_caught_and_given_them(cluster, home):
    engine, [server] = await cluster()
    await swap_weights(engine, "w1", home / "other")
    server._load(server.first_path)
    server.weight_version = "default"
    with pytest.raises(EngineError, match="'default', not 'w1'"):
        await collect(engine, ask("w1"))
    await until(lambda: not engine.workers[0].problem)
    assert server.weight_version == "w1"
    assert (await collect(engine, ask("w1")))[0]


async def test_a_server_that_was_left_paused_is_told_to_go_on(home):
    """By a Whetstone that was killed in mid-swap, before this one starts and under it."""
    patience = replace(PATIENCE, silence=2)
    server = RecordedSGLang(home / "base")
    with served(server.app()) as url:
        async with httpx.AsyncClient(base_url=url, headers={"Authorization": "Bearer secret"}) as admin:
            (await admin.post("/pause_generation", json={})).raise_for_status()
            engine = SGLangEngine([url], "secret", patience=patience)
            await engine.start()
            await engine.load("base", None)
            assert (await collect(engine, ask()))[0]
            (await admin.post("/pause_generation", json={})).raise_for_status()
            with pytest.raises(EngineError, match="said nothing"):
                await collect(engine, ask())
            await until(lambda: not engine.workers[0].problem)
            assert (await collect(engine, ask()))[0]
            await engine.close()


async def test_a_stop_string_may_hold_a_line_break_that_only_unicode_has(cluster):
    """U+2028 stands as it is in the events: split there, they would be no JSON."""
    engine, [server] = await cluster()
    drawn = itertools.chain(tiny_tokenizer().encode("a\u2028b"), itertools.repeat(2))
    server._draw = lambda *_: next(drawn)
    ids, _, reason = await collect(engine, ask())
    assert tiny_tokenizer().decode(ids[:-1]) == "a\u2028b"
    assert reason == "eos"


async def test_a_server_without_grammars_refuses_a_schema_as_one(cluster):
    engine, _ = await cluster(grammars=False)
    with pytest.raises(GrammarFailed, match="json_schema"):
        await collect(engine, replace(ask(), json_schema={"type": "integer"}))


async def test_the_servers_own_limit_is_a_prompt_too_long(cluster):
    engine, [server] = await cluster()
    server._problem = lambda _: "The input (9 tokens) is longer than the model's context length (8 tokens)."
    with pytest.raises(PromptTooLong, match="Shorten"):
        await collect(engine, ask())


async def test_the_settings_attach_it_and_a_model_without_versions_gets_its_first(home, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(home / "base", model)
    config = json.loads((model / "config.json").read_text()) | {"max_position_embeddings": 8192}
    (model / "config.json").write_text(json.dumps(config))
    server = RecordedSGLang(model)
    with served(server.app()) as url:
        settings = Settings(
            home=tmp_path / "home", engine="sglang", engine_urls=[url], engine_admin_key="secret", python_pool=0,
            search_backends=["local"], max_tokens=16, max_turns=0,
        )  # fmt: skip
        async with running_service(settings) as service:
            version = service.router.current
            assert version.startswith("base-")
            assert set(server.adapters) == {version}
            question = Question("key-a", [{"role": "user", "content": "Hi"}], Sampling(1.0, max_tokens=8, seed=1))
            async for event in service.answer(question):
                last = event
            assert isinstance(last, Finished)
            assert last.trajectory.steps[0].version == version
            bare = server.logits([70, 71], None)
            assert torch.allclose(server.logits([70, 71], version), bare)  # a fresh adapter changes nothing yet
        assert (await httpx.AsyncClient().get(f"{url}/health")).status_code == 200  # it is somebody else's server


def test_an_evaluation_is_made_on_the_servers_beside_what_serves_there(home, tmp_path, monkeypatch):
    model = tmp_path / "model"
    shutil.copytree(home / "base", model)
    config = json.loads((model / "config.json").read_text()) | {"max_position_embeddings": 4096}
    (model / "config.json").write_text(json.dumps(config))
    base = folder_model(model)
    with Store.open(tmp_path / "home" / "whetstone.db") as store:
        install_fresh(store, tmp_path / "home", base, 8)
        version = store.current_version()
        folder = store.version(version).path
    server = RecordedSGLang(model, adapters={version: folder})  # as another process has loaded it, which serves
    drawn, draw = [], server._draw

    def few(*of):  # then the end of the turn
        drawn.append(draw(*of))
        return drawn[-1] if len(drawn) % 12 else 2

    server._draw = few
    with served(server.app()) as url:
        chosen = {"HOME": tmp_path / "home", "ENGINE": "sglang", "ENGINE_URLS": url, "ENGINE_ADMIN_KEY": "secret"}
        for name, value in (chosen | {"TRAINING_TOOLS": "code", "MAX_TURNS": 0}).items():
            monkeypatch.setenv(f"WHETSTONE_{name}", str(value))
        result = CliRunner().invoke(app, ["eval", "--items", "2", "--set", "arithmetic", "--no-tools-off", "--json"])
    assert result.exit_code == 0, result.output
    assert [measured["version"] for measured in json.loads(result.stdout)["results"]] == [version]
    assert len(drawn) == 24
    assert server.loads == [f"eval-{os.getpid()}-{version}"]
    assert server.adapters == {version: folder}, "what serves is still there"


def test_settings_of_an_engine_fit_together():
    for wrong, told in (
        ({"engine_urls": "http://a"}, "WHETSTONE_ENGINE"),
        ({"engine": "sglang", "engine_router_url": "http://a"}, "engine_urls"),
        ({"engine": "sglang", "engine_urls": "a:30000"}, "http://"),
        ({"engine": "tgi"}, "embedded"),
        ({"engine": "vllm", "engine_router_url": "http://a"}, "engine_urls"),
    ):
        with pytest.raises(SettingsError, match=told):
            load(**wrong)
