"""What the record costs, on SQLite and on PostgreSQL, in one run: `python -m benchmarks.store` (`make bench-store`).

Steps appended a second, beside the bare driver that writes the same rows with the same durability, in turn; how long a
claim takes among ten thousand and among a million waiting tasks; bytes on the disk of a step of 1,000 tokens.
PostgreSQL is a server of the benchmark's own, with fsync, by a socket on the same disk.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from sqlalchemy import insert, text

from feedback_store import Store, StoredObservation, StoredStep
from feedback_store.codec import pack_logprobs, pack_step_ids, pack_step_mask
from feedback_store.schema import tasks
from tests.databases import Cluster, Databases, Files, Places, postgres_binaries

RESULTS = Path(__file__).parent / "results"
ASK = [{"role": "user", "content": "What is 17 * 23?"}]
WORDS = ("the", "capital", "of", "Mongolia", "is", "Ulaanbaatar", "and", "its", "population", "grew", "to", "a million")
BARE = {
    "tool_results": ("hash", "tool", "text", "error", "artifact", "created_at"),
    "steps": (
        "turn_id", "position", "version", "token_ids", "logprobs", "mask", "text", "thought", "action", "input",
        "well_formed", "seconds", "result_hash", "call_hash", "observation_seconds", "created_at",
    ),
}  # fmt: skip


def make_step(index: int, tokens: int, rng: random.Random, observed: bool = True) -> StoredStep:
    """About four characters a token, as English has; logprobs as random as a float can be."""
    written = " ".join(rng.choices(WORDS, k=tokens * 4 // 6))
    seen = StoredObservation("search", f"{index} {rng.random()} {written[:400]}", False, {"n": index}, 0.1)
    return StoredStep(
        index,
        [rng.randrange(49_152) for _ in range(tokens)],
        [-rng.expovariate(2) for _ in range(tokens)],
        [1] * tokens,
        "v0",
        written,
        "",
        "search",
        "population of Ulaanbaatar",
        seen if observed else None,
        True,
        1.0,
    )


def begin(store: Store) -> str:
    return store.begin_turn(store.create_conversation("bench"), ASK, "v0", [1])


@contextmanager
def bare(place: str, kind: str) -> Iterator[Callable[[str, StoredStep], None]]:
    """Writes a step and its result by the driver alone, a transaction each, on a connection that stays open."""
    marks = "?" if kind == "sqlite" else "%s"
    statements = [
        f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({', '.join([marks] * len(columns))})"
        for table, columns in BARE.items()
    ]
    connection: Any
    if kind == "sqlite":
        connection = sqlite3.connect(place, isolation_level=None)
        for pragma in ("foreign_keys = ON", "synchronous = FULL", "journal_size_limit = 67108864"):
            connection.execute(f"PRAGMA {pragma}")
    else:
        import psycopg

        connection = psycopg.connect(place)

    def write(turn: str, step: StoredStep) -> None:
        now: Any = datetime.now(UTC)
        now = now.isoformat() if kind == "sqlite" else now
        seen = step.observation
        assert seen is not None
        result = f"{random.getrandbits(256):064x}"
        rows = (
            (result, seen.tool, seen.text, False, json.dumps(seen.artifact), now),
            (
                turn, step.index, step.version, pack_step_ids(step.token_ids), pack_logprobs(step.logprobs),
                pack_step_mask(step.mask), step.text, step.thought, step.action, step.input, True, step.seconds, result,
                result, seen.seconds, now,
            ),
        )  # fmt: skip
        if kind == "sqlite":
            connection.execute("BEGIN IMMEDIATE")
        for statement, row in zip(statements, rows, strict=True):
            connection.execute(statement, row)
        connection.commit()

    yield write
    connection.close()


def appended(place: str, kind: str, rounds: int, steps: int, tick: Callable[[], None]) -> dict[str, Any]:
    """Steps of 200 tokens with a tool's result; store and driver in turn, each round on turns of its own."""
    rng = random.Random(0)
    rates: dict[str, list[float]] = {"store": [], "driver": []}
    with Store.open(place) as store, bare(place, kind) as write:
        for _ in range(rounds):
            for name, append in (("store", store.append_step), ("driver", write)):
                turn, made = begin(store), [make_step(n, 200, rng) for n in range(steps)]
                append(turn, made[0])
                began = time.perf_counter()
                for step in made[1:]:
                    append(turn, step)
                rates[name].append((steps - 1) / (time.perf_counter() - began))
                tick()
    medians = {name: statistics.median(values) for name, values in rates.items()}
    return {
        "store_per_s": medians["store"],
        "driver_per_s": medians["driver"],
        "share": statistics.median(s / d for s, d in zip(rates["store"], rates["driver"], strict=True)),
    }


def fill(store: Store, count: int, tick: Callable[[], None]) -> None:
    now = datetime.now(UTC)
    for start in range(0, count, 10_000):
        with store._write() as connection:
            connection.execute(
                insert(tasks),
                [
                    {
                        "id": f"task_{n:018d}", "content_hash": f"{n:064x}", "messages": ASK, "verifier": "numeric",
                        "gold": str(n), "kind": "numeric", "source": "bench", "owner": "", "state": "pending",
                        "attempts": 0, "created_at": now, "updated_at": now,
                    }
                    for n in range(start, min(count, start + 10_000))
                ],
            )  # fmt: skip
        tick()


def claimed(places: Places, count: int, claims: int, tick: Callable[[], None]) -> dict[str, float]:
    """Claims of 8 tasks, milliseconds; what is claimed is completed between them."""
    place = places.new()
    took = []
    with Store.open(place, max_pending=10**9) as store:
        fill(store, count, tick)
        with store._write() as connection:
            connection.execute(text("ANALYZE"))  # as PostgreSQL does by itself; SQLite's plans must bear it too
        run = store.start_run("bench", {})
        for _ in range(claims):
            began = time.perf_counter()
            got = store.claim(run, 8)
            took.append(1000 * (time.perf_counter() - began))
            store.complete(run, [task.id for task in got])
        tick()
    places.drop(place)
    return {"p50_ms": statistics.median(took), "p95_ms": statistics.quantiles(took, n=20)[-1]}


def stored(places: Places, steps: int, tick: Callable[[], None]) -> dict[str, float]:
    """Growth on the disk for each step of 1,000 tokens: all of it, and the tokens alone (text left empty)."""
    sizes = {}
    for name in ("whole", "tokens"):
        place, rng = places.new(), random.Random(1)
        with Store.open(place) as store:
            turn = begin(store)
            before = _size(store)
            for n in range(steps):
                step = make_step(n, 1000, rng, observed=False)
                if name == "tokens":
                    step = StoredStep(**vars(step) | {"text": ""})
                store.append_step(turn, step)
            sizes[f"{name}_bytes"] = (_size(store) - before) / steps
        places.drop(place)
        tick()
    return sizes


def _size(store: Store) -> int:
    with store._read() as connection:
        if connection.dialect.name == "sqlite":
            pages = connection.execute(text("PRAGMA page_count")).scalar_one()
            return int(pages * connection.execute(text("PRAGMA page_size")).scalar_one())
        return int(connection.execute(text("SELECT pg_total_relation_size('steps')")).scalar_one())


def measure(places: Places, options: argparse.Namespace, bars: Progress) -> dict[str, Any]:
    work = 2 * options.rounds + 2 + sum(-(-count // 10_000) + 1 for count in options.tasks)
    bar = bars.add_task(places.kind, total=work)

    def tick() -> None:
        bars.advance(bar)

    place = places.new()
    found: dict[str, Any] = {"append": appended(place, places.kind, options.rounds, options.steps, tick)}
    places.drop(place)
    found["step_1000_tokens"] = stored(places, 200, tick)
    found["claim"] = {str(count): claimed(places, count, options.claims, tick) for count in options.tasks}
    few, many = (found["claim"][str(count)]["p50_ms"] for count in (options.tasks[0], options.tasks[-1]))
    found["claim_ratio"] = many / few
    return found


def report(results: dict[str, Any]) -> str:
    sides = results["databases"]
    lines = [
        "# The store's costs",
        f"{results['when']}, {results['machine']}. `{results['command']}`",
        "",
        f"| | aim | {' | '.join(sides)} |",
        f"|---|---|{'---|' * len(sides)}",
    ]

    def row(name: str, aim: str, value: Callable[[dict[str, Any]], str]) -> None:
        lines.append(f"| {name} | {aim} | {' | '.join(value(side) for side in sides.values())} |")

    row("steps appended a second", "", lambda side: f"{side['append']['store_per_s']:.0f}")
    row("the bare driver, same durability", "", lambda side: f"{side['append']['driver_per_s']:.0f}")
    row("share of the driver's", "≥ 60 %", lambda side: f"{side['append']['share']:.0%}")
    for count in results["tasks"]:
        row(f"claim of 8 among {count:,} tasks, p50", "", lambda s, c=count: f"{s['claim'][str(c)]['p50_ms']:.2f} ms")
    row("ratio of the last to the first", "≤ 1.5", lambda side: f"{side['claim_ratio']:.2f}")
    row("a step of 1,000 tokens", "≤ 8 kB", lambda side: f"{side['step_1000_tokens']['whole_bytes'] / 1000:.1f} kB")
    row("its tokens without text", "", lambda side: f"{side['step_1000_tokens']['tokens_bytes'] / 1000:.1f} kB")
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=300, help="of one round")
    parser.add_argument("--claims", type=int, default=200)
    parser.add_argument("--tasks", type=int, nargs=2, default=[10_000, 1_000_000])
    parser.add_argument("--folder", type=Path, help="where the files lie: a disk, not memory; default: the system's")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    databases: dict[str, Any] = {}
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, TimeRemainingColumn()) as bars:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            databases["SQLite"] = measure(Files(Path(folder)), options, bars)
        if (binaries := postgres_binaries()) is None:
            print("PostgreSQL isn't installed, so it isn't measured (Debian, Ubuntu: apt-get install postgresql).")
        else:
            cluster = Cluster(binaries, durable=True, parent=options.folder)
            try:
                databases[f"PostgreSQL {cluster.version}"] = measure(Databases(cluster), options, bars)
            finally:
                cluster.remove()
    results = {
        "when": f"{datetime.now(UTC):%Y-%m-%d}",
        "machine": f"{os.cpu_count()} CPUs, {platform.machine()}, Python {platform.python_version()}",
        "command": "python -m benchmarks.store",
        "tasks": options.tasks,
        "options": {"rounds": options.rounds, "steps": options.steps, "claims": options.claims},
        "databases": databases,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "store.json").write_text(json.dumps(results, indent=1) + "\n")
    (options.out / "store.md").write_text(report(results))
    print(report(results))


if __name__ == "__main__":
    main()
