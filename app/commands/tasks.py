"""`whetstone tasks`: the sets that are trained on and evaluated, what is in them, and how the paper's are built."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from app.commands import console
from app.commands.console import AsJson

if TYPE_CHECKING:
    from collections.abc import Iterable

    from online_rl.tasks.base import Task

tasks = typer.Typer(help="The sets of tasks: list, show, build.", no_args_is_help=True)
AFile = Annotated[Path | None, typer.Option("--file", help="The set's file, instead of the data folder or the hub.")]


@tasks.command("list")
def list_sets(as_json: AsJson = False) -> None:
    """Every set by name, where it is from, and whether it is at hand without the hub."""
    from online_rl.tasks.files import SUFFIXES
    from online_rl.tasks.sets import GENERATED, SETS, about

    folder = console.settings().home / "data"
    rows = []
    for name in [*GENERATED, *SETS]:
        local = name in GENERATED or any((folder / f"{name}{suffix}").is_file() for suffix in SUFFIXES)
        rows.append(about(name) | {"at_hand": local})
    if as_json:
        console.print_json(rows)
        return
    shown = [[r["name"], r["use"], r["rows"], r["licence"], r["from"], "yes" if r["at_hand"] else "-"] for r in rows]
    console.table("Sets", ("set", "use", "tasks", "licence", "from", "at hand"), shown, "")
    console.out.print(
        f"At hand: generated here, or a file of that name in {folder}; the others are on the hub.", style="dim"
    )


@tasks.command("show")
def show(
    name: Annotated[str, typer.Argument(help="A set's name, see `whetstone tasks list`; of a file any name.")],
    n: Annotated[int, typer.Option("-n", min=1, help="How many.")] = 5,
    seed: Annotated[int, typer.Option(help="Another seed shows others.")] = 0,
    file: AFile = None,
    as_json: AsJson = False,
) -> None:
    """Some tasks of a set, with their golds."""
    from online_rl.tasks.files import HubUnavailable
    from online_rl.tasks.jsonl import as_row
    from online_rl.tasks.sets import load_set

    try:
        found = load_set(name, n, seed, file=file, folder=console.settings().home / "data")
    except (HubUnavailable, ValueError) as error:
        raise console.fail(str(error)) from None
    if as_json:
        console.print_json([as_row(task) for task in found])
        return
    rows = [[task.kind, task.verifier, task.gold, " ".join(task.question.split())] for task in found]
    console.table(name, ("kind", "verifier", "gold", "question"), rows, "")


@tasks.command("build")
def build_set(
    name: Annotated[str, typer.Argument(help="tapo-easy or tapo-hard.")],
    out: Annotated[Path | None, typer.Option(help="Default: NAME.jsonl in the data folder.")] = None,
    origin: Annotated[
        Literal["hub", "sources"], typer.Option("--from", help="The paper's own set, or one of the same make-up.")
    ] = "hub",
    source: Annotated[
        list[str] | None, typer.Option(metavar="SET=FILE", help="A source or evaluation set's file; repeat for more.")
    ] = None,
    size: Annotated[int | None, typer.Option(min=1, help="Tasks in all, in the same shares.")] = None,
    seed: Annotated[int, typer.Option(help="Of the choice, the order and the generators.")] = 0,
    skip_missing: Annotated[
        bool, typer.Option("--skip-missing", help="Build without what isn't at hand; the card says what.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Build a training set: de-duplicated, kept apart from every evaluation set, with a data card beside it."""
    from online_rl.tasks.build import FROM_HUB, MADE, MAKEUP, TooFewTasks, build, save
    from online_rl.tasks.files import HubUnavailable
    from online_rl.tasks.jsonl import TaskFileError
    from online_rl.tasks.sets import EVALUATION, SETS, load_set

    if name not in MAKEUP:
        raise console.fail(f"unknown set {name!r}: choose one of {', '.join(MAKEUP)}.")
    folder = console.settings().home / "data"
    files = dict(_named(entry, SETS) for entry in source or [])
    makeup = (FROM_HUB if origin == "hub" else MAKEUP)[name]
    if size is not None:
        makeup = {part: max(1, round(size * count / sum(makeup.values()))) for part, count in makeup.items()}
    at_hand: dict[str, list[Task]] = {}
    missing: dict[str, str] = {}
    try:
        for wanted in [*(part for part in makeup if part not in MADE), *EVALUATION, "generated"]:
            try:
                at_hand[wanted] = load_set(wanted, file=files.get(wanted), folder=folder)
            except HubUnavailable as error:
                if not skip_missing:
                    raise console.fail(f"{error}\nOr build without it: --skip-missing.") from None
                missing[wanted] = f"on the hub as {SETS[wanted].repository}"

        def read(part: str) -> Iterable[Task]:
            return at_hand[part]

        evaluation = {key: found for key, found in at_hand.items() if key not in makeup}
        built = build(name, makeup, read, evaluation, seed, missing)
        path = out or folder / f"{name}.jsonl"
        written = save(built, path)
    except (TaskFileError, TooFewTasks, OSError) as error:
        raise console.fail(str(error)) from None
    parts = [{"part": p.name, "read": p.read, "kept": len(p.kept), "dropped": dict(p.dropped)} for p in built.parts]
    if as_json:
        console.print_json(
            {"tasks": len(built.tasks), "file": path, "card": written, "parts": parts, "missing": missing}
        )
        return
    rows = [[p["part"], p["read"], p["kept"], sum(p["dropped"].values())] for p in parts]  # type: ignore[attr-defined]
    console.table(f"{name}: {len(built.tasks)} tasks", ("part", "read", "kept", "left out"), rows, "")
    if missing:
        console.out.print(f"Not at hand: {', '.join(missing)}.", style="yellow")
    console.out.print(f"{path}, and its card {written}", style="dim", soft_wrap=True)


def _named(entry: str, known: Iterable[str]) -> tuple[str, Path]:
    name, equals, file = entry.partition("=")
    if not equals or name not in known:
        raise console.fail(f"--source {entry!r}: write it as SET=FILE, with a SET of `whetstone tasks list`.")
    if not Path(file).is_file():
        raise console.fail(f"--source {name}: {file} is no file.")
    return name, Path(file)
