"""`whetstone eval`: one version on sets of tasks, or two on the same ones."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from app.commands import console
from app.commands.console import AsJson
from app.commands.progress import bars

if TYPE_CHECKING:
    from collections.abc import Callable

    from app.settings import Settings
    from feedback_store import Store
    from online_rl.measures import Item
    from online_rl.result_record import ResultRecord
    from online_rl.tasks.base import Task
    from serving.engines.base import Sampling
    from tools.toolbox import Toolbox

SLOTS, CONTEXT = 16, 1536  # while it measures: many answers at once, none of them long


def evaluate(
    version: Annotated[
        list[str] | None, typer.Argument(help="A version's id, or two to compare; default: the one in service.")
    ] = None,
    name: Annotated[
        list[str] | None, typer.Option("--set", help="See `whetstone tasks list`; repeat for more. Default: generated.")
    ] = None,
    file: Annotated[Path | None, typer.Option("--file", help="The set's file, or a file of your own tasks.")] = None,
    n: Annotated[
        int | None, typer.Option("-n", "--items", min=1, help="Tasks of a set, or of each generated kind (50).")
    ] = None,
    k: Annotated[int, typer.Option("-k", "--k", min=1, help="Answers to each task: avg@k.")] = 1,
    greedy: Annotated[bool, typer.Option("--greedy", help="Temperature 0.")] = False,
    temperature: Annotated[float | None, typer.Option(min=0, max=2, help="Default: the one in service.")] = None,
    max_tokens: Annotated[int, typer.Option(min=16, help="Of one generation.")] = 256,
    seed: Annotated[int, typer.Option(help="Of the choice of tasks and of the answers.")] = 1,
    tools_off: Annotated[
        bool, typer.Option("--tools-off/--no-tools-off", help="Answer again without tools, to find useless calls.")
    ] = True,
    replay: Annotated[str | None, typer.Option(metavar="RUN", help="On this run's tool results alone.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page with tables, plots and answers.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure a version on sets of tasks, with the agent and the tools that serve; two versions are compared."""
    import asyncio

    settings = console.settings()
    versions = list(version or [])
    names = list(name or (["file"] if file else ["generated"]))
    chosen = 0.0 if greedy else settings.temperature if temperature is None else temperature
    if len(versions) > 2 or len(set(versions)) < len(versions):
        raise console.fail("give one version, or two different ones to compare.")
    if file and len(names) > 1:
        raise console.fail("--file is one set's: give one --set with it, or none.")
    if chosen == 0 and k > 1:
        raise console.fail("at temperature 0 all answers to a task are alike: leave -k out, or give --temperature.")
    from app.record import open_store
    from app.tools import open_toolbox
    from feedback_store import NotFound, StoreError
    from online_rl.result_record import EVALUATION, DamagedResults, ResultRecord
    from online_rl.tasks.files import HubUnavailable
    from online_rl.tasks.sets import load_set
    from serving.engines.base import EngineError, Sampling
    from serving.versions import install_shipped

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        seen = ResultRecord(settings.home / "runs" / replay / EVALUATION, write=False) if replay else None
        folder = settings.home / "data"
        tasks = [task for each in names for task in load_set(each, n, 0, file=file, folder=folder)]
        with bars() as listen, open_store(settings) as store:
            install_shipped(store, settings.home)
            versions = versions or [store.current_version() or "v0"]
            paths = {name: Path(store.version(name).path) for name in versions}
            with open_toolbox(settings, ("local",), only=settings.training_tools) as toolbox:
                job = _Job(
                    settings, store, toolbox, tasks, paths, Sampling(chosen, settings.top_p, max_tokens, seed), k
                )
                measured = asyncio.run(job.go(seen, tools_off, listen))
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    except (NotFound, StoreError, EngineError, DamagedResults, HubUnavailable, OSError, ValueError) as error:
        raise console.fail(str(error)) from None
    told = {"sets": ", ".join(names), "items": len(tasks), "temperature": chosen, "k": k, "seed": seed}
    _tell(told, measured, html, as_json)


@dataclass
class _Job:
    settings: Settings
    store: Store
    toolbox: Toolbox
    tasks: list[Task]
    versions: dict[str, Path]
    sampling: Sampling
    k: int

    async def go(
        self, seen: ResultRecord | None, tools_off: bool, listen: Callable[[str, int, int, str], None]
    ) -> dict[str, list[Item]]:
        """By version, every item. Both versions share the tool results: the second sees what the first saw."""
        from app.engines import opener
        from app.tools import tool_seconds
        from online_rl.evaluation import Recorded
        from online_rl.measures import bare_agent, measure
        from serving.agent import Agent, Limits
        from serving.dialects import make_dialect

        opened = opener(self.settings, self.store, lambda stage: listen("prepare", 0, 0, stage), "evaluation")
        async with opened(SLOTS, CONTEXT) as (engine, base):
            limits = Limits(
                self.settings.max_turns, self.settings.observation_tokens, tool_seconds(self.settings), context=CONTEXT
            )
            dialect = make_dialect(self.settings.dialect, base.tokenizer)
            agent = Agent(engine, dialect, self.toolbox, limits)
            bare = bare_agent(engine, dialect, limits) if tools_off else None
            for task in self.tasks:
                agent.render(task.messages)  # a prompt that is too long is told before time is spent
            call = Recorded(agent.run_tool, seen, "live" if seen is None else "recorded")
            measured: dict[str, list[Item]] = {}
            for version, path in self.versions.items():
                served = f"eval-{os.getpid()}-{version}"  # a server that others use too may hold it by its own name
                await engine.load(served, path)

                def told(done: int, of: int, version: str = version) -> None:
                    listen("evaluate", done, of, version)

                try:
                    measured[version] = await measure(
                        self.tasks, agent, served, self.sampling, self.k, call, bare, SLOTS, told
                    )
                finally:
                    await engine.unload(served)
            if call.misses:
                console.err.print(f"{call.misses} tool calls had no recorded result: the model was told so.")
            return measured


def _tell(told: dict[str, Any], measured: dict[str, list[Item]], html: Path | None, as_json: bool) -> None:
    from online_rl.eval_page import difference_cells, page
    from online_rl.measures import differences, slices

    rows = {version: slices(items) for version, items in measured.items()}
    both = list(measured.values())
    compared = differences(both[0], both[1]) if len(both) == 2 else []
    if html is not None:
        try:
            html.write_text(page(f"Evaluation of {' and '.join(measured)}", told, measured, compared), encoding="utf-8")
        except OSError as error:
            raise console.fail(f"{html} can't be written: {error.strerror or error}") from None
    if as_json:
        results = [
            {"version": version, "slices": [asdict(row) for row in rows[version]], "items": [_item(i) for i in items]}
            for version, items in measured.items()
        ]
        console.print_json(told | {"results": results, "comparison": [asdict(row) for row in compared]})
        return
    for version, its in rows.items():
        times = f", avg@{told['k']}" if told["k"] > 1 else ""
        console.table(
            f"{version} on {told['sets']} at temperature {told['temperature']:g}{times}",
            ["kind", "n", "accuracy (95 %)", "calls", "per right", "useless", "failed", "tokens", "p50", "p95"],
            [
                [r.kind, r.n, f"{r.accuracy:.1%} ({r.interval[0]:.1%} to {r.interval[1]:.1%})",
                 f"{r.calls_per_answer:.2f}", "-" if r.calls_per_right is None else f"{r.calls_per_right:.2f}",
                 "-" if r.useless_calls is None else f"{r.useless_calls:.0%}", f"{r.error_rate:.0%}",
                 f"{r.own_tokens:.0f}", f"{r.latency_p50:.1f} s", f"{r.latency_p95:.1f} s"]
                for r in its
            ],
            "",
        )  # fmt: skip
    if compared:
        old, new = measured
        columns = ["kind", "n", old, new, "difference (95 %)", "p"]
        console.table(f"{new} against {old}", columns, [difference_cells(row) for row in compared], "")
    if html is not None:
        console.out.print(f"Page: {html}", style="dim", soft_wrap=True)


def _item(item: Item) -> dict[str, Any]:
    answers = [
        {"answer": s.answer, "right": s.result.correct, "calls": s.result.tool_calls, "errors": s.result.tool_errors,
         "tokens": s.result.own_tokens, "seconds": round(s.seconds, 3), "same_without_tools": s.same_without}
        for s in item.samples
    ]  # fmt: skip
    return {"id": item.task.id, "kind": item.task.kind, "question": item.task.question, "gold": item.task.gold,
            "answers": answers, "without_tools": None if item.without is None else item.without.answer}  # fmt: skip
