"""What a swap costs those who read along: `make bench-swap`, about four minutes on two cores.

Clients stream answers from the embedded engine with SmolLM2, one after the other, while nothing happens and while a
version that was never loaded before is put in service every few seconds (the file's hashes are checked, its adapter
converted, its server started, the old one's stopped). Quiet and swapping spells take turns in one run, so that other
work on the machine weighs on both. Measured is the gap between two chunks of one answer, a token each; the wait for
the first token isn't part of it. Writes benchmarks/results/swap.{json,md}.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from feedback_store import Store
from serving.dialects.tapo import TapoDialect
from serving.engines.base import GenerateRequest, Sampling, TokenChunk
from serving.engines.llamacpp import LlamaCppEngine
from serving.manifest import read_version
from serving.model import BaseModel, prepare_base
from serving.versions import SHIPPED, VersionRouter, install_shipped

RESULTS = Path(__file__).parent / "results"
QUESTIONS = ("What is a river?", "Tell me about Rome.", "Why is the sky blue?", "Write a line about tea.")
TOKENS = 96  # of one answer
CLIENTS = (1, 4)  # the engine's slots are four: what exceeds them waits its turn, not between two tokens
KINDS = ("quiet", "swapping")
AIM = 2.0  # times the quiet p99
PATIENCE_S = 120.0  # for a swap to be seen, and for the answers of a spell to end; a busy machine is slow, not silent


@dataclass
class Spell:
    """What was seen in the spells of one kind. `swap_s`: from a change in the registry to the swap to it."""

    gaps_s: list[float] = field(default_factory=list)
    first_s: list[float] = field(default_factory=list)
    swap_s: list[float] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0

    def summary(self) -> dict[str, float | int | list[float]]:
        p50, p90, p99 = (float(np.quantile(self.gaps_s, share)) for share in (0.5, 0.9, 0.99))
        return {
            "gap_p50_s": p50, "gap_p90_s": p90, "gap_p99_s": p99, "gap_max_s": max(self.gaps_s),
            "gaps": len(self.gaps_s), "first_p50_s": float(np.median(self.first_s)),
            "first_p99_s": float(np.quantile(self.first_s, 0.99)), "tokens_per_s": self.tokens / self.seconds,
            "swap_s": self.swap_s,
        }  # fmt: skip


class SwapStuck(RuntimeError):
    """A version was put in service, and the router didn't follow."""


class Bench:
    def __init__(self, store: Store, router: VersionRouter, engine: LlamaCppEngine, home: Path) -> None:
        self.store, self.router, self.engine, self.home = store, router, engine, home
        dialect = TapoDialect(engine.base.tokenizer)
        self.prompts = [dialect.render([{"role": "user", "content": question}]) for question in QUESTIONS]
        self.new = self._fresh_versions()

    def _fresh_versions(self) -> Iterator[str]:
        """Ids of versions that were never loaded, v0's weights under other names. The last one's folder is removed."""
        number = 0
        while True:
            number += 1
            name, folder = f"v{number}", self.home / "versions" / f"v{number}"
            shutil.copytree(SHIPPED / "v0", folder)
            manifest = read_version(folder).model_copy(update={"id": name})
            (folder / "manifest.json").write_text(manifest.model_dump_json())
            self.store.add_version(name, "v0", str(folder), {}, "published")
            yield name
            shutil.rmtree(folder)

    async def spell(self, into: Spell, clients: int, seconds: float, every_s: float | None) -> None:
        """Raises TimeoutError when an answer doesn't end, SwapStuck when a swap doesn't happen."""
        began = time.monotonic()
        async with asyncio.timeout(seconds + 2 * PATIENCE_S), asyncio.TaskGroup() as group:
            for number in range(clients):
                group.create_task(self._ask(into, number, began + seconds))
            if every_s is not None:
                group.create_task(self._swap(into, began + seconds - every_s, every_s))
        into.seconds += time.monotonic() - began

    async def _swap(self, into: Spell, end: float, every_s: float) -> None:
        while time.monotonic() < end:
            version = await asyncio.to_thread(next, self.new)  # in another process, were it a run's
            await asyncio.sleep(every_s / 2)
            began = time.monotonic()
            await asyncio.to_thread(self.store.set_current, version, "benchmark")
            while self.router.current != version:
                if time.monotonic() > began + PATIENCE_S:
                    raise SwapStuck(f"{version} wasn't swapped in within {PATIENCE_S:g} s: {self.router.refused}")
                await asyncio.sleep(0.01)
            into.swap_s.append(time.monotonic() - began)
            await asyncio.sleep(every_s / 2)

    async def _ask(self, into: Spell, number: int, end: float) -> None:
        seed = number
        while time.monotonic() < end:
            seed += 100
            prompt = self.prompts[seed % len(self.prompts)]
            began = last = time.monotonic()
            async with self.router.lease(owner=f"client {number}") as version:
                request = GenerateRequest(prompt, version, Sampling(0.7, 0.95, TOKENS, seed))
                async with aclosing(self.engine.generate(request)) as chunks:  # type: ignore[type-var]
                    async for index, chunk in _numbered(chunks):
                        now = time.monotonic()
                        if index == 0:
                            into.first_s.append(now - began)
                        elif chunk.token_ids:
                            into.gaps_s.append(now - last)
                        into.tokens += len(chunk.token_ids)
                        last = now


async def _numbered(chunks: AsyncIterator[TokenChunk]) -> AsyncIterator[tuple[int, TokenChunk]]:
    index = 0
    async for chunk in chunks:
        yield index, chunk
        index += 1


async def measure(base: BaseModel, seconds: float, rounds: int, every_s: float, minutes: float) -> dict[str, object]:
    """`rounds` spells of each kind for each number of clients; fewer where `minutes` are over, but one of each."""
    spells = {clients: {kind: Spell() for kind in KINDS} for clients in CLIENTS}
    plan = [(round_, clients, kind) for round_ in range(rounds) for clients in CLIENTS for kind in KINDS]
    made = rounds
    with tempfile.TemporaryDirectory(prefix="whetstone-swap-") as work, Store.open(Path(work) / "s.db") as store:
        install_shipped(store, Path(work))
        engine = LlamaCppEngine(base, slots=max(CLIENTS), context=1024)
        router = VersionRouter(store, engine, base.fingerprint)
        await router.start()
        bench = Bench(store, router, engine, Path(work))
        load = [os.getloadavg()[0]]
        await bench.spell(Spell(), max(CLIENTS), min(3.0, seconds), None)  # warm
        began = time.monotonic()
        for done, (round_, clients, kind) in enumerate(plan):
            if round_ and time.monotonic() > began + 60 * minutes:
                made = round_
                print(f"{minutes:g} minutes are over: {made} of {rounds} rounds were made.", flush=True)
                break
            await bench.spell(spells[clients][kind], clients, seconds, every_s if kind == "swapping" else None)
            left = (time.monotonic() - began) / (done + 1) * (len(plan) - done - 1)
            print(
                f"{time.strftime('%H:%M:%S')} round {round_ + 1} of {rounds}, {clients} at once, {kind}: "
                f"{len(spells[clients][kind].gaps_s)} gaps so far; about {left / 60:.1f} minutes left",
                flush=True,
            )
        load.append(os.getloadavg()[0])
        await router.close()
        await engine.close()
    return {
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}",
        "engine": f"llama.cpp in process, {base.id}, {max(CLIENTS)} slots a version",
        "load_average": load,
        "spell_s": seconds,
        "rounds": made,
        "swap_every_s": every_s,
        "clients": {str(n): {kind: spell.summary() for kind, spell in kinds.items()} for n, kinds in spells.items()},
    }


def table(result: dict[str, Any]) -> str:
    load = ", ".join(f"{value:.1f}" for value in result["load_average"])
    lines = [
        "# What a swap costs those who read along",
        f"{result['machine']}; {result['engine']}. {result['rounds']} spells of {result['spell_s']:g} s of each kind, "
        f"in turn; while swapping, a version that was never loaded before every {result['swap_every_s']:g} s or so. "
        f"The machine did other work too (load average {load}). `make bench-swap`.",
        "",
        "| clients | | gap between tokens: p50 ms | p90 ms | p99 ms | longest ms | first token p50 ms | p99 ms "
        "| tokens/s | swaps |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    ratios = []
    for clients, kinds in result["clients"].items():
        for kind in KINDS:
            row = kinds[kind]
            ms = [row[f"gap_{name}_s"] * 1e3 for name in ("p50", "p90", "p99", "max")]
            ms += [row["first_p50_s"] * 1e3, row["first_p99_s"] * 1e3]
            shown = " | ".join(f"{value:.1f}" for value in ms)
            lines.append(f"| {clients} | {kind} | {shown} | {row['tokens_per_s']:.0f} | {len(row['swap_s'])} |")
        ratio = kinds["swapping"]["gap_p99_s"] / kinds["quiet"]["gap_p99_s"]
        swap = float(np.median(kinds["swapping"]["swap_s"]))
        ratios.append(
            f"- {clients} at once: the p99 of the gap while swapping is {ratio:.2f} times the quiet one, the aim of "
            f"{AIM:g} at most {'met' if ratio <= AIM else 'missed'}; a swap took {swap:.2f} s (median) from the "
            "registry to the next answer."
        )
    return "\n".join([*lines, "", *ratios]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=12.0, help="of one spell")
    parser.add_argument("--rounds", type=int, default=4, help="spells of each kind and number of clients")
    parser.add_argument("--every", type=float, default=3.0, help="seconds from one swap to the next")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--minutes", type=float, default=10.0, help="after which no round begins, but the first")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if args.seconds < 2 * args.every:
        parser.error(
            f"a spell of {args.seconds:g} s has no time for a swap every {args.every:g} s: give --seconds more"
        )
    base = prepare_base(Path.home() / ".whetstone", print)
    result = asyncio.run(measure(base, args.seconds, args.rounds, args.every, args.minutes))
    (args.out / "swap.json").write_text(json.dumps(result, indent=1))
    (args.out / "swap.md").write_text(table(result))
    print(table(result))


if __name__ == "__main__":
    main()
