"""What a call of the Python tool costs: `make bench-sandbox`, about ten minutes on two cores.

The same programs, in one run and in turn, by a warm interpreter of the sandbox, by a fresh `python -c` (no isolation),
by a fresh interpreter in bubblewrap, and by smolagents' LocalPythonExecutor (which interprets the syntax tree inside
the caller's process and isolates nothing). Then calls per second with 1, 8 and 64 callers. Writes
benchmarks/results/sandbox.{json,md}.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from rich.progress import track
from smolagents.local_python_executor import LocalPythonExecutor

from tools.python.backend import Limits
from tools.python.packages import top_levels
from tools.python.pool import WarmPool
from tools.python.sandbox import DEFAULT_PACKAGES, Bubblewrap
from tools.python.spawn import Alone

RESULTS = Path(__file__).parent / "results"
PROGRAMS = {
    "sum": "print(4837 * 291)",
    "loop": "total = 0\nfor n in range(20_000):\n    total += n * n % 7\nprint(total)",
    "numpy": "import numpy as np\na = np.arange(10_000.0).reshape(100, 100) + np.eye(100)\nprint(np.linalg.det(a))",
    "sympy": "import sympy\nx = sympy.Symbol('x')\nprint(sympy.solve(x**2 - 5 * x + 6, x))",
    "pandas": "import pandas as pd\nd = pd.DataFrame({'k': list('ab') * 50, 'v': 1})\nprint(d.groupby('k').v.sum())",
}
CALLERS = (1, 8, 64)
LIMITS = Limits(wall_s=60.0, cpu_s=30)
Run = Callable[[str], Awaitable[None]]


class Cold(Bubblewrap):
    """The sandbox with nothing ready: bubblewrap and Python are started for the call."""

    def __init__(self) -> None:
        super().__init__(LIMITS, idle=0)
        self._pool = WarmPool([Alone("bwrap", LIMITS, top_levels(DEFAULT_PACKAGES))], 0)


async def fresh_python(code: str) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    output, _ = await process.communicate()
    assert process.returncode == 0, output


async def peer(code: str) -> None:
    """A new executor for each call, as nothing may leak between conversations; in a thread, since it blocks."""

    def run() -> None:
        executor = LocalPythonExecutor(["numpy.*", "sympy.*", "pandas.*"], timeout_seconds=None)
        executor.send_tools({})
        executor(code)

    await asyncio.to_thread(run)


def sandboxed(backend: Bubblewrap) -> Run:
    async def run(code: str) -> None:
        result = await backend.run(code)
        assert result.exit_code == 0, result.text

    return run


async def latencies(ways: dict[str, Run], warm: Bubblewrap, calls: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of each call, by program and way. The ways take turns, and a warm call finds an interpreter waiting."""
    found: dict[str, dict[str, list[float]]] = {name: {way: [] for way in ways} for name in PROGRAMS}
    for name, code in PROGRAMS.items():
        for run in ways.values():
            await run(code)
        for _ in track(range(calls), f"{name}: {calls} calls in {len(ways)} ways"):
            for way, run in ways.items():
                while warm._pool.idle < 4:  # noqa: ASYNC110 (a thread fills it)
                    await asyncio.sleep(0.001)
                began = time.perf_counter()
                await run(code)
                found[name][way].append(time.perf_counter() - began)
    return found


async def rates(ways: dict[str, Run], seconds: float) -> dict[str, dict[str, dict[int, float]]]:
    """Calls per second with several callers who call again at once, by program, way and number of callers."""
    found: dict[str, dict[str, dict[int, float]]] = {}
    for name in ("sum", "numpy"):
        found[name] = {way: {} for way in ways}
        for callers in CALLERS:
            for way, run in track(list(ways.items()), f"{name}: {callers} callers"):
                found[name][way][callers] = await _rate(run, PROGRAMS[name], callers, seconds)
    return found


async def _rate(run: Run, code: str, callers: int, seconds: float) -> float:
    done = 0
    began = time.perf_counter()

    async def call() -> None:
        nonlocal done
        while time.perf_counter() - began < seconds:
            await run(code)
            done += 1

    await asyncio.gather(*(call() for _ in range(callers)))
    return done / (time.perf_counter() - began)


def quantile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def table(result: dict[str, object]) -> str:
    """The result as Markdown, each row's ratio against a fresh `python -c` of the same program."""
    lines = [
        "# What a call of the Python tool costs",
        f"{result['machine']}; sandbox mode: {result['mode']}; {result['calls']} calls of each. `make bench-sandbox`.",
        "",
        "| program | way | p50 ms | p99 ms | p99 / p50 | p50 against `python -c` |",
        "|---|---|---|---|---|---|",
    ]
    latency: dict[str, dict[str, list[float]]] = result["latency_s"]  # type: ignore[assignment]
    for name, ways in latency.items():
        reference = quantile(ways["python -c"], 0.5)
        for way, values in ways.items():
            p50, p99 = quantile(values, 0.5), quantile(values, 0.99)
            lines.append(
                f"| {name} | {way} | {p50 * 1e3:.1f} | {p99 * 1e3:.1f} | {p99 / p50:.1f} | {p50 / reference:.2f} |"
            )
    lines += ["", "| program | way | " + " | ".join(f"{n} callers, calls/s" for n in CALLERS) + " |"]
    lines.append("|---|---|" + "---|" * len(CALLERS))
    by_callers: dict[str, dict[str, dict[int, float]]] = result["calls_per_s"]  # type: ignore[assignment]
    for name, counts in by_callers.items():
        for way, by in counts.items():
            lines.append(f"| {name} | {way} | " + " | ".join(f"{by[n]:.0f}" for n in CALLERS) + " |")
    return "\n".join(lines) + "\n"


async def measure(calls: int, seconds: float) -> dict[str, object]:
    warm, cold = Bubblewrap(LIMITS), Cold()
    ways: dict[str, Run] = {
        "warm sandbox": sandboxed(warm),
        "python -c": fresh_python,
        "fresh bubblewrap": sandboxed(cold),
        "smolagents": peer,
    }
    try:
        await warm.check()
        await cold.check()
        return {
            "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}",
            "mode": warm.mode,
            "calls": calls,
            "latency_s": await latencies(ways, warm, calls),
            "calls_per_s": await rates(ways, seconds),
        }
    finally:
        warm.close()
        cold.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=100, help="of each program in each way")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement with several callers")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    result = asyncio.run(measure(args.calls, args.seconds))
    (args.out / "sandbox.json").write_text(json.dumps(result, indent=1))
    (args.out / "sandbox.md").write_text(table(result))
    print(table(result))


if __name__ == "__main__":
    main()
