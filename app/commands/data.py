"""`whetstone data`: how much there is, what came of what, and the ways to take it back or out."""

from __future__ import annotations

import getpass
import re
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from app.commands import console
from app.commands.console import AsJson
from app.commands.export import export

if TYPE_CHECKING:
    from pathlib import Path

    from rich.tree import Tree

    from app.erasure import Swept
    from feedback_store import Erased, Store
    from feedback_store.lineage import Trace

data = typer.Typer(help="The record of conversations.", no_args_is_help=True)
data.command("export")(export)
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Don't ask.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only count what would go.")]


@data.command("stats")
def stats(as_json: AsJson = False) -> None:
    """How much is in the record."""
    with console.opened_store() as store:
        found = store.stats() | store.sizes()
    if as_json:
        console.print_json(found)
        return
    turns = ", ".join(f"{n} {status}" for status, n in found["turns"].items()) or "none"
    rows: list[tuple[str, object]] = [
        ("size", f"{found['bytes'] / 1e6:.1f} MB"),
        ("conversations", found["conversations"]),
        ("turns", turns),
        ("steps", found["steps"]),
        ("tool results", found["tool_results"]),
        ("in service", found["current_version"]),
        ("tasks waiting", found["queue"]["pending"]),
    ]
    rows += [(f"tasks: {kind}", _counts(states)) for kind, states in found["queue"]["by_kind"].items()]
    for source, outcome in found["outcomes"].items():
        mean = "" if outcome["mean_score"] is None else f", mean score {outcome['mean_score']:.2f}"
        rows.append((f"outcomes from a {source}", f"{outcome['count']}{mean}"))
    rows += [(f"turns of {version}", n) for version, n in found["turns_by_version"].items()]
    rows += [(f"turns on {day}", n) for day, n in found["turns_by_day"].items()]
    rows += [(f"conversations {reason}", n) for reason, n in found["erased"].items()]
    console.table("Record", ("what", "how much"), rows, "")


@data.command("lineage")
def lineage(
    id: Annotated[str, typer.Argument(help="A conversation, turn, task, run, version or owner.")],
    limit: Annotated[int, typer.Option(min=1, help="Of each list's items.")] = 20,
    as_json: AsJson = False,
) -> None:
    """Where something comes from, and what has learnt from it."""
    with console.opened_store() as store:
        found = store.trace(id, limit)
    if as_json:
        console.print_json(found)
        return
    from rich.tree import Tree

    top = Tree(_named(found))
    for title, traces in (("came from", found.came_from), ("led to", found.led_to)):
        if traces:
            branch = top.add(f"[dim]{title}[/]")
            for trace in traces:
                _grow(branch, trace)
    if found.more:
        top.add(f"[dim]and {found.more} more: --limit shows them[/]")
    console.out.print(top)


@data.command("forget")
def forget(
    what: Annotated[str, typer.Argument(metavar="OWNER|CONVERSATION", help="An owner, a key's name, a conversation.")],
    yes: Yes = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Erase text and tokens for good, everywhere that they are; say which versions have learnt from them.

    May be repeated: what an earlier try left unfinished is finished.
    """
    with console.opened_store() as store:
        is_conversation = re.fullmatch(r"conv_\w+", what) is not None

        def erase(dry: bool) -> Erased:
            if is_conversation:
                return store.erase(conversation=what, dry_run=dry, who=getpass.getuser())
            return _erase_owners(store, what, dry)

        named = f"Conversation {what}" if is_conversation else f"Owner {', '.join(_owners(store, what))}"
        _erase(store, erase, named, "it", yes, dry_run, as_json)


@data.command("prune")
def prune(
    older_than: Annotated[str, typer.Option(metavar="AGE", help="Since the last answer: 90d, 12w, 1y.")],
    yes: Yes = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Erase conversations that are older. Versions that have learnt from them stay as they are."""
    before = _before(older_than)
    with console.opened_store() as store:
        _erase(store, partial(store.expire, before), f"Older than {older_than}", "them", yes, dry_run, as_json)


@data.command("consent")
def consent(
    owner: Annotated[str | None, typer.Argument(help="An owner or a key's name; none: list all.")] = None,
    training: Annotated[
        bool | None, typer.Option("--training/--service-only", help="May their conversations train the policy?")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Whose conversations may train the policy. Without consent no tasks are made of them; those that wait go."""
    with console.opened_store() as store:
        if owner is None:
            said = store.consents()
            if as_json:
                console.print_json({"by_default": store.training_by_default, "consents": said})
                return
            default = _use(store.training_by_default)
            rows = [(one.owner, _use(one.training), one.at) for one in said]
            console.table("Consent", ("owner", "use", "since"), rows, f"Nobody said anything: all are for {default}.")
            return
        names = _owners(store, owner)
        withdrawn = [] if training is None else [store.set_consent(name, training) for name in names]
        now = [store.consent(name) for name in names]
    if as_json:
        console.print_json({"consents": now, "withdrawn": None if training is None else withdrawn})
        return
    for its in now:
        line = f"{console.escaped(its.owner)}: {_use(its.training)}{'' if its.at else ', by default'}."
        console.out.print(line, highlight=False)
    if gone := sum(one.deleted + one.emptied for one in withdrawn):
        console.out.print(f"{gone} waiting tasks were withdrawn.")
    if held := max((one.held for one in withdrawn), default=0):  # each counts all owners'
        console.out.print(f"A run under way works on {held} more; no later one will.")


def _use(training: bool) -> str:
    return "service and training" if training else "service only"


def _owners(store: Store, name: str) -> list[str]:
    """An owner by name; a key's name means the owners of every key that has it, revoked ones included."""
    return [key.owner for key in store.api_keys() if key.name == name] or [name]


def _erase_owners(store: Store, name: str, dry_run: bool) -> Erased:
    from feedback_store import Erased, NotFound

    total, known = Erased(dry_run=dry_run), False
    for owner in _owners(store, name):
        try:
            total.add(store.erase(owner=owner, dry_run=dry_run, who=getpass.getuser()))
            known = True
        except NotFound:  # a key with which nothing was said
            continue
    if not known:
        raise NotFound("owner", name)
    return total


def _erase(
    store: Store, erase: Callable[[bool], Erased], named: str, it: str, yes: bool, dry_run: bool, as_json: bool
) -> None:
    """Counts what would go (`erase(True)`), asks unless `yes`, and does it."""
    plan = erase(True)
    if not dry_run and not yes:
        console.err.print(f"{console.escaped(named)}: {_sum(plan)}.", highlight=False)
        typer.confirm(f"Erase {it} for good?", abort=True, err=True)
    _finish(store, plan if dry_run else erase(False), dry_run, as_json)


def _finish(store: Store, erased: Erased, dry_run: bool, as_json: bool) -> None:
    from app.erasure import Swept, backups, sweep

    settings = console.settings()
    swept: Swept = Swept(0, 0)
    if not dry_run:
        swept = sweep(store, settings.home, vacuum=True)
    copies = backups(settings.store_path)
    if as_json:
        console.print_json({"erased": erased, "swept": None if dry_run else swept, "backups_not_covered": copies})
    else:
        _tell(erased, swept, copies)
    if swept.unfinished:
        raise console.fail(swept.unfinished)


def _tell(erased: Erased, swept: Swept, copies: Sequence[Path]) -> None:
    say = console.out.print
    say(f"{'Would go' if erased.dry_run else 'Erased'}: {_sum(erased)}.", highlight=False)
    if erased.already:
        say(f"{erased.already} conversations were erased before.")
    if erased.tasks_kept:
        say(f"{erased.tasks_kept} tasks are kept, since others asked for them too, word for word.")
    if erased.skipped:
        say(f"{erased.skipped} conversations are in use by an answer or a run, and are left for the next time.")
    if erased.runs_ended:
        say(f"Interrupted runs that can't go on now: {', '.join(erased.runs_ended)}.")
    if erased.tainted:
        say(f"[yellow]Tainted[/], since trained on it: {', '.join(erased.tainted)}.")
        say(f"Runs to be repeated without it: {', '.join(erased.retrain)}. `whetstone train --once` makes a new one.")
    if erased.in_service_tainted and erased.roll_back_to:
        say(f"{erased.in_service_tainted} is in service. The newest clean version that it comes from: "
            f"`whetstone versions use {erased.roll_back_to} --move-conversations`.")  # fmt: skip
    elif erased.in_service_tainted:
        say(f"{erased.in_service_tainted} is in service, and no published version that it comes from is clean.")
    if copies:
        say(
            "Not covered, delete them yourself: " + console.escaped(", ".join(map(str, copies))),
            soft_wrap=True,
            style="dim",
        )
    if not erased.dry_run and not swept.unfinished:
        say(f"Swept: {swept.conversations} conversations' files, {swept.runs} run folders, the database.", style="dim")


def _sum(erased: Erased) -> str:
    tasks = erased.tasks_deleted + erased.tasks_emptied
    return (
        f"{len(erased.conversations)} conversations, {erased.turns} turns, {erased.steps} steps, "
        f"{erased.tool_results} tool results, {erased.outcomes} outcomes, {tasks} tasks"
    )


def _before(text: str) -> datetime:
    """The moment that is an age ago."""
    found = re.fullmatch(r"(\d{1,5})([dwy])", text.strip())
    if found is None:
        raise typer.BadParameter(f"{text!r} is no age: give a number with d, w or y, such as 90d.")
    try:
        return datetime.now(UTC) - timedelta(days=int(found[1]) * {"d": 1, "w": 7, "y": 365}[found[2]])
    except OverflowError:
        raise typer.BadParameter(f"{text!r} is before the first year: give a smaller number.") from None


def _counts(states: dict[str, int]) -> str:
    return ", ".join(f"{n} {state}" for state, n in states.items())


def _named(trace: Trace) -> str:
    note = f" [dim]{console.escaped(trace.note)}[/]" if trace.note else ""
    return f"{trace.kind} [bold]{console.escaped(trace.id)}[/]{note}"


def _grow(branch: Tree, trace: Trace) -> None:
    twig = branch.add(_named(trace))
    for below in (*trace.came_from, *trace.led_to):
        _grow(twig, below)
    if trace.more:
        twig.add(f"[dim]and {trace.more} more[/]")
