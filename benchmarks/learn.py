"""The proof that Whetstone learns: `make learn`.

From the shipped `v0`, a run of online learning on arithmetic and look-up tasks, through the queue, the agent, the
engine, the real tools and the gate; then 200 held-out tasks before and after, at the temperature in service and
greedy. Writes benchmarks/results/learn.{json,md,png}. About an hour on two cores; interrupted, it goes on.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import shutil
import time
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from feedback_store import Store
from online_rl.evaluation import Recorded, evaluate
from online_rl.gate import decide
from online_rl.loop import RunOptions, run_once
from online_rl.recipe import load_recipe
from online_rl.report import accuracy_table, markdown
from online_rl.tasks.base import Task
from online_rl.tasks.generated import Kind, generate
from serving.agent import Agent, Limits
from serving.dialects.tapo import TapoDialect
from serving.engines.base import Sampling
from serving.engines.opening import OpenEngine, embedded
from serving.model import prepare_base
from serving.versions import install_shipped
from tools.python import PythonTool
from tools.search import SearchOptions, open_search
from tools.toolbox import Toolbox

RESULTS = Path(__file__).parent / "results"
HELDOUT: dict[Kind, int] = {"arithmetic": 100, "lookup": 100}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=35, help="of training")
    parser.add_argument("--tasks", type=int, default=300, help="of each kind")
    parser.add_argument("--work", type=Path, default=Path(".whetstone/learn"), help="kept, so that a run can resume")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    home: Path = args.work
    home.mkdir(parents=True, exist_ok=True)
    open_engine = embedded(prepare_base(Path("~/.whetstone").expanduser(), print))
    toolbox = Toolbox([PythonTool(), open_search(home, SearchOptions())])
    with Store.open(home / "whetstone.db") as store:
        install_shipped(store, home)
        for kind in HELDOUT:
            for task in generate(kind, args.tasks, 7, "train"):
                store.add_task(list(task.messages), task.verifier, task.gold, kind, "benchmark")
        options = RunOptions(
            load_recipe("embedded-cpu", max_minutes=args.minutes),
            heldout(),
            claim=args.tasks * len(HELDOUT),
        )
        columns = (TextColumn("{task.description:<10}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                   TextColumn("{task.fields[note]}"))  # fmt: skip
        with Progress(*columns) as bars:
            shown: dict[str, Any] = {}

            def listen(stage: str, done: int, of: int, note: str) -> None:
                shown.setdefault(stage, bars.add_task(stage, note="") if stage not in shown else None)
                bars.update(shown[stage], completed=done, total=of or None, note=note)
                if stage == "train":
                    bars.console.print(f"step {done}: {note}")

            ended = next((run for run in store.runs() if run.report), None)  # an earlier call got that far
            report = ended.report if ended else run_once(home, store, open_engine, toolbox, options, listen).report
        if report["status"] == "ended":
            raise SystemExit(f"The run ended without a version: {report['reasons']}")
        folder = home / "runs" / report["run"]
        folders = {v.id: Path(v.path) for v in store.versions()}
    pair = {name: folders[name] for name in (report["parent"], report["version"])}
    began = time.monotonic()
    report["greedy"] = asyncio.run(_greedy(open_engine, toolbox, pair))
    report["seconds"]["greedy evaluation"] = time.monotonic() - began
    report["minutes"] = round(sum(report["seconds"].values()) / 60, 1)
    report["machine"] = {"processor": platform.processor() or platform.machine(), "cores": len(os.sched_getaffinity(0))}
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "learn.json").write_text(json.dumps(report, indent=2) + "\n")
    shutil.copyfile(folder / "curve.png", args.out / "learn.png")
    shutil.copyfile(folder / "metrics.jsonl", args.out / "learn.metrics.jsonl")
    (args.out / "learn.md").write_text(_page(report))
    shutil.rmtree(home)  # the next call starts from v0 again
    print(_page(report))


def heldout() -> list[Task]:
    return [task for kind, n in HELDOUT.items() for task in generate(kind, n, 0, "heldout")]


async def _greedy(open_engine: OpenEngine, toolbox: Toolbox, versions: dict[str, Path]) -> dict[str, Any]:
    """The same held-out tasks at temperature 0, as a second measure."""
    async with open_engine(16, 1536) as (engine, base):
        agent = Agent(engine, TapoDialect(base.tokenizer), toolbox, Limits())
        call = Recorded(agent.run_tool)
        sides = []
        for version, path in versions.items():
            await engine.load(version, path)
            sides.append((await evaluate(heldout(), agent, version, Sampling(0.0, max_tokens=256), call))[0])
        return decide(*sides).report()


def _page(report: dict[str, Any]) -> str:
    return "\n".join([
        markdown(report).replace("curve.png", "learn.png"),
        "The same tasks answered greedily (temperature 0):",
        "",
        *accuracy_table(report["greedy"]["rows"]),
        "",
        f"Made by `make learn` in {report['minutes']} minutes on {report['machine']['cores']} cores.",
        "",
    ])  # fmt: skip


if __name__ == "__main__":
    main()
