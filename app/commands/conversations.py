"""`whetstone conversations`: find them, and read one whole."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from app.commands import console
from app.commands.console import AsJson

if TYPE_CHECKING:
    from feedback_store import Store, Turn
    from feedback_store.selection import Judged

conversations = typer.Typer(help="What was said: find conversations, and read one.", invoke_without_command=True)
Moment = Annotated[
    datetime | None, typer.Option(formats=["%Y-%m-%d", "%Y-%m-%dT%H:%M"], metavar="DATE", help="In UTC: 2026-01-31.")
]


@conversations.callback()
def list_conversations(
    context: typer.Context,
    search: Annotated[str | None, typer.Option(help="Words, all of which a turn or the title must have.")] = None,
    owner: Annotated[str | None, typer.Option(help="Whose.")] = None,
    outcome: Annotated[str | None, typer.Option(help="right, wrong or none: the verdict on a turn.")] = None,
    version: Annotated[str | None, typer.Option(help="That wrote a turn.")] = None,
    tool: Annotated[str | None, typer.Option(help="That a turn used.")] = None,
    since: Moment = None,
    limit: Annotated[int, typer.Option(min=1, help="How many to show.")] = 20,
    as_json: AsJson = False,
) -> None:
    """Conversations, the most recently used first."""
    if context.invoked_subcommand is not None:
        return
    from feedback_store.selection import Selection

    begun = None if since is None else since.replace(tzinfo=UTC)
    judged = cast("Judged | None", outcome)  # the store names a wrong one
    selection = Selection(owner, judged, version, tool, begun, search=search)
    with console.opened_store() as store:
        found = store.find_conversations(selection, limit)
        excerpts = {} if search is None else store.excerpts(search, [one.id for one in found])
    if as_json:
        console.print_json([vars(one) | ({"excerpt": excerpts[one.id]} if one.id in excerpts else {}) for one in found])
        return
    rows = [(one.id, one.owner, one.turns, one.updated_at, excerpts.get(one.id, one.title)) for one in found]
    columns = ("conversation", "owner", "turns", "last used", "found" if search else "title")
    console.table("Conversations", columns, rows, "There is no conversation, or none that fits.", "conversation")


@conversations.command("show")
def show(
    id: Annotated[str, typer.Argument(help="A conversation's id.")],
    tokens: Annotated[bool, typer.Option("--tokens", help="Token ids, logprobs and masks, too.")] = False,
    as_json: AsJson = False,
) -> None:
    """One conversation: each turn with its steps, tools' results and verdicts."""
    with console.opened_store() as store:
        found = store.conversation(id)
        turns = [_turn(store, turn_id, tokens) for page in _pages(store, id) for turn_id in page]
    if as_json:
        console.print_json(vars(found) | {"turns": turns})
        return
    say = console.out.print
    say(f"[bold]{console.escaped(found.title)}[/] [dim]{found.id}, of {console.escaped(found.owner)}[/]")
    for turn in turns:
        say(f"\n[bold cyan]User[/] [dim]{turn['id']}[/]\n{console.escaped(turn['question'])}", highlight=False)
        for step in turn["steps"]:
            _print_step(step)
        answer = turn["answer"] or f"({turn['status']}) {turn['error']}"
        say(f"[bold green]{console.escaped(turn['version'])}[/]\n{console.escaped(answer)}", highlight=False)
        for verdict in turn["outcomes"]:
            gold = f", right: {verdict['gold']}" if verdict["gold"] else ""
            line = (
                f"verdict of a {verdict['source']}: {verdict['score']} {verdict['verifier']}{gold} {verdict['reason']}"
            )
            say(f"[magenta]{console.escaped(line)}[/]", highlight=False)


def _pages(store: Store, conversation_id: str) -> list[list[str]]:
    pages: list[list[str]] = []
    while page := store.turns_page(conversation_id, 100, pages[-1][-1] if pages else None):
        pages.append([turn.id for turn in page])
    return pages


def _turn(store: Store, turn_id: str, tokens: bool) -> dict[str, Any]:
    turn: Turn = store.turn(turn_id)
    asked = next((m.get("content", "") for m in reversed(turn.messages) if m["role"] == "user"), "")
    told = vars(turn) | {
        "question": asked,
        "steps": [vars(step) | {"observation": step.observation} for step in turn.steps],
        "outcomes": [vars(verdict) for verdict in reversed(store.outcomes(turn_id))],
    }
    if not tokens:
        told.pop("prompt_ids")
        for step in told["steps"]:
            for name in ("token_ids", "logprobs", "mask"):
                step.pop(name)
    return told


def _print_step(step: dict[str, Any]) -> None:
    say = console.out.print
    if step["thought"]:
        say(f"[dim]{console.escaped(step['thought'])}[/]", highlight=False)
    if step["observation"] is not None:
        say(
            f"[yellow]{console.escaped(step['observation'].tool)}[/]\n{console.escaped(step['input'])}", highlight=False
        )
        say(f"[yellow]→[/] {console.escaped(step['observation'].text)}", highlight=False)
    if "token_ids" in step:
        say(f"[dim]{step['token_ids']}\n{[round(p, 3) for p in step['logprobs']]}\n{step['mask']}[/]", highlight=False)
