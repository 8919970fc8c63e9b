"""The engine's contract, on the real embedded engine, and its parity with the trainer's model."""

import asyncio
import itertools
import json
from contextlib import aclosing

import pytest
import torch

from online_rl.adapters import load_adapter
from serving.engines.base import EngineError, GenerateRequest, PromptTooLong, Sampling, UnknownVersion
from serving.engines.llamacpp import LlamaCppEngine
from serving.manifest import CorruptVersion, copy_version, read_version
from serving.versions import SHIPPED

# The engine computes in 8-bit integers (Q8_0 weights and activations), the trainer in float32.
MEDIAN_TOLERANCE, MEAN_TOLERANCE = 0.08, 0.12


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    """A version's folder and its model as the trainer has it: the shipped v0, under another name."""
    folder = tmp_path_factory.mktemp("versions") / "vx"
    copy_version(SHIPPED / "v0", folder)
    return folder, load_adapter(base, folder, "float32").eval()


@pytest.fixture
async def engine(base, adapter):
    engine = LlamaCppEngine(base, slots=4, context=512)
    await engine.load("base", None)
    await engine.load("vx", adapter[0])
    yield engine
    await engine.close()


def prompt(base, text):
    return base.tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
    )


async def collect(engine, request):
    ids, logprobs, chunks = [], [], []
    async with aclosing(engine.generate(request)) as stream:
        async for chunk in stream:
            assert chunk.version == request.version
            ids += chunk.token_ids
            logprobs += chunk.logprobs
            chunks.append(chunk)
    assert [c.finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert len(ids) == len(logprobs)
    return ids, logprobs, chunks[-1].finish_reason


def trainer_logprobs(model, prompt_ids, ids):
    with torch.no_grad():
        logits = model(torch.tensor([prompt_ids + ids])).logits[0, len(prompt_ids) - 1 : -1]
    return logits.log_softmax(-1)[torch.arange(len(ids)), torch.tensor(ids)]


@pytest.mark.parametrize("version", ["base", "vx"])
async def test_logprobs_are_the_trainers(base, adapter, engine, version):
    model = adapter[1] if version == "vx" else base.load("float32").eval()
    gaps = []
    for seed, question in enumerate(["What is a river?", "Count to ten.", "Write a line about 日本 and 😀."]):
        ids = prompt(base, question)
        new, logprobs, _ = await collect(engine, GenerateRequest(ids, version, Sampling(1.0, max_tokens=40, seed=seed)))
        gaps.append((trainer_logprobs(model, ids, new) - torch.tensor(logprobs)).abs())
    gap = torch.cat(gaps)
    assert gap.median() < MEDIAN_TOLERANCE
    assert gap.mean() < MEAN_TOLERANCE


async def test_an_adapter_changes_what_is_said(base, engine):
    ids = prompt(base, "What is a river?")
    said = [await collect(engine, GenerateRequest(ids, v, Sampling(0.0, max_tokens=30))) for v in ("base", "vx")]
    assert said[0][0] != said[1][0]


async def test_no_token_is_lost_inside_a_character(base, engine):
    """llama.cpp's server holds back the ids of unfinished characters; the exported vocabulary prevents that."""
    ids = base.tokenizer.encode("😀😀😀😀 日本語 日本語 😀😀😀😀 日本語", add_special_tokens=False)
    new, _, reason = await collect(engine, GenerateRequest(ids, "base", Sampling(1.5, max_tokens=80, seed=3)))
    assert reason in ("length", "eos")
    assert reason == "eos" or len(new) == 80


async def test_stops_with_the_token_that_completes_the_string(base, engine):
    ids = prompt(base, "Repeat exactly: a b c d e f g")
    free, _, _ = await collect(engine, GenerateRequest(ids, "base", Sampling(0.0, max_tokens=40)))
    text = base.tokenizer.decode(free)
    stop = text.split()[2]
    new, _, reason = await collect(engine, GenerateRequest(ids, "base", Sampling(0.0, max_tokens=40), (stop,)))
    assert reason == "stop"
    assert new == free[: len(new)]
    assert stop in base.tokenizer.decode(new)
    assert stop not in base.tokenizer.decode(new[:-1])


async def test_a_seed_repeats_and_versions_answer_at_the_same_time(base, engine):
    ids = prompt(base, "Tell me something.")
    request = GenerateRequest(ids, "base", Sampling(1.0, max_tokens=12, seed=5))
    alone, _, _ = await collect(engine, request)
    both = await asyncio.gather(
        *(collect(engine, GenerateRequest(ids, v, Sampling(1.0, max_tokens=12, seed=5))) for v in ("base", "vx") * 4)
    )
    assert len(both) == 8  # twice the slots: the rest waited
    assert all(len(new) in range(1, 13) for new, _, _ in both)
    assert (await collect(engine, request))[0] == alone


async def test_closing_the_stream_aborts(base, engine):
    ids = prompt(base, "Write a very long story.")
    for _ in range(6):  # more than there are slots: an aborted request that held one would block the rest
        async with aclosing(engine.generate(GenerateRequest(ids, "base", Sampling(1.0, max_tokens=400)))) as stream:
            async for _chunk in stream:
                break
    async with asyncio.timeout(20):
        new, _, _ = await collect(engine, GenerateRequest(ids, "base", Sampling(0.0, max_tokens=5)))
    assert new


async def test_bad_requests_are_named(base, engine):
    with pytest.raises(UnknownVersion, match="v9"):
        await collect(engine, GenerateRequest([1, 2], "v9"))
    with pytest.raises(PromptTooLong, match="600"):
        await collect(engine, GenerateRequest([5] * 600, "base"))
    with pytest.raises(EngineError, match="empty"):
        await collect(engine, GenerateRequest([], "base"))


async def test_unload_waits_for_what_is_in_flight(base, adapter, engine):
    ids = prompt(base, "Count to twenty.")
    running = asyncio.create_task(collect(engine, GenerateRequest(ids, "vx", Sampling(0.0, max_tokens=30))))
    await asyncio.sleep(0.05)
    await engine.unload("vx")
    assert running.done()
    assert (await running)[0]
    assert engine.loaded() == ["base"]


async def test_a_corrupt_or_foreign_adapter_is_refused(base, adapter, engine, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "adapter_config.json").write_text((adapter[0] / "adapter_config.json").read_text())
    (broken / "adapter_model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(EngineError, match="broken"):
        await engine.load("broken", broken)
    (broken / "adapter.gguf").write_bytes(b"GGUF" + bytes(64))
    with pytest.raises(EngineError, match="broken"):
        await engine.load("broken", broken)
    assert (await collect(engine, GenerateRequest(prompt(base, "Hi"), "base", Sampling(0.0, max_tokens=3))))[0]
    with pytest.raises(CorruptVersion, match="another-base"):
        read_version(adapter[0], "another-base")


async def test_a_grammar_holds_and_logprobs_stay_the_policys(base, engine):
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer", "minimum": 3, "maximum": 9}, "ok": {"type": "boolean"}},
        "required": ["n", "ok"],
        "additionalProperties": False,
    }
    ids = prompt(base, "Write a poem.")
    request = GenerateRequest(ids, "base", Sampling(1.0, max_tokens=60, seed=1), (), 3, schema)
    chunks = [chunk async for chunk in engine.generate(request)]
    new = [i for chunk in chunks for i in chunk.token_ids]
    assert chunks[-1].finish_reason == "eos"
    made = json.loads(base.tokenizer.decode(new, skip_special_tokens=True))
    assert made.keys() == {"n", "ok"}
    assert 3 <= made["n"] <= 9
    logprobs = torch.tensor([p for chunk in chunks for p in chunk.logprobs])
    free = trainer_logprobs(base.load("float32").eval(), ids, new)
    assert free.mean() < -4, "what the grammar made the policy would hardly have said"
    assert (free - logprobs).abs().mean() < 0.5  # the less likely a token, the more the engine's rounding shows


async def test_the_likeliest_tokens_come_with_each(base, engine):
    request = GenerateRequest(prompt(base, "Hi"), "base", Sampling(0.0, max_tokens=6), (), 5)
    chunks = [chunk async for chunk in engine.generate(request)]
    drawn = [i for chunk in chunks for i in chunk.token_ids]
    tops = [top for chunk in chunks for top in chunk.top_logprobs]
    assert [top[0][0] for top in tops] == drawn, "greedy draws the likeliest"
    assert {len(top) for top in tops} == {5}
    assert all(a[1] >= b[1] for top in tops for a, b in itertools.pairwise(top))
