"""What the record holds: versions and runs. None of it loads the model."""

from __future__ import annotations

import getpass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from app.commands import console, publish
from app.commands.console import AsJson

if TYPE_CHECKING:
    from feedback_store import Store

versions = typer.Typer(help="The versions of the policy, and which one serves.", invoke_without_command=True)
versions.command("add")(publish.add)
AVersion = Annotated[str, typer.Argument(help="A published version's id.")]
Reason = Annotated[str, typer.Option(help="Kept in the record.")]


@versions.callback()
def list_versions(context: typer.Context, as_json: AsJson = False) -> None:
    """The versions of the policy, and which one serves."""
    if context.invoked_subcommand is not None:
        return
    idle = console.settings().version_idle_seconds
    with console.opened_store() as store:
        current, canary, known = store.current_version(), store.canary(), store.versions()
        talking, tainted = store.conversations_on(idle), store.tainted()
    if as_json:
        found = {"current": current, "canary": canary, "conversations": talking, "tainted": tainted, "versions": known}
        console.print_json(found)
        return
    share = {current: "●"} | ({canary.version: f"{canary.share:.1%}"} if canary else {})
    rows = [
        (share.get(v.id, ""), v.id, talking.get(v.id, 0), v.parent, v.manifest.get("kind", "lora"),
         f"{v.status}{', tainted' * (v.id in tainted)}",
         v.created_at, v.run_id)
        for v in known
    ]  # fmt: skip
    columns = ("serves", "version", "conversations", "parent", "kind", "status", "made", "by run")
    console.table("Versions", columns, rows, "No versions yet: `whetstone up` installs the first.")


@versions.command("use")
def use_version(
    version: AVersion,
    reason: Reason = "chosen by hand",
    move_conversations: Annotated[
        bool, typer.Option("--move-conversations", help="Those that began on other versions go on with it too.")
    ] = False,
) -> None:
    """Put a published version in service: the way back, too. A running server follows within about a second."""
    with console.opened_store() as store:
        _check(store, version)
        moved = store.set_current(version, reason, move_conversations, who=getpass.getuser())
    console.out.print(f"[bold]{version}[/] is in service.{_moved(moved)}")


def _check(store: Store, version: str) -> None:
    """A version whose files are altered isn't put in the record's first place: every server would refuse it."""
    from serving.manifest import CorruptVersion, read_version

    found = store.version(version)
    if found.status != "published":
        return  # the store says so
    try:
        kind = read_version(Path(found.path)).kind
    except CorruptVersion as error:
        raise console.fail(str(error)) from None
    if kind == "weights" and console.settings().engine == "embedded":
        raise console.fail(
            f"{version!r} is full weights, which the embedded engine can't change while it serves: set "
            "engine = sglang first."
        )


@versions.command("promote")
def promote(version: AVersion, reason: Reason = "promoted by hand") -> None:
    """Put the version that was tried in service, for everybody; conversations under way stay where they are."""
    with console.opened_store() as store:
        _check(store, version)
        store.set_current(version, reason, who=getpass.getuser())
    console.out.print(f"[bold]{version}[/] is in service.")


@versions.command("canary")
def canary(
    version: AVersion,
    share: Annotated[float, typer.Option(min=0, max=1, help="Of the owners, whose new conversations begin on it.")],
    reason: Reason = "chosen by hand",
    move_conversations: Annotated[
        bool, typer.Option("--move-conversations", help="With share 0: those on it go on with the one in service.")
    ] = False,
) -> None:
    """Try a published version on a share of the owners; `--share 0` ends that."""
    with console.opened_store() as store:
        if share:
            _check(store, version)
        moved = store.set_canary(version, share, reason, move_conversations, who=getpass.getuser())
    tried = f"is tried on {share:.1%} of the owners." if share else f"isn't on trial any more.{_moved(moved)}"
    console.out.print(f"[bold]{version}[/] {tried}")


def runs(as_json: AsJson = False, limit: Annotated[int, typer.Option(min=1, help="How many to show.")] = 20) -> None:
    """The runs of the online loop, newest first."""
    with console.opened_store() as store:
        known = store.runs(limit)
    if as_json:
        console.print_json(known)
        return
    rows = [
        (run.id, run.recipe, f"{run.status}{' (its process is gone)' if run.alive is False else ''}", run.stage,
         run.started_at, run.finished_at)
        for run in known
    ]  # fmt: skip
    columns = ("run", "recipe", "status", "stage", "started", "finished")
    console.table("Runs", columns, rows, "No runs yet: `whetstone train --once` makes one.", "run")


def _moved(conversations: int) -> str:
    return f" {conversations} conversation{'' if conversations == 1 else 's'} moved." if conversations else ""
