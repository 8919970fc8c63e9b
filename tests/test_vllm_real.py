"""vLLM itself, on a CPU: the contract, schemas, supervision, and that the recorded server answers as it does.

`make test-vllm` makes the environment and runs this; it takes some minutes.
"""

import asyncio
import json
import os
import shutil
import signal
from contextlib import aclosing

import httpx
import pytest
import pytest_asyncio
import torch
from safetensors.torch import load_file, save_file

from online_rl.adapters import load_adapter
from serving.engines.base import EngineError, GenerateRequest, GrammarFailed, Sampling
from serving.engines.http_worker import Patience
from serving.engines.supervised import running_server
from serving.engines.vllm import VLLMEngine
from serving.engines.vllm_server import VLLMConfig
from serving.manifest import copy_version
from serving.versions import SHIPPED
from tests.alike import events, shape, within
from tests.engine_contract import Bench, EngineContract, collect
from tests.recorded_server import served
from tests.test_sglang_server import group
from tests.tiny_model import save_tiny_model
from tests.vllm_contract import RecordedVLLM

PYTHON = os.environ.get("WHETSTONE_VLLM_PYTHON", "")
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(not PYTHON, reason="WHETSTONE_VLLM_PYTHON names no interpreter with vLLM"),
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(900),
]
# Compiled, bfloat16 gave wrong text on a CPU.
FLAGS = ("--dtype", "float32", "--enforce-eager", "--max-num-seqs", "16")
ENV = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(base, tmp_path_factory):
    log = tmp_path_factory.mktemp("vllm") / "vllm.log"
    config = VLLMConfig(str(base.hf_dir), log, PYTHON, context=512, flags=FLAGS, env=ENV, start_seconds=600)
    async with running_server(config) as server:
        yield server


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def bench(base, server, tmp_path_factory):
    folder = tmp_path_factory.mktemp("versions") / "vx"
    copy_version(SHIPPED / "v0", folder)
    engine = VLLMEngine([server.url], server.key, patience=Patience(look=2))
    await engine.start()
    await engine.load("base", None)
    await engine.load("vx", folder)

    def prompt(text):
        return base.tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
        )

    torch.set_num_threads(1)  # on a busy machine several wait for each other
    models = {"base": base.load("float32").eval(), "vx": load_adapter(base, folder, "float32").eval()}
    yield Bench(engine, base.tokenizer, prompt, models, folder, median=1e-3, mean=1e-2)
    await engine.close()


class TestReal(EngineContract):
    pass


async def test_a_schema_that_is_none_is_refused(bench):
    ids = bench.prompt("A colour and a count, as JSON:")
    with pytest.raises(GrammarFailed, match="nonsense"):
        await collect(bench.engine, GenerateRequest(ids, "base", json_schema={"type": "nonsense"}))


async def test_the_recorded_server_answers_alike(bench, base, server, tmp_path):
    """Status, keys, types and the order of events, over everything that the engine asks."""
    recorded = RecordedVLLM(save_tiny_model(tmp_path / "tiny"), key=server.key)
    broken = tmp_path / "broken"
    shutil.copytree(bench.adapter, broken)
    with (broken / "adapter_model.safetensors").open("r+b") as file:
        file.truncate(1000)
    here = {"prompt": [5, 6, 7], "max_tokens": 3, "temperature": 0.0, "logprobs": 0, "seed": 3, "ignore_eos": True,
            "return_token_ids": True, "return_tokens_as_token_ids": True}  # fmt: skip
    streamed = here | {"stream": True}
    asked = [
        ("/v1/completions", streamed),
        ("/v1/completions", streamed | {"logprobs": 4, "temperature": 0.7}),
        ("/v1/completions", here | {"max_tokens": 1, "logprob_token_ids": [3, 5, 7, 11]}),
        ("/v1/completions", streamed | {"model": "never"}),
        ("/v1/completions", streamed | {"prompt": []}),
        ("/v1/completions", streamed | {"prompt": [5] * 9000}),
        ("/v1/completions", streamed | {"prompt": [5, 60_000]}),
        ("/v1/completions", streamed | {"temperature": -1.0}),
        ("/v1/completions", streamed | {"logprobs": 50}),
        ("/v1/completions", streamed | {"stop": ["a"] * 40}),
        ("/v1/completions", streamed | {"structured_outputs": {"json": {"type": "nonsense"}}}),
        ("/v1/load_lora_adapter", {"lora_name": "gone", "lora_path": str(tmp_path / "gone")}),
        ("/v1/load_lora_adapter", {"lora_name": "broken", "lora_path": str(broken)}),
        ("/v1/unload_lora_adapter", {"lora_name": "gone"}),
    ]
    with served(recorded.app()) as url:
        headers = {"Authorization": f"Bearer {server.key}"}
        async with (
            httpx.AsyncClient(base_url=url, headers=headers, timeout=120) as there,
            httpx.AsyncClient(base_url=server.url, headers=headers, timeout=120) as real,
        ):
            models = [recorded.first_path, str(base.hf_dir)]
            for route, body in asked:
                ours, theirs = [
                    await client.post(route, json={"model": model} | body if "prompt" in body else body)
                    for client, model in zip((there, real), models, strict=True)
                ]
                assert ours.status_code == theirs.status_code, (route, body, theirs.text)
                if "event-stream" in theirs.headers["content-type"]:
                    lines = [[json.loads(e[6:]) if e[6:] != "[DONE]" else None for e in events(r.text)]
                             for r in (ours, theirs)]  # fmt: skip
                    if "error" in lines[1][0]:
                        assert within(*map(shape, lines)), (route, body, lines)
                    else:  # the real one may tell several tokens in an event
                        assert all(within(*[shape(told[at]) for told in lines]) for at in (0, -2)), (body, lines)
                else:
                    assert within(shape(ours.json()), shape(theirs.json())), (route, body, theirs.text)
            ours, theirs = [shape((await client.get("/v1/models")).json()) for client in (there, real)]
            assert within(ours, theirs)
            assert (await there.get("/health")).status_code == (await real.get("/health")).status_code == 200
            assert (await there.post("/none")).json() == (await real.post("/none")).json()
            async with httpx.AsyncClient() as stranger:
                for where in (url, server.url):
                    assert (await stranger.get(f"{where}/v1/models")).status_code == 401


async def test_adapters_come_and_go_and_foreign_ones_stay_out(bench, tmp_path):
    worker = bench.engine.workers[0]
    await bench.engine.load("vy", bench.adapter)
    assert (await worker.adapters())["vy"] == str(bench.adapter)
    request = GenerateRequest(bench.prompt("What is a river?"), "vy", Sampling(0.0, max_tokens=8))
    as_vx = GenerateRequest(request.token_ids, "vx", request.sampling)
    assert (await collect(bench.engine, request))[0] == (await collect(bench.engine, as_vx))[0]
    await bench.engine.unload("vy")
    assert "vy" not in await worker.adapters()
    foreign = tmp_path / "foreign"
    shutil.copytree(bench.adapter, foreign)
    weights = load_file(foreign / "adapter_model.safetensors")
    save_file({k: v[:, :8].contiguous() for k, v in weights.items()}, foreign / "adapter_model.safetensors")
    await worker.load_adapter("foreign", str(foreign))  # vLLM itself takes it, and would answer with it
    await worker.unload_adapter("foreign")
    with pytest.raises(EngineError, match="another base"):
        await bench.engine.load("foreign", foreign)


async def test_a_closed_stream_stops_the_servers_work(bench, server):
    request = GenerateRequest(bench.prompt("Count to one thousand."), "base", Sampling(1.0, max_tokens=400))
    async with httpx.AsyncClient(base_url=server.url, timeout=60) as client, asyncio.timeout(60):

        async def told(metric):
            lines = (await client.get("/metrics")).text.splitlines()
            [value] = [line.split()[-1] for line in lines if line.startswith(f"vllm:{metric}{{")]
            return float(value)

        before = await told("generation_tokens_total")
        async with aclosing(bench.engine.generate(request)) as stream:
            async for _ in stream:
                break
        await asyncio.sleep(0.5)
        while await told("num_requests_running"):  # noqa: ASYNC110 - of another process
            await asyncio.sleep(0.5)
        assert await told("generation_tokens_total") - before < 200


async def test_a_crashed_server_is_started_again_with_its_adapters(bench, server):
    request = GenerateRequest(bench.prompt("What is a river?"), "vx", Sampling(0.0, max_tokens=5))
    before = await collect(bench.engine, request)
    gone = server.process
    os.killpg(gone.pid, signal.SIGKILL)
    await gone.wait()
    with pytest.raises(EngineError):
        await collect(bench.engine, request)
    async with asyncio.timeout(600):
        while not (await bench.engine.health())["ok"]:  # noqa: ASYNC110 - of another process
            await asyncio.sleep(1)
    assert server.starts == 2
    assert not group(gone.pid)
    assert (await collect(bench.engine, request))[0] == before[0]
