"""What every engine promises, as tests: a test class for an engine inherits these and gives the fixture `bench`."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from serving.engines.base import Engine, EngineError, GenerateRequest, PromptTooLong, Sampling, UnknownVersion


@dataclass
class Bench:
    """An engine with the versions `base` and `vx` loaded, and the same two as transformers models.

    `median`, `mean`: how far (nats) its logprobs may lie from theirs. `seeded`: whether a seed repeats an answer.
    """

    engine: Engine
    tokenizer: Any
    prompt: Callable[[str], list[int]]
    models: dict[str, Any]
    adapter: Path
    median: float
    mean: float
    seeded: bool = True


async def collect(engine: Engine, request: GenerateRequest) -> tuple[list[int], list[float], str | None]:
    """All tokens, logprobs and the reason of the end, with what must hold for any stream checked."""
    ids, logprobs, chunks = [], [], []
    async with aclosing(engine.generate(request)) as stream:
        async for chunk in stream:
            assert chunk.version == request.version
            assert len(chunk.token_ids) == len(chunk.logprobs)
            ids += chunk.token_ids
            logprobs += chunk.logprobs
            chunks.append(chunk)
    assert [c.finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 1)
    return ids, logprobs, chunks[-1].finish_reason


def trainer_logprobs(model: Any, prompt_ids: list[int], ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        logits = model(torch.tensor([prompt_ids + ids])).logits[0, len(prompt_ids) - 1 : -1]
    return logits.log_softmax(-1)[torch.arange(len(ids)), torch.tensor(ids)]


class EngineContract:
    @pytest.mark.parametrize("version", ["base", "vx"])
    @pytest.mark.parametrize("temperature", [1.0, 0.5])
    async def test_logprobs_are_the_trainers_before_temperature(self, bench, version, temperature):
        gaps = []
        for seed, question in enumerate(["What is a river?", "Count to ten.", "Write a line about 日本 and 😀."]):
            ids = bench.prompt(question)
            sampling = Sampling(temperature, max_tokens=16, seed=seed)
            new, logprobs, _ = await collect(bench.engine, GenerateRequest(ids, version, sampling))
            gaps.append((trainer_logprobs(bench.models[version], ids, new) - torch.tensor(logprobs)).abs())
        gap = torch.cat(gaps)
        assert gap.median() < bench.median
        assert gap.mean() < bench.mean

    async def test_an_adapter_changes_what_is_said(self, bench):
        ids = bench.prompt("What is a river?")
        said = [
            await collect(bench.engine, GenerateRequest(ids, v, Sampling(0.0, max_tokens=30))) for v in ("base", "vx")
        ]
        assert said[0][0] != said[1][0]

    async def test_tokens_come_as_they_are_drawn_and_end_at_the_limit(self, bench):
        request = GenerateRequest(bench.prompt("Tell a long story."), "base", Sampling(0.0, max_tokens=9))
        async with aclosing(bench.engine.generate(request)) as stream:
            chunks = [chunk async for chunk in stream]
        assert sum(len(chunk.token_ids) for chunk in chunks) == 9
        assert len(chunks) > 1
        assert chunks[-1].finish_reason == "length"

    async def test_stops_with_the_token_that_completes_the_string(self, bench):
        ids = bench.prompt("Repeat exactly: a b c d e f g")
        free, _, _ = await collect(bench.engine, GenerateRequest(ids, "base", Sampling(0.0, max_tokens=20)))
        decode = bench.tokenizer.decode
        at, stop = next(
            (i, text)
            for i in range(2, len(free) - 1)
            if "\ufffd" not in (text := decode(free[i : i + 2])) and text.strip() and text not in decode(free[: i + 1])
        )
        new, logprobs, reason = await collect(
            bench.engine, GenerateRequest(ids, "base", Sampling(0.0, max_tokens=20), ("never said", stop))
        )
        assert reason == "stop"
        assert new == free[: at + 2]
        assert len(logprobs) == len(new)

    async def test_the_end_of_turn_token_is_told_with_its_logprob(self, bench):
        ids = bench.prompt("Say hi.")
        for seed in range(12):
            sampling = Sampling(1.0, max_tokens=64, seed=seed)
            new, logprobs, reason = await collect(bench.engine, GenerateRequest(ids, "base", sampling))
            if reason == "eos":
                break
        assert reason == "eos"
        assert new[-1] == bench.tokenizer.eos_token_id
        assert bench.tokenizer.eos_token_id not in new[:-1]
        assert abs(float(trainer_logprobs(bench.models["base"], ids, new)[-1]) - logprobs[-1]) < 1

    async def test_a_seed_repeats(self, bench):
        if not bench.seeded:
            pytest.skip("this server draws by no seed")
        request = GenerateRequest(bench.prompt("Tell me something."), "base", Sampling(1.0, max_tokens=12, seed=5))
        once, again = [await collect(bench.engine, request) for _ in range(2)]
        assert once[0] == again[0]

    async def test_versions_answer_at_the_same_time(self, bench):
        ids = bench.prompt("Tell me something.")
        both = await asyncio.gather(*(
            collect(bench.engine, GenerateRequest(ids, v, Sampling(1.0, max_tokens=8, seed=5)))
            for v in ("base", "vx") * 4
        ))  # fmt: skip
        assert all(len(new) in range(1, 9) for new, _, _ in both)

    async def test_closing_the_stream_aborts(self, bench):
        ids = bench.prompt("Write a very long story.")
        for _ in range(6):  # more than an engine has slots: an aborted request that held one would block the rest
            request = GenerateRequest(ids, "base", Sampling(1.0, max_tokens=400))
            async with aclosing(bench.engine.generate(request)) as stream:
                async for _chunk in stream:
                    break
        async with asyncio.timeout(60):
            assert (await collect(bench.engine, GenerateRequest(ids, "base", Sampling(0.0, max_tokens=5))))[0]

    async def test_bad_requests_are_named(self, bench):
        with pytest.raises(UnknownVersion, match="v9"):
            await collect(bench.engine, GenerateRequest([1, 2], "v9"))
        room = bench.engine.context_length
        with pytest.raises(PromptTooLong, match=str(room + 5)):
            await collect(bench.engine, GenerateRequest([5] * (room + 5), "base"))
        with pytest.raises(EngineError, match="empty"):
            await collect(bench.engine, GenerateRequest([], "base"))

    async def test_an_answer_ends_where_the_context_does(self, bench):
        room = bench.engine.context_length
        new, _, _ = await collect(bench.engine, GenerateRequest([5] * (room - 10), "base", Sampling(0.0)))
        assert len(new) <= 10

    async def test_unload_waits_for_what_is_in_flight(self, bench):
        ids = bench.prompt("Count to twenty.")
        request = GenerateRequest(ids, "vx", Sampling(0.0, max_tokens=20))
        running = asyncio.create_task(collect(bench.engine, request))
        await asyncio.sleep(0.05)
        await bench.engine.unload("vx")
        assert running.done()
        assert (await running)[0]
        assert bench.engine.loaded() == ["base"]
        with pytest.raises(UnknownVersion):
            await collect(bench.engine, request)
        await bench.engine.load("vx", bench.adapter)
        assert (await collect(bench.engine, request))[0] == (await running)[0]

    async def test_a_corrupt_adapter_is_refused_and_harms_nobody(self, bench, tmp_path):
        broken = tmp_path / "broken"
        broken.mkdir()
        (broken / "adapter_config.json").write_text((bench.adapter / "adapter_config.json").read_text())
        whole = (bench.adapter / "adapter_model.safetensors").read_bytes()
        for content in (b"not safetensors", whole[: len(whole) // 2]):
            (broken / "adapter_model.safetensors").write_bytes(content)
            with pytest.raises(EngineError, match="broken"):
                await bench.engine.load("broken", broken)
        with pytest.raises(EngineError, match="nowhere"):
            await bench.engine.load("nowhere", tmp_path / "nowhere")
        assert sorted(bench.engine.loaded()) == ["base", "vx"]
        request = GenerateRequest(bench.prompt("Hi"), "base", Sampling(0.0, max_tokens=3))
        assert (await collect(bench.engine, request))[0]

    async def test_health_says_that_it_is_well(self, bench):
        health = await bench.engine.health()
        assert health["ok"] is True
        assert set(health["versions"]) == {"base", "vx"}

    async def test_a_json_schema_holds_what_is_drawn(self, bench):
        colour = {"enum": ["red", "green"]}
        fields = {"colour": colour, "count": {"type": "integer", "minimum": 0, "maximum": 9}}
        schema = {"type": "object", "properties": fields, "required": [*fields], "additionalProperties": False}
        ids = bench.prompt("A colour and a count, as JSON:")
        for version, temperature in (("base", 0.0), ("vx", 1.0)):
            sampling = Sampling(temperature, max_tokens=60, seed=1)
            request = GenerateRequest(ids, version, sampling, json_schema=schema)
            new, logprobs, reason = await collect(bench.engine, request)
            assert reason == "eos"
            told = json.loads(bench.tokenizer.decode(new, skip_special_tokens=True))
            assert told["colour"] in colour["enum"]
            assert told["count"] in range(10)
        assert len(logprobs) == len(new)

    async def test_the_likeliest_tokens_come_with_each(self, bench):
        request = GenerateRequest(bench.prompt("Hi"), "base", Sampling(0.0, max_tokens=6), (), 5)
        chunks = [chunk async for chunk in bench.engine.generate(request)]
        drawn = [i for chunk in chunks for i in chunk.token_ids]
        tops = [top for chunk in chunks for top in chunk.top_logprobs]
        assert [top[0][0] for top in tops] == drawn, "greedy draws the likeliest"
        assert {len(top) for top in tops} == {5}
        assert all(a[1] >= b[1] for top in tops for a, b in itertools.pairwise(top))
