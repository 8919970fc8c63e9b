"""What a swap costs those who read along: `make bench-swap`, about three minutes on two cores.

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
        began = time.monotonic()
        asking = [asyncio.create_task(self._ask(into, n, began + seconds)) for n in range(clients)]
        if every_s is not None:
            await self._swap(into, began + seconds - every_s, every_s)
        await asyncio.gather(*asking)
        into.seconds += time.monotonic() - began

    async def _swap(self, into: Spell, end: float, every_s: float) -> None:
        while time.monotonic() < end:
            version = await asyncio.to_thread(next, self.new)  # in another process, were it a run's
            await asyncio.sleep(every_s / 2)
            began = time.monotonic()
            await asyncio.to_thread(self.store.set_current, version, "benchmark")
            while self.router.current != version:  # noqa: ASYNC110 (it follows a store, which has no event)
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


async def measure(base: BaseModel, seconds: float, rounds: int, every_s: float) -> dict[str, object]:
    found: dict[str, object] = {}
    with tempfile.TemporaryDirectory(prefix="whetstone-swap-") as work, Store.open(Path(work) / "s.db") as store:
        install_shipped(store, Path(work))
        engine = LlamaCppEngine(base, slots=max(CLIENTS), context=1024)
        router = VersionRouter(store, engine, base.fingerprint)
        await router.start()
        bench = Bench(store, router, engine, Path(work))
        load = [os.getloadavg()[0]]
        for clients in CLIENTS:
            spells = {kind: Spell() for kind in KINDS}
            await bench.spell(Spell(), clients, 3.0, None)  # warm
            for round_ in range(rounds):
                for kind, spell in spells.items():
                    print(f"{clients} clients, round {round_ + 1} of {rounds}: {kind}")
                    await bench.spell(spell, clients, seconds, every_s if kind == "swapping" else None)
            found[str(clients)] = {kind: spell.summary() for kind, spell in spells.items()}
            load.append(os.getloadavg()[0])
        await router.close()
        await engine.close()
    return {
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}",
        "engine": f"llama.cpp in process, {base.id}, {max(CLIENTS)} slots a version",
        "load_average": load,
        "spell_s": seconds,
        "rounds": rounds,
        "swap_every_s": every_s,
        "clients": found,
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
            f"With {clients} client{'s' if clients != '1' else ''} the p99 of the gap while swapping is {ratio:.2f} "
            f"times the quiet one; a swap took {swap:.2f} s (median) from the registry to the next answer."
        )
    return "\n".join([*lines, "", *ratios]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=12.0, help="of one spell")
    parser.add_argument("--rounds", type=int, default=4, help="spells of each kind and number of clients")
    parser.add_argument("--every", type=float, default=3.0, help="seconds from one swap to the next")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    result = asyncio.run(
        measure(prepare_base(Path.home() / ".whetstone", print), args.seconds, args.rounds, args.every)
    )
    (args.out / "swap.json").write_text(json.dumps(result, indent=1))
    (args.out / "swap.md").write_text(table(result))
    print(table(result))


if __name__ == "__main__":
    main()
