"""SGLang itself, on a CPU: the contract, supervision, weights, and that the recorded server answers as it does.

`make test-sglang` makes the environment and runs this; it takes some minutes.
"""

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import aclosing
from pathlib import Path

import httpx
import pytest
import pytest_asyncio
from safetensors.torch import load_file, save_file

from app.engines import opener
from app.settings import Settings
from feedback_store import Store
from online_rl.adapters import fresh_adapter, load_adapter, save_adapter, save_version
from online_rl.loop import RunOptions, run_once
from online_rl.recipe import make_recipe
from serving.engines.base import EngineError, GenerateRequest, Sampling
from serving.engines.http_worker import Patience
from serving.engines.sglang import SGLangEngine
from serving.engines.sglang_server import SGLangConfig
from serving.engines.sglang_weights import swap_weights
from serving.engines.supervised import running_server
from serving.manifest import copy_version
from serving.versions import SHIPPED
from tests.alike import events, shape, within
from tests.engine_contract import Bench, EngineContract, collect
from tests.recorded_server import served
from tests.sglang_contract import RecordedSGLang
from tests.sglang_router import has_router, running_router
from tests.test_sglang_server import group
from tests.tiny_model import save_tiny_model
from tests.tiny_world import make_base, sums
from tools.python import PythonTool
from tools.search import SearchOptions, open_search
from tools.toolbox import Toolbox

PYTHON = os.environ.get("WHETSTONE_SGLANG_PYTHON", "")
pytestmark = [
    pytest.mark.sglang,
    pytest.mark.skipif(not PYTHON, reason="WHETSTONE_SGLANG_PYTHON names no interpreter with SGLang"),
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(900),
]
FLAGS = ("--device", "cpu", "--dtype", "bfloat16", "--disable-overlap-schedule", "--mem-fraction-static", "0.3",
         "--max-total-tokens", "4096", "--lora-backend", "torch_native")  # fmt: skip
# One thread: on a busy machine several wait for each other, and a token takes seconds.
ENV = {"SGLANG_USE_CPU_ENGINE": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def config(base, folder, **options):
    flags = options.pop("flags", ())
    return SGLangConfig(
        str(base.hf_dir), folder / "sglang.log", python=PYTHON, context=512, max_loras=3, flags=(*FLAGS, *flags),
        env=ENV, start_seconds=600, **options,
    )  # fmt: skip


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(base, tmp_path_factory):
    async with running_server(config(base, tmp_path_factory.mktemp("sglang"))) as server:
        yield server


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def bench(base, server, tmp_path_factory):
    folder = tmp_path_factory.mktemp("versions") / "vx"
    copy_version(SHIPPED / "v0", folder)
    engine = SGLangEngine([server.url], server.key, patience=Patience(look=2))
    await engine.start()
    await engine.load("base", None)
    await engine.load("vx", folder)

    def prompt(text):
        return base.tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
        )

    models = {"base": base.load("float32").eval(), "vx": load_adapter(base, folder, "float32").eval()}
    # bfloat16 there, float32 here; drawn by no seed, since deterministic inference wants a GPU
    yield Bench(engine, base.tokenizer, prompt, models, folder, median=0.1, mean=0.2, seeded=False)
    await engine.close()


class TestReal(EngineContract):
    pass


OWN = "a path that each server has its own of"


def with_own(body, own, side):
    return body and {key: own[key][side] if value == OWN else value for key, value in body.items()}


async def test_the_recorded_server_answers_alike(bench, base, server, tmp_path):
    """Status, keys, types and the order of events, over everything that the engine asks."""
    recorded = RecordedSGLang(save_tiny_model(tmp_path / "tiny"), key=server.key, incremental=True, seeded=False)
    headers = {"Authorization": f"Bearer {server.key}"}
    generation = {"input_ids": [5, 6, 7], "return_logprob": True}
    sampling = {"max_new_tokens": 3, "temperature": 0.7, "ignore_eos": True}
    asked = [
        ("GET", "/health", None),
        ("POST", "/generate", generation | {"sampling_params": sampling, "stream": True}),
        ("POST", "/generate", generation | {"sampling_params": sampling, "token_ids_logprob": [3, 5]}),
        ("POST", "/generate", generation | {"sampling_params": sampling, "stream": True, "lora_path": "never"}),
        ("POST", "/generate", generation | {"sampling_params": sampling, "lora_path": "never"}),
        ("POST", "/generate", {"input_ids": [], "sampling_params": sampling, "stream": True}),
        (
            "POST",
            "/generate",
            generation
            | {
                "stream": True,
                "top_logprobs_num": 2,
                "sampling_params": {
                    "max_new_tokens": 9,
                    "temperature": 0.0,
                    "top_p": 1.0,
                    "top_k": -1,
                    "min_p": 0.0,
                    "stop": [],
                    "skip_special_tokens": False,
                    "sampling_seed": 1,
                    "json_schema": '{"enum": ["a"]}',
                },
            },
        ),
        ("POST", "/generate", {"input_ids": [5] * 9000, "sampling_params": sampling, "stream": True}),
        ("POST", "/generate", generation | {"sampling_params": sampling | {"temperature": -1}, "stream": True}),
        ("POST", "/load_lora_adapter", {"lora_name": "gone", "lora_path": str(tmp_path / "gone")}),
        ("POST", "/unload_lora_adapter", {"lora_name": "gone"}),
        ("POST", "/abort_request", {"rid": "gone"}),
        ("POST", "/pause_generation", {"mode": "retract"}),
        ("POST", "/update_weights_from_disk", {"model_path": str(tmp_path / "gone"), "weight_version": "w"}),
        ("POST", "/update_weights_from_disk", {"model_path": OWN, "weight_version": "default", "flush_cache": True}),
        ("POST", "/continue_generation", {}),
    ]
    own = {"model_path": (recorded.first_path, str(base.hf_dir))}
    with served(recorded.app()) as url:
        async with (
            httpx.AsyncClient(base_url=url, headers=headers, timeout=120) as there,
            httpx.AsyncClient(base_url=server.url, headers=headers, timeout=120) as real,
        ):
            for method, route, body in asked:
                ours, theirs = [
                    await client.request(method, route, json=with_own(body, own, side))
                    for side, client in enumerate((there, real))
                ]
                assert ours.status_code == theirs.status_code, (route, body, theirs.text)
                if body and body.get("stream"):
                    lines = [[json.loads(e[6:]) if e[6:] != "[DONE]" else None for e in events(r.text)]
                             for r in (ours, theirs)]  # fmt: skip
                    assert within(*[[shape(e) for e in told] for told in lines]), (route, body, lines)
                elif theirs.text and route != "/unload_lora_adapter":
                    assert within(shape(ours.json()), shape(theirs.json())), (route, body, theirs.text)
            for route in ("/model_info", "/server_info", "/v1/models"):
                ours, theirs = [shape((await client.get(route)).json()) for client in (there, real)]
                assert {key: theirs.get(key) for key in ours} == ours, route
            async with httpx.AsyncClient() as stranger:
                for where in (url, server.url):
                    assert (await stranger.post(f"{where}/abort_request", json={"rid": "x"})).status_code == 401


async def test_a_closed_stream_stops_the_server_s_work(bench, server):
    request = GenerateRequest(bench.prompt("Count to one thousand."), "base", Sampling(1.0, max_tokens=400))
    async with aclosing(bench.engine.generate(request)) as stream:
        async for _ in stream:
            break
    headers = {"Authorization": f"Bearer {server.key}"}
    async with httpx.AsyncClient(base_url=server.url, headers=headers, timeout=60) as client, asyncio.timeout(60):
        running = ["?"]
        while not running or any(not line.endswith(" 0.0") for line in running):
            await asyncio.sleep(0.5)
            told = (await client.get("/metrics/")).text
            running = [line for line in told.splitlines() if line.startswith("sglang:num_running_reqs{")]


async def test_weights_change_under_an_answer_and_back(bench, base, server, tmp_path):
    engine = bench.engine
    await engine.unload("vx")
    other, broken = tmp_path / "other", tmp_path / "broken"
    for folder in (other, broken):
        shutil.copytree(base.hf_dir, folder)
    weights = load_file(other / "model.safetensors")
    for name in weights:
        if name.endswith("down_proj.weight"):
            weights[name] *= 0.9
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    with (broken / "model.safetensors").open("r+b") as file:
        file.truncate(1_000_000)
    request = GenerateRequest(bench.prompt("What is a river?"), "base", Sampling(0.0, max_tokens=40))
    stream = engine.generate(request)
    versions = [(await anext(stream)).version]
    await swap_weights(engine, "w1", other)
    versions += [chunk.version async for chunk in stream]
    assert versions[0] == "base"
    assert versions[-1] == "w1"
    assert engine.loaded() == ["w1"]
    with pytest.raises(EngineError, match="no whole weights"):  # this one would have ended the server
        await swap_weights(engine, "w2", broken)
    with pytest.raises(EngineError, match="logprobs"):
        await swap_weights(engine, "w2", base.hf_dir, expected=[0.0, 0.0, 0.0, 0.0])
    again = SGLangEngine([server.url], server.key)
    await again.start({"w1"})  # as a Whetstone that was started anew would
    assert again.weights == "w1"
    assert again.described.model_path == str(base.hf_dir), "the model's own, not what is in place"
    await again.close()
    probe = await engine.workers[0].probe()
    await swap_weights(engine, "w3", base.hf_dir)
    assert max(abs(a - b) for a, b in zip(probe, await engine.workers[0].probe(), strict=True)) > 0.05
    new, _, _ = await collect(engine, GenerateRequest(bench.prompt("Hi"), "w3", Sampling(0.0, max_tokens=3)))
    assert new
    await engine.swap(None, None)
    assert (engine.weights, engine.loaded()) == (None, [])
    described = await engine.workers[0].describe()
    assert (described.weight_version, described.model_path) == ("default", str(base.hf_dir))
    await engine.load("vx", bench.adapter)
    assert (await collect(engine, GenerateRequest(bench.prompt("Hi"), "vx", Sampling(0.0, max_tokens=3))))[0]
    await engine.load("base", None)


@pytest.mark.skipif(not has_router(), reason="sglang-router isn't installed beside SGLang")
async def test_it_answers_through_the_router(bench, server, tmp_path):
    async with running_router([server.url], server.key, tmp_path / "router.log") as url:
        engine = SGLangEngine([server.url], server.key, url, Patience(look=2))
        await engine.start()
        await engine.load("routed", bench.adapter)
        request = GenerateRequest(bench.prompt("What is a river?"), "routed", Sampling(0.0, max_tokens=5))
        assert (await collect(engine, request))[0]
        await engine.unload("routed")
        await engine.close()


async def test_a_run_samples_trains_and_compares_on_sglang(tmp_path):
    """Two steps of a policy that is half right: the settings start a server, each step's adapter is loaded on it."""
    tiny = await asyncio.to_thread(make_base, tmp_path / "tiny")
    v0 = tmp_path / "versions" / "v0"
    fresh = fresh_adapter(tiny, 8, 16, "float32")
    manifest = save_version(lambda work: save_adapter(fresh, work), v0, tiny, parent=None)
    settings = Settings(
        home=tmp_path, engine="sglang", engine_model=str(tiny.hf_dir), sglang_python=Path(PYTHON),
        sglang_flags=[*FLAGS, "--max-running-requests", "16"], sglang_env=ENV, sglang_lora_rank=8,
    )  # fmt: skip
    recipe = make_recipe({
        "group_size": 4, "groups_per_step": 2, "max_rounds": 4, "max_steps": 2, "concurrency": 8, "max_turns": 2,
        "max_response_tokens": 64, "overlong_buffer": 8, "max_observation_tokens": 32, "bf16": False, "save_steps": 2,
    })  # fmt: skip
    tasks = sums()
    options = RunOptions(recipe, tasks[60:66], tasks[:60], evaluation=Sampling(0.7, 0.95, 64, seed=1))
    with Store.open(tmp_path / "whetstone.db") as store:
        store.add_version("v0", None, str(v0), manifest.model_dump(), "published")
        store.set_current("v0", "test")
        opening = opener(settings, store, lambda _: None, "training")
        tools = Toolbox([PythonTool(), open_search(tmp_path, SearchOptions())])  # the policy knows the rules for both
        result = await asyncio.to_thread(run_once, tmp_path, store, opening, tools, options)
        assert result.status in ("promoted", "refused"), result.reasons
        assert [version.id for version in store.versions()] == ["v0", "v1"]
    rows = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["version"].partition("-step")[2] for row in rows] == ["0", "1"]
    assert all(0 < row["mismatch"] < 0.3 for row in rows), "bfloat16 there, float32 here; but the same weights"
    assert result.report["gate"]["rows"][0]["n"] == 6
    log = (tmp_path / "logs" / "sglang-training.log").read_text()
    assert log.count("POST /load_lora_adapter") == log.count("POST /unload_lora_adapter") == 4


async def test_a_crashed_server_is_started_again_with_its_adapters(bench, server):
    engine = SGLangEngine([server.url], server.key, patience=Patience(look=2))
    await engine.start()
    await engine.load("vx", bench.adapter)
    request = GenerateRequest(bench.prompt("What is a river?"), "vx", Sampling(0.0, max_tokens=5))
    before = await collect(engine, request)
    gone = server.process
    os.killpg(gone.pid, signal.SIGKILL)
    await gone.wait()
    with pytest.raises(EngineError):
        await collect(engine, request)
    async with asyncio.timeout(600):
        while not (await engine.health())["ok"]:  # noqa: ASYNC110 - of another process
            await asyncio.sleep(1)
    assert server.starts == 2
    assert (await collect(engine, request))[0] == before[0]
    await engine.close()


async def test_a_killed_whetstone_leaves_no_server_behind(base, tmp_path):
    await asyncio.to_thread(_kill_an_owner, base, tmp_path)


def _kill_an_owner(base, tmp_path):
    program = """
import asyncio, sys
from pathlib import Path
from serving.engines.sglang_server import SGLangConfig
from serving.engines.supervised import SupervisedServer
async def main():
    config = SGLangConfig(sys.argv[1], Path(sys.argv[2]), python=sys.argv[3], flags=tuple(sys.argv[4:]))
    server = SupervisedServer(config)
    await server._spawn()
    print(server.process.pid, flush=True)
    await asyncio.sleep(600)
asyncio.run(main())
"""
    argv = [sys.executable, "-c", program, str(base.hf_dir), str(tmp_path / "log"), PYTHON, *FLAGS]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, env=os.environ | ENV) as owner:
        pid = int(owner.stdout.readline())
        end = time.monotonic() + 300
        while len(group(pid)) < 4 and time.monotonic() < end:  # its own scheduler and detokenizer too
            time.sleep(0.5)
        assert len(group(pid)) >= 4
        owner.kill()
    end = time.monotonic() + 60
    while group(pid) and time.monotonic() < end:
        time.sleep(0.2)
    assert not group(pid)
