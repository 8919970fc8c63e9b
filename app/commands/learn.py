"""The learning commands: `warmup` makes a first version, `train` the next ones."""

from __future__ import annotations

import atexit
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from app.commands import console
from app.commands.console import AsJson
from app.commands.progress import bars

if TYPE_CHECKING:
    from collections.abc import Callable

    from app.settings import Settings
    from serving.model import BaseModel


def train(
    once: Annotated[bool, typer.Option("--once", help="Do one run now, and end.")] = False,
    recipe: Annotated[str, typer.Option(help="A recipe's name, or a YAML file.")] = "embedded-cpu",
    steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps, instead of the recipe's.")] = None,
    minutes: Annotated[float | None, typer.Option(min=0.1, help="Stop training after so many minutes.")] = None,
    practice: Annotated[int, typer.Option(min=0, help="Generated tasks of each kind that fill up a short queue.")] = 96,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the recipe's plan, and train nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Learn from the queue: train the version in service, test the result, and put it in service if it is better.

    Interrupt it at any time; the same command goes on where it was.
    """
    overrides: dict[str, object] = {}
    if steps is not None:
        overrides["max_steps"] = steps
    if minutes is not None:
        overrides["max_minutes"] = minutes
    if dry_run:
        from app.commands.plan import show_plan

        show_plan(recipe, overrides, as_json)
        return
    if not once:
        raise console.fail("only single runs exist so far: add --once. For every night, let cron call it.")
    from online_rl.recipe import RecipeError, load_recipe

    try:
        chosen = load_recipe(recipe, **overrides)
        chosen.check_runnable(recipe)
    except RecipeError as error:
        raise console.fail(str(error)) from None
    settings = console.settings()
    _be_nice()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from app.engines import opener
    from app.record import guards, open_store
    from app.redaction import redactor
    from app.tools import open_toolbox, tool_seconds
    from feedback_store import StoreError
    from online_rl.loop import RunOptions, RunRefused, run_once
    from online_rl.tasks.generated import generate
    from serving.engines.base import Sampling
    from serving.versions import install_shipped

    try:
        # Practice is new each day, so that a night adds to what the last one taught.
        day = int(time.time() // 86_400)
        options = RunOptions(
            chosen,
            heldout=[*generate("arithmetic", 60, 0, "heldout"), *generate("lookup", 60, 0, "heldout"),
                     *generate("plain", 20, 0, "heldout")],
            practice=_alternate(*(generate(kind, practice, day, "train") for kind in ("arithmetic", "lookup"))),
            recipe_name=recipe,
            dialect=settings.dialect,
            evaluation=Sampling(settings.temperature, settings.top_p, 256, seed=1),
            guards=guards(settings),
            tool_seconds=tool_seconds(settings),
            redact=redactor() if settings.redact_training else None,
        )  # fmt: skip
        with bars() as listen, open_store(settings) as store:
            install_shipped(store, settings.home)
            engine = opener(settings, store, lambda stage: listen("prepare", 0, 0, stage), "training")
            # What the bundled corpus knows, it answers: practice is judged by it. The web is asked for the rest.
            backends = tuple(sorted(settings.search_backends, key=lambda name: name != "local"))
            with open_toolbox(settings, backends, only=settings.training_tools) as toolbox:
                result = run_once(settings.home, store, engine, toolbox, options, listen)
    except KeyboardInterrupt:
        console.err.print("Interrupted. Nothing is lost: the same command goes on where it was.")
        raise typer.Exit(130) from None
    except (RunRefused, StoreError, OSError, RuntimeError, ValueError) as error:
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
        with bars() as listen:
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


def _base(settings: Settings, listen: Callable[[str, int, int, str], None]) -> BaseModel:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from serving.model import prepare_base

    return prepare_base(settings.home, lambda stage: listen(stage, 0, 0, ""))


def _be_nice() -> None:
    """Training yields to the server on the same machine, in another session too where Linux groups by session; the
    session's weight is put back at the end, for a shell lives on in it."""
    os.nice(10)
    group = Path("/proc/self/autogroup")
    with suppress(OSError):
        before = group.read_text().split()[-1]
        group.write_text("10")
        atexit.register(_put_back, group, before)


def _put_back(group: Path, before: str) -> None:
    with suppress(OSError):
        group.write_text(before)
