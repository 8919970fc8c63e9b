"""64 clients stream while versions are swapped under them: nobody notices.

`make test-swap` does it for two minutes; the quick suite for a few seconds.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from serving.model import BaseModel
from tests.fakes import until
from tests.swap_load import Seen, clients, make_versions, serving, swaps

SECONDS = float(os.environ.get("WHETSTONE_SWAP_SECONDS", "8"))
EVERY_S = 0.5
CLIENTS = 64
JUDGED = 12  # answers whose tokens are traced to the version that wrote them


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[BaseModel, dict[str, Any]]:
    return make_versions(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def one_torch_thread() -> Iterator[None]:
    """Threads of torch's and the engine's that wait for each other on a busy machine make seconds of milliseconds."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.timeout(SECONDS + 280)
async def test_swaps_under_load_are_not_noticed(
    tiny: tuple[BaseModel, dict[str, Any]], tmp_path: Path, one_torch_thread: None
) -> None:
    base, models = tiny
    seen, warming = Seen(), Seen()
    async with serving(base, tmp_path, slots=8, idle_s=3) as (url, store, service, router):
        await clients(url, 8, lambda: len(warming.answers) < 8, warming)  # what is opened once stays open
        memory = resident_mb()
        began = time.monotonic()

        def go_on() -> bool:
            """For so long, and on a busy machine until answers came from three versions."""
            seconds = time.monotonic() - began
            return not seen.failures and (seconds < SECONDS or (len(seen.versions) < 3 and seconds < SECONDS + 120))

        async with asyncio.timeout(SECONDS + 240):
            swapped, _ = await asyncio.gather(swaps(store, EVERY_S, go_on), clients(url, CLIENTS, go_on, seen))

        assert not seen.failures, "\n".join(seen.failures)
        assert service.in_flight == 0
        assert len(seen.versions) >= 3
        assert all(answer.whole for answer in seen.answers)
        assert all(answer.chunks == {answer.header} for answer in seen.answers), "header and body name one version"
        written = [store.turn(answer.turn) for answer in seen.answers]
        assert {turn.status for turn in written} <= {"done", "no_answer", "length"}
        for answer, turn in zip(seen.answers, written, strict=True):
            assert {step.version for step in turn.steps} == {turn.version} == {answer.header}
        long = [turn for turn in written if len(turn.steps[0].token_ids) >= 32]
        for turn in long[:: max(1, len(long) // JUDGED)]:
            step = turn.steps[0]
            writers = writers_of(models, turn.prompt_ids, step.token_ids, step.logprobs)
            assert writers == [turn.version] * 2, "its tokens, from the first to the last, are this version's"

        await until(lambda: router.loaded() == [store.current_version()], 60)  # idle conversations let go
        left = resident_mb()
        print(f"\n{len(seen.answers)} answers, {swapped} swaps, memory {memory:.0f} MB before and {left:.0f} after")
        assert left < memory + 150


def writers_of(models: dict[str, Any], prompt: list[int], ids: list[int], logprobs: list[float]) -> list[str]:
    """The versions whose own logprobs of the first and the second half are closest to the engine's."""
    gaps = {}
    for version, model in models.items():
        with torch.no_grad():
            logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        own = logits.log_softmax(-1)[torch.arange(len(ids)), torch.tensor(ids)]
        gaps[version] = [float(half.abs().mean()) for half in (own - torch.tensor(logprobs)).chunk(2)]
    return [min(gaps, key=lambda version: gaps[version][half]) for half in (0, 1)]


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20
