"""What the endpoint costs beside its engine alone: `make bench-overhead`, about twelve minutes on two cores.

The embedded engine with SmolLM2 answers the same prompts (the same token ids, sampling, seeds and stops, no tools)
twice in each round: asked directly, in this process, and through the endpoint, streamed over HTTP from a process of its
own (benchmarks/overhead_load.py), with everything that an answer has in service: the agent, the record in SQLite, the
metrics. Which goes first alternates. Measured are output tokens per second of a round, and the time to the first text:
of the engine alone, to the token from which the endpoint would show the first text. Writes
benchmarks/results/overhead.{json,md}.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import socket
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn
from scipy import stats

from app.api.app import create_app
from app.server import uvicorn_config
from app.service import Service
from app.settings import Settings
from feedback_store import Store
from serving.agent import Agent, Limits
from serving.dialects.tapo import TapoDialect
from serving.engines.base import GenerateRequest, Sampling, TokenChunk
from serving.engines.llamacpp import LlamaCppEngine
from serving.generation import Generation
from serving.model import BaseModel, prepare_base
from serving.terms import Terms
from serving.token_bytes import TokenBytes
from serving.versions import VersionRouter, install_shipped
from tools.toolbox import Toolbox

RESULTS = Path(__file__).parent / "results"
ANSWERS = {1: 12, 16: 48, 64: 96}  # at once: answers of a round
SLOTS = 16  # sequences that the engine works on at once; what exceeds them waits its turn, either way
TOKENS = 96  # of one answer, at most
TOPICS = ("a river", "Rome", "the Moon", "tea", "a bridge", "winter", "an old ship", "gold", "a market", "rain")
AIM_THROUGHPUT, AIM_FIRST_MS = 0.97, 5.0
_WAYS = ("engine", "endpoint")


@dataclass
class Round:
    """One way in one round: output tokens per second, and seconds to the first text of each answer."""

    tokens_per_s: float
    first_s: list[float]
    tokens: int


class Bench:
    def __init__(self, engine: LlamaCppEngine, agent: Agent, url: tuple[str, int], load: asyncio.subprocess.Process):
        self.engine, self.agent, self.url, self.load = engine, agent, url, load
        self.dialect = agent.dialect
        self._token_bytes = TokenBytes(agent.dialect.tokenizer)

    async def alone(self, at_once: int, questions: Sequence[tuple[str, int]]) -> Round:
        requests = [
            GenerateRequest(
                self.agent.render(_messages(text), (), Terms()),
                "v0",
                Sampling(0.7, 0.95, TOKENS, seed),
                self.dialect.stops(True),
            )
            for text, seed in questions
        ]
        waiting = iter(requests)
        seen: list[tuple[float, list[tuple[float, TokenChunk]]]] = []

        async def ask() -> None:
            for request in waiting:
                began = time.perf_counter()
                chunks = [(time.perf_counter(), chunk) async for chunk in self.engine.generate(request)]
                seen.append((began, chunks))

        began = time.perf_counter()
        await asyncio.gather(*(ask() for _ in range(at_once)))
        seconds = time.perf_counter() - began
        tokens = sum(len(chunk.token_ids) for _, chunks in seen for _, chunk in chunks)
        return Round(tokens / seconds, [self._first(*one) for one in seen], tokens)

    def _first(self, began: float, chunks: list[tuple[float, TokenChunk]]) -> float:
        """From the request to the chunk with the first text that a client would be shown; parsed afterwards."""
        writing = Generation(self.dialect, self._token_bytes, Terms())
        shown = next((at for at, chunk in chunks if writing.feed(chunk)), chunks[-1][0])
        return shown - began

    async def served(self, at_once: int, questions: Sequence[tuple[str, int]]) -> Round:
        bodies = [
            {
                "model": "whetstone", "messages": _messages(text), "stream": True, "seed": seed, "temperature": 0.7,
                "top_p": 0.95, "max_tokens": TOKENS, "stream_options": {"include_usage": True},
            }
            for text, seed in questions
        ]  # fmt: skip
        job = {"host": self.url[0], "port": self.url[1], "at_once": at_once, "bodies": bodies}
        assert self.load.stdin is not None
        assert self.load.stdout is not None
        self.load.stdin.write(json.dumps(job).encode() + b"\n")
        line = await self.load.stdout.readline()
        if not line:
            raise RuntimeError("the process that asks has ended: what it wrote on standard error says why.")
        told = json.loads(line)
        if told["failures"]:
            raise RuntimeError(f"{len(told['failures'])} answers failed; the first: {told['failures'][0]}")
        return Round(told["tokens"] / told["seconds"], told["first_s"], told["tokens"])


def _messages(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def questions(at_once: int, round_: int) -> list[tuple[str, int]]:
    """The texts and seeds of a round; no text comes twice, so no prompt is cached whole."""
    told = (f"Tell me about {TOPICS[n % len(TOPICS)]}. ({at_once}.{round_}.{n})" for n in range(ANSWERS[at_once]))
    return [(text, 1000 * round_ + n) for n, text in enumerate(told)]


@asynccontextmanager
async def opened(base: BaseModel) -> AsyncIterator[Bench]:
    """The engine, the endpoint on a port of its own, and the process that asks it."""
    with tempfile.TemporaryDirectory(prefix="whetstone-overhead-") as work, Store.open(Path(work) / "s.db") as store:
        install_shipped(store, Path(work))
        engine = LlamaCppEngine(base, slots=SLOTS, context=1024)
        router = VersionRouter(store, engine, base.fingerprint)
        await router.start()
        agent = Agent(engine, TapoDialect(base.tokenizer), Toolbox([]), Limits(max_turns=0))
        service = Service(store, router, agent, engine, max_answers=max(ANSWERS))
        settings = Settings(home=Path(work), max_tokens=TOKENS)
        listening = socket.create_server(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn_config(create_app(service, settings), settings))
        serving = asyncio.create_task(server.serve([listening]))
        load = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "benchmarks.overhead_load",
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, limit=1 << 24,
        )  # fmt: skip
        try:
            yield Bench(engine, agent, listening.getsockname(), load)
        finally:
            load.kill()
            await load.wait()
            server.should_exit = True
            await serving
            await router.close()
            await engine.close()


async def measure(
    base: BaseModel, at_once: Sequence[int], rounds: int, minutes: float, say: Callable[[str], None]
) -> dict[str, Any]:
    """`rounds` rounds for each number at once, in turn; fewer where `minutes` are over, but never under two."""
    found: dict[int, list[dict[str, Round]]] = {number: [] for number in at_once}
    load = [os.getloadavg()[0]]
    began = time.monotonic()
    end = began + 60 * minutes
    plan = [(round_, number) for round_ in range(rounds) for number in at_once]
    async with opened(base) as bench:
        say("warming up")
        for run in (bench.alone, bench.served):
            await asyncio.wait_for(run(SLOTS, questions(SLOTS, -1)[:SLOTS]), 600)
        started = time.monotonic()
        for done, (round_, number) in enumerate(plan):
            if round_ >= 2 and time.monotonic() > end:
                say(f"{minutes:g} minutes are over: {round_} of {rounds} rounds were made.")
                break
            took: dict[str, Round] = {}
            for way in _WAYS if round_ % 2 == 0 else _WAYS[::-1]:
                run = bench.alone if way == "engine" else bench.served
                took[way] = await asyncio.wait_for(run(number, questions(number, round_)), 900)
            found[number].append(took)
            left = (time.monotonic() - started) / (done + 1) * (len(plan) - done - 1)
            say(
                f"round {round_ + 1} of {rounds}, {number} at once: engine {took['engine'].tokens_per_s:.0f} tokens/s, "
                f"endpoint {took['endpoint'].tokens_per_s:.0f}; about {left / 60:.1f} minutes left"
            )
    load.append(os.getloadavg()[0])
    return {
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}",
        "engine": f"llama.cpp in process, {base.id}, {SLOTS} slots",
        "answer_tokens": TOKENS,
        "load_average": load,
        "seconds": time.monotonic() - began,
        "at_once": {str(number): compared(made) for number, made in found.items()},
        "rounds": {str(n): [{way: asdict(one) for way, one in r.items()} for r in made] for n, made in found.items()},
    }


def compared(made: Sequence[dict[str, Round]]) -> dict[str, Any]:
    """The endpoint against the engine alone, round by round: means with 95 % intervals (Student's t)."""
    ratios = np.log([r["endpoint"].tokens_per_s / r["engine"].tokens_per_s for r in made])
    firsts = {way: [float(np.median(r[way].first_s)) for r in made] for way in _WAYS}
    later = [b - a for a, b in zip(firsts["engine"], firsts["endpoint"], strict=True)]
    return {
        "rounds": len(made),
        "answers": sum(len(r["endpoint"].first_s) for r in made),
        "tokens_per_s": {way: float(np.mean([r[way].tokens_per_s for r in made])) for way in _WAYS},
        "first_p50_s": {way: float(np.median(firsts[way])) for way in _WAYS},
        "throughput_ratio": [float(np.exp(value)) for value in _interval(ratios)],
        "first_p50_later_s": [float(value) for value in _interval(np.array(later))],
    }


def _interval(values: np.ndarray[Any, Any]) -> Iterator[float]:
    """The mean, and the ends of its 95 % interval."""
    mean = float(values.mean())
    half = float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)) if len(values) > 1 else float("nan")
    yield from (mean, mean - half, mean + half)


def table(result: dict[str, Any]) -> str:
    lines = [
        "# What the endpoint costs beside its engine alone",
        f"{result['machine']}; {result['engine']}; answers of {result['answer_tokens']} tokens at most, no tools, "
        f"streamed. Load average {result['load_average'][0]:.1f} before and {result['load_average'][1]:.1f} after. "
        "`make bench-overhead`.",
        "",
        "| at once | rounds, answers | engine alone tokens/s | endpoint tokens/s | ratio (95 % interval) "
        "| first text p50: engine ms | endpoint ms | later by ms (95 % interval) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for number, row in result["at_once"].items():
        ratio = "{:.3f} ({:.3f} to {:.3f})".format(*row["throughput_ratio"])
        later = "{:.1f} ({:.1f} to {:.1f})".format(*(1e3 * value for value in row["first_p50_later_s"]))
        rate, first = row["tokens_per_s"], row["first_p50_s"]
        lines.append(
            f"| {number} | {row['rounds']}, {row['answers']} | {rate['engine']:.0f} | {rate['endpoint']:.0f} | {ratio} "
            f"| {first['engine'] * 1e3:.1f} | {first['endpoint'] * 1e3:.1f} | {later} |"
        )
    lines += ["", *map(_verdict, result["at_once"].items()), ""]
    lines += [
        "The engine's two threads, the endpoint and the process that asks share these cores, so whatever the endpoint "
        "and its client compute is taken from the engine: where the engine is a GPU, or another machine, only the "
        "endpoint's own time per token counts. The engine alone is asked in the endpoint's process and pays for no "
        f"client. Above {SLOTS} at once answers wait for a slot: their first text says more of the queue than of the "
        "endpoint.",
    ]
    return "\n".join(lines) + "\n"


def _verdict(entry: tuple[str, dict[str, Any]]) -> str:
    number, row = entry
    ratio, low, high = row["throughput_ratio"]
    later, least, most = (1e3 * value for value in row["first_p50_later_s"])
    throughput = _told(ratio >= AIM_THROUGHPUT, low >= AIM_THROUGHPUT or high < AIM_THROUGHPUT)
    first = _told(later <= AIM_FIRST_MS, most <= AIM_FIRST_MS or least > AIM_FIRST_MS)
    return (
        f"- {number} at once: at least {AIM_THROUGHPUT:.0%} of the throughput {throughput} ({ratio:.1%}), at most "
        f"{AIM_FIRST_MS:g} ms later {first} ({later:+.1f} ms)."
    )


def _told(met: bool, certain: bool) -> str:
    return ("met" if met else "missed") + ("" if certain else " on average, within the interval of either")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=6, help="for each number of answers at once")
    parser.add_argument("--at-once", type=int, nargs="+", choices=list(ANSWERS), default=list(ANSWERS))
    parser.add_argument("--minutes", type=float, default=25.0, help="after which no round begins, but the second")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--trial", action="store_true", help="a twelfth of the answers: to see that it runs")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.rounds < 2:
        parser.error("an interval takes two rounds at least")
    if args.trial:
        ANSWERS.update({number: max(2, answers // 12) for number, answers in ANSWERS.items()})
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    base = prepare_base(Path.home() / ".whetstone", print)

    def say(line: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)

    result = asyncio.run(measure(base, args.at_once, args.rounds, args.minutes, say))
    (args.out / "overhead.json").write_text(json.dumps(result, indent=1))
    (args.out / "overhead.md").write_text(table(result))
    print(table(result))


if __name__ == "__main__":
    main()
