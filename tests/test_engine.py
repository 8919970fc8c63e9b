"""The embedded engine: the contract of every engine, its parity with the trainer's model, and its own ways."""

import contextlib
import json

import httpx
import pytest
import torch

from online_rl.adapters import load_adapter
from serving.engines.base import EngineError, GenerateRequest, Sampling
from serving.engines.llamacpp import LlamaCppEngine
from serving.manifest import CorruptVersion, copy_version, read_version
from serving.versions import SHIPPED
from tests.engine_contract import Bench, EngineContract, collect, trainer_logprobs


def chat_prompt(tokenizer):
    return lambda text: tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
    )


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A version's folder: the shipped v0, under another name."""
    folder = tmp_path_factory.mktemp("versions") / "vx"
    copy_version(SHIPPED / "v0", folder)
    return folder


@pytest.fixture(scope="module")
def models(base, adapter):
    return {"base": base.load("float32").eval(), "vx": load_adapter(base, adapter, "float32").eval()}


@pytest.fixture
async def bench(base, adapter, models):
    engine = LlamaCppEngine(base, slots=4, context=512)
    await engine.load("base", None)
    await engine.load("vx", adapter)
    # It computes in 8-bit integers (Q8_0 weights and activations), the trainer in float32.
    yield Bench(engine, base.tokenizer, chat_prompt(base.tokenizer), models, adapter, median=0.08, mean=0.12)
    await engine.close()


class TestEmbedded(EngineContract):
    async def test_no_token_is_lost_inside_a_character(self, bench):
        """llama.cpp's server holds back the ids of unfinished characters; the exported vocabulary prevents that."""
        ids = bench.tokenizer.encode("😀😀😀😀 日本語 日本語 😀😀😀😀 日本語", add_special_tokens=False)
        new, _, reason = await collect(bench.engine, GenerateRequest(ids, "base", Sampling(1.5, max_tokens=80, seed=3)))
        assert reason in ("length", "eos")
        assert reason == "eos" or len(new) == 80

    async def test_a_corrupt_export_or_a_foreign_base_is_refused(self, bench, tmp_path):
        broken = tmp_path / "broken"
        copy_version(bench.adapter, broken)
        (broken / "adapter.gguf").write_bytes(b"GGUF" + bytes(64))
        with pytest.raises(EngineError, match="broken"):
            await bench.engine.load("broken", broken)
        with pytest.raises(CorruptVersion, match="another-base"):
            read_version(bench.adapter, "another-base")

    async def test_a_connection_that_the_server_let_go_of_is_made_again(self, bench, monkeypatch):
        client = bench.engine._served["base"].client
        stream, failures = client.stream, iter([httpx.ReadError(""), httpx.RemoteProtocolError("disconnected")])

        @contextlib.asynccontextmanager
        async def failing(*args, **kwargs):
            if (failure := next(failures, None)) is not None:
                raise failure
            async with stream(*args, **kwargs) as response:
                yield response

        monkeypatch.setattr(client, "stream", failing)
        request = GenerateRequest(bench.prompt("Hi"), "base", Sampling(max_tokens=3, seed=1))
        assert len((await collect(bench.engine, request))[0]) == 3
        failures = iter([httpx.ReadError("gone")] * 9)
        with pytest.raises(EngineError, match="doesn't answer"):
            await collect(bench.engine, request)

    async def test_a_grammar_holds_and_logprobs_stay_the_policys(self, bench):
        schema = {
            "type": "object",
            "properties": {"n": {"type": "integer", "minimum": 3, "maximum": 9}, "ok": {"type": "boolean"}},
            "required": ["n", "ok"],
            "additionalProperties": False,
        }
        ids = bench.prompt("Write a poem.")
        request = GenerateRequest(ids, "base", Sampling(1.0, max_tokens=60, seed=1), (), 3, schema)
        chunks = [chunk async for chunk in bench.engine.generate(request)]
        new = [i for chunk in chunks for i in chunk.token_ids]
        assert chunks[-1].finish_reason == "eos"
        made = json.loads(bench.tokenizer.decode(new, skip_special_tokens=True))
        assert made.keys() == {"n", "ok"}
        assert 3 <= made["n"] <= 9
        logprobs = torch.tensor([p for chunk in chunks for p in chunk.logprobs])
        free = trainer_logprobs(bench.models["base"], ids, new)
        assert free.mean() < -4, "what the grammar made the policy would hardly have said"
        assert (free - logprobs).abs().mean() < 0.5  # the less likely a token, the more the engine's rounding shows
