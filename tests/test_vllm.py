"""vLLM behind the seam, against a small server that answers as vLLM does: the contract, adapters, failures."""

import asyncio
import json
import shutil
import sys

import pytest
from safetensors.torch import load_file, save_file

from app.commands.doctor import check_engine
from app.engines import server_config
from app.runtime import running_service
from app.service import Finished, Question
from app.settings import Settings
from serving.engines.base import EngineError, GenerateRequest, GrammarFailed, PromptTooLong, Sampling
from serving.engines.vllm import VLLMEngine
from tests.engine_contract import Bench, EngineContract, collect
from tests.recorded_server import served, tiny_versions
from tests.replica_contract import ReplicaContract, ask, clusters, until
from tests.tiny_model import tiny_tokenizer
from tests.vllm_contract import RecordedVLLM

SCHEMA = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "green"]}, "count": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["colour", "count"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    home = tmp_path_factory.mktemp("tiny")
    return home, tiny_versions(home)


@pytest.fixture
def home(folders):
    return folders[0]


@pytest.fixture
async def cluster(home):
    async with clusters(home / "base", RecordedVLLM, VLLMEngine) as start:
        yield start


class TestReplicas(ReplicaContract):
    pass


class TestRecorded(EngineContract):
    @pytest.fixture
    async def bench(self, folders, cluster):
        engine, _ = await cluster()
        home, models = folders
        await engine.load("vx", home / "vx")
        tokenizer = tiny_tokenizer()
        return Bench(engine, tokenizer, tokenizer.encode, models, home / "vx", median=1e-4, mean=1e-4)


async def test_a_json_schema_holds_and_the_logprobs_stay_the_policys_own(cluster):
    engine, [server] = await cluster()
    ids, logprobs, reason = await collect(engine, ask(temperature=1.0, max_tokens=60, seed=4, schema=SCHEMA))
    assert reason == "eos"
    said = json.loads(tiny_tokenizer().decode(ids[:-1]))
    assert said["colour"] in ("red", "green")
    assert said["count"] in range(10)
    free = server.logits([70, 71, 72, 73], None).log_softmax(-1)
    assert abs(float(free[ids[0]]) - logprobs[0]) < 1e-4
    with pytest.raises(GrammarFailed, match="nonsense"):
        await collect(engine, ask(schema={"type": "nonsense"}))
    assert not engine.workers[0].problem


async def test_a_closed_stream_or_a_cancelled_task_ends_the_work(cluster):
    engine, [server] = await cluster()
    async for _ in engine.generate(ask(max_tokens=400, temperature=1.0, seed=2)):
        break
    await until(lambda: server.closed == 1)
    task = asyncio.create_task(collect(engine, ask(max_tokens=400, temperature=1.0, seed=2)))
    await until(lambda: server.running)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until(lambda: server.closed == 2 and not server.running)
    assert server.generated < 400
    assert engine.workers[0].in_flight == 0


async def test_a_server_whose_logprobs_follow_temperature_is_refused(cluster):
    with pytest.raises(EngineError, match="--logprobs-mode raw_logprobs"):
        await cluster(raw_logprobs=False)


async def test_a_server_that_loads_no_adapters_says_how_to_start_it(cluster, home):
    engine, _ = await cluster(loads=False)
    with pytest.raises(EngineError, match="VLLM_ALLOW_RUNTIME_LORA_UPDATING"):
        await engine.load("vx", home / "vx")
    assert (await collect(engine, ask()))[0]


async def test_what_a_server_would_take_without_a_word_never_reaches_it(cluster, home, tmp_path):
    """vLLM serves an adapter of another base's shapes, and answers nonsense with it."""
    engine, [server] = await cluster()
    foreign = tmp_path / "foreign"
    shutil.copytree(home / "vx", foreign)
    weights = load_file(foreign / "adapter_model.safetensors")
    save_file({k: v[:, :8].contiguous() for k, v in weights.items()}, foreign / "adapter_model.safetensors")
    with pytest.raises(EngineError, match="another base"):
        await engine.load("foreign", foreign)
    with pytest.raises(EngineError, match="vocabulary"):
        await collect(engine, GenerateRequest([5, 10_000], "base"))
    assert not server.adapters


async def test_what_a_server_refuses_is_told_and_drains_nothing(cluster, home):
    engine, [server] = await cluster(max_lora_rank=1, max_stops=2)
    with pytest.raises(EngineError, match="greater than max_lora_rank"):
        await engine.load("vx", home / "vx")
    with pytest.raises(EngineError, match="VLLM_MAX_STOP_STRINGS"):
        await collect(engine, GenerateRequest([70], "base", stop=("a", "b", "c")))
    server.base.config.max_position_embeddings = 8
    with pytest.raises(PromptTooLong, match="Shorten"):
        await collect(engine, GenerateRequest([70] * 9, "base"))
    assert not engine.workers[0].problem


async def test_a_server_that_was_started_anew_gets_its_adapters_back(cluster, home):
    engine, [server] = await cluster()
    await engine.load("vx", home / "vx")
    server._detach("vx")
    with pytest.raises(EngineError, match="does not exist"):
        await collect(engine, ask("vx"))
    await until(lambda: server.adapters and not engine.workers[0].problem)
    assert (await collect(engine, ask("vx")))[0]


async def test_the_settings_attach_it_and_a_model_without_versions_gets_its_first(home, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(home / "base", model)
    config = json.loads((model / "config.json").read_text()) | {"max_position_embeddings": 8192}
    (model / "config.json").write_text(json.dumps(config))
    server = RecordedVLLM(model)
    with served(server.app()) as url:
        settings = Settings(
            home=tmp_path / "home", engine="vllm", engine_urls=[url], engine_admin_key="secret", python_pool=0,
            search_backends=["local"], max_tokens=16, max_turns=0,
        )  # fmt: skip
        async with running_service(settings) as service:
            assert set(server.adapters) == {service.router.current}
            question = Question("key-a", [{"role": "user", "content": "Hi"}], Sampling(1.0, max_tokens=8, seed=1))
            async for event in service.answer(question):
                last = event
            assert isinstance(last, Finished)
            assert last.trajectory.steps[0].version == service.router.current


def test_the_settings_say_how_it_is_started(tmp_path):
    settings = Settings(home=tmp_path, engine="vllm", vllm_lora_rank=20, vllm_flags=["--dtype", "float32"])
    config = server_config(settings, "/models/some", "secret")
    assert config.python == str(settings.vllm_python)
    command = config.command(8123, tmp_path / "keys")
    for name, value in (("--max-lora-rank", "32"), ("--logprobs-mode", "raw_logprobs"), ("--port", "8123")):
        assert command[command.index(name) + 1] == value
    assert command[-2:] == ["--dtype", "float32"]
    assert "secret" not in command
    assert config.keys("secret") == "api-key: secret\n"


def test_the_doctor_looks_for_the_engine(home, tmp_path):
    with served(RecordedVLLM(home / "base").app()) as url:
        assert check_engine(Settings(home=tmp_path, engine="vllm", engine_urls=[url])).state == "ok"
    gone = check_engine(Settings(home=tmp_path, engine="vllm", engine_urls=[url]))
    assert (gone.state, url in gone.said) == ("failed", True)
    for python in (sys.executable, tmp_path / "none"):  # this one has no vLLM, that one isn't there
        missing = check_engine(Settings(home=tmp_path, engine="vllm", vllm_python=python))
        assert (missing.state, "vllm_python" in missing.mend) == ("failed", True)
