"""The learning commands: `warmup` makes a first version, `train` the next ones, `eval` measures one."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from app.commands import console
from app.commands.console import AsJson

if TYPE_CHECKING:
    from collections.abc import Callable

    from app.settings import Settings
    from serving.engines.opening import OpenEngine
    from serving.model import BaseModel
    from tools.toolbox import Toolbox

_LABELS = {"prepare": "preparing", "rollouts": "  rollouts", "train": "training", "evaluate": "evaluating"}


def train(
    once: Annotated[bool, typer.Option("--once", help="Do one run now, and end.")] = False,
    recipe: Annotated[str, typer.Option(help="A recipe's name, or a YAML file.")] = "embedded-cpu",
    steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps, instead of the recipe's.")] = None,
    minutes: Annotated[float | None, typer.Option(min=0.1, help="Stop training after so many minutes.")] = None,
    practice: Annotated[int, typer.Option(min=0, help="Generated tasks of each kind that fill up a short queue.")] = 96,
    as_json: AsJson = False,
) -> None:
    """Learn from the queue: train the version in service, test the result, and put it in service if it is better.

    Interrupt it at any time; the same command goes on where it was.
    """
    if not once:
        raise console.fail("only single runs exist so far: add --once. For every night, let cron call it.")
    settings = console.settings()
    _be_nice()
    from app.engines import opener
    from app.record import open_store
    from app.redaction import redactor
    from app.tools import open_toolbox, tool_seconds
    from feedback_store import StoreError
    from online_rl.loop import RunOptions, RunRefused, run_once
    from online_rl.recipe import RecipeError, load_recipe
    from online_rl.tasks.generated import generate
    from serving.engines.base import Sampling
    from serving.versions import install_shipped

    overrides: dict[str, object] = {}
    if steps is not None:
        overrides["max_steps"] = steps
    if minutes is not None:
        overrides["max_minutes"] = minutes
    try:
        # Practice is new each day, so that a night adds to what the last one taught.
        day = int(time.time() // 86_400)
        options = RunOptions(
            load_recipe(recipe, **overrides),
            heldout=[*generate("arithmetic", 60, 0, "heldout"), *generate("lookup", 60, 0, "heldout"),
                     *generate("plain", 20, 0, "heldout")],
            practice=_alternate(*(generate(kind, practice, day, "train") for kind in ("arithmetic", "lookup"))),
            recipe_name=recipe,
            dialect=settings.dialect,
            evaluation=Sampling(settings.temperature, settings.top_p, 256, seed=1),
            tool_seconds=tool_seconds(settings),
            redact=redactor() if settings.redact_training else None,
        )  # fmt: skip
        with _bars() as listen, open_store(settings) as store:
            install_shipped(store, settings.home)
            engine = opener(settings, store, lambda stage: listen("prepare", 0, 0, stage), "training")
            # What the bundled corpus knows, it answers: practice is judged by it. The web is asked for the rest.
            backends = tuple(sorted(settings.search_backends, key=lambda name: name != "local"))
            with open_toolbox(settings, backends, only=settings.training_tools) as toolbox:
                result = run_once(settings.home, store, engine, toolbox, options, listen)
    except KeyboardInterrupt:
        console.err.print("Interrupted. Nothing is lost: the same command goes on where it was.")
        raise typer.Exit(130) from None
    except (RecipeError, RunRefused, StoreError, OSError, RuntimeError, ValueError) as error:
        raise console.fail(f"{error}\nThe version in service is unchanged; the same command tries again.") from None
    if as_json:
        console.print_json(result.report)
        return
    colour = {"promoted": "green", "refused": "yellow"}.get(result.status, "cyan")
    console.out.print(f"[bold {colour}]{result.version or 'No new version'} {result.status}[/] ({result.run_id})")
    for reason in result.reasons:
        console.out.print(f"  {reason}", highlight=False)
    if "gate" in result.report:
        _gate_table(result.report["gate"])
        console.out.print(f"Report: {result.folder / 'report.md'}", style="dim", soft_wrap=True)
    if result.status == "promoted":
        console.out.print("A running server answers with it from its next answer on.")


def warmup(
    seed: Annotated[int, typer.Option(help="Of the demonstrations and of the training.")] = 0,
    out: Annotated[Path, typer.Option(help="The version's folder; its name is the version's.")] = Path("v0"),
) -> None:
    """Teach the bare base model the dialect, by demonstrations with real tools: how `v0` was made."""
    settings = console.settings()
    from app.tools import open_toolbox
    from online_rl.warmup import WarmupConfig, run

    if out.exists():
        raise console.fail(f"{out} exists already: give another --out.")
    try:
        with _bars() as listen:
            base = _base(settings, listen)
            folder = out.expanduser().absolute()
            work = settings.home / "warmup"
            with open_toolbox(settings, ("local",), only=("code", "search")) as toolbox:
                manifest = run(
                    base, toolbox, folder, work, WarmupConfig(seed=seed),
                    lambda phase, done, of: listen(phase, done, of, ""),
                )  # fmt: skip
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    except (OSError, RuntimeError, ValueError) as error:
        raise console.fail(str(error)) from None
    console.out.print(f"[bold green]{manifest.id}[/] is in {folder}", soft_wrap=True)


def evaluate(
    version: Annotated[str | None, typer.Argument(help="A version's id; default: the one in service.")] = None,
    items: Annotated[int, typer.Option(min=1, help="Held-out tasks of each kind.")] = 50,
    kind: Annotated[list[str] | None, typer.Option(help="arithmetic, lookup, mixed or plain; repeat for more.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0, max=2, help="Default: the one in service.")] = None,
    replay: Annotated[str | None, typer.Option(metavar="RUN", help="On this run's tool results alone.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure a version on held-out generated tasks, with the agent and the tools that serve."""
    import asyncio

    settings = console.settings()
    from app.engines import opener
    from app.record import open_store
    from app.tools import open_toolbox, tool_seconds
    from feedback_store import NotFound, StoreError
    from online_rl.evaluation import Recorded
    from online_rl.evaluation import evaluate as measure
    from online_rl.gate import behaviour, wilson
    from online_rl.result_record import EVALUATION, DamagedResults, ResultRecord
    from online_rl.tasks.generated import KINDS, generate
    from serving.agent import Agent, Limits
    from serving.dialects import make_dialect
    from serving.engines.base import EngineError, Sampling
    from serving.versions import install_shipped

    kinds = [name for name in KINDS if not kind or name in kind]
    if unknown := sorted(set(kind or []) - set(KINDS)):
        raise console.fail(f"unknown kind {unknown[0]!r}: choose from {', '.join(KINDS)}.")
    chosen = settings.temperature if temperature is None else temperature

    async def go(
        open_engine: OpenEngine, toolbox: Toolbox, version: str, path: Path,
        listen: Callable[[str, int, int, str], None],
    ) -> Any:  # fmt: skip
        async with open_engine(16, 1536) as (engine, base):
            limits = Limits(settings.max_turns, settings.observation_tokens, tool_seconds(settings), context=1536)
            agent = Agent(engine, make_dialect(settings.dialect, base.tokenizer), toolbox, limits)
            call = None if seen is None else Recorded(agent.run_tool, seen, "recorded")
            served = f"eval-{os.getpid()}-{version}"  # a server that others use too may hold it by its own name
            await engine.load(served, path)
            try:
                return await measure(
                    tasks, agent, served, Sampling(chosen, max_tokens=256, seed=1), call,
                    on_item=lambda done, of: listen("evaluate", done, of, version),
                )  # fmt: skip
            finally:
                if call is not None and call.misses:
                    console.err.print(f"{call.misses} tool calls had no result in {replay}: the model was told so.")
                await engine.unload(served)

    try:
        seen = ResultRecord(settings.home / "runs" / replay / EVALUATION, write=False) if replay else None
        tasks = [
            task
            for name in kinds
            for task in generate(name, min(items, 20) if name == "plain" else items, 0, "heldout")
        ]  # type: ignore[arg-type]
        with _bars() as listen, open_store(settings) as store:
            install_shipped(store, settings.home)
            engine = opener(settings, store, lambda stage: listen("prepare", 0, 0, stage), "evaluation")
            name = version or store.current_version() or "v0"
            with open_toolbox(settings, ("local",), only=settings.training_tools) as toolbox:
                results, _ = asyncio.run(go(engine, toolbox, name, Path(store.version(name).path), listen))
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    except (NotFound, StoreError, EngineError, DamagedResults, OSError, ValueError) as error:
        raise console.fail(str(error)) from None
    rows = []
    for slice_ in ["overall", *kinds]:
        of = [r for r in results if slice_ in ("overall", r.kind)]
        right = sum(r.correct for r in of)
        low, high = wilson(right, len(of), 0.95)
        rows.append({"kind": slice_, "n": len(of), "accuracy": right / len(of), "interval": [low, high]}
                    | asdict(behaviour(of)))  # fmt: skip
    if as_json:
        console.print_json({"version": name, "temperature": chosen, "slices": rows})
        return
    console.table(
        f"{name} at temperature {chosen:g}",
        ["kind", "n", "accuracy (95 % interval)", "calls per answer", "errors per call", "well-formed"],
        [
            [r["kind"], r["n"], f"{r['accuracy']:.1%} ({r['interval'][0]:.1%} to {r['interval'][1]:.1%})",
             f"{r['calls_per_answer']:.2f}", f"{r['error_rate']:.1%}", f"{r['well_formed']:.1%}"]
            for r in rows
        ],
        "Nothing was measured.",
    )  # fmt: skip


def _alternate(*lists: list[Any]) -> list[Any]:
    """One of each in turn, so that whatever is cut off, the kinds stay balanced."""
    return [item for together in zip(*lists, strict=True) for item in together]


def _gate_table(gate: dict[str, Any]) -> None:
    console.table(
        "Held-out tasks",
        ["kind", "n", "before", "after", "difference (95 % interval)", "p"],
        [
            [row["kind"], row["n"], f"{row['before']:.1%}", f"{row['after']:.1%}",
             f"{row['difference']:+.1%} ({row['interval'][0]:+.1%} to {row['interval'][1]:+.1%})", f"{row['p']:.2g}"]
            for row in gate["rows"]
        ],
        "",
    )  # fmt: skip


@contextmanager
def _bars() -> Iterator[Callable[[str, int, int, str], None]]:
    """A listener that shows each stage as a bar with its rate and time left."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description:<16}"), BarColumn(30), MofNCompleteColumn(), TimeRemainingColumn(),
               TextColumn("{task.fields[note]}", style="dim"))  # fmt: skip
    with Progress(*columns, console=console.err) as progress:
        bars: dict[str, Any] = {}

        def listen(stage: str, done: int, of: int, note: str) -> None:
            key = f"{stage} {note}" if stage == "evaluate" else stage
            if key not in bars:
                bars[key] = progress.add_task(_LABELS.get(stage, stage), total=of or None, note=note)
            progress.update(bars[key], completed=done, total=of or None, note=note)

        yield listen


def _base(settings: Settings, listen: Callable[[str, int, int, str], None]) -> BaseModel:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from serving.model import prepare_base

    return prepare_base(settings.home, lambda stage: listen(stage, 0, 0, ""))


def _be_nice() -> None:
    """Training yields to the server on the same machine, in another session too where Linux groups by session."""
    os.nice(10)
    with suppress(OSError):
        Path("/proc/self/autogroup").write_text("10")
