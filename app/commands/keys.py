"""`whetstone keys`: who may call the endpoint and log in to the chat, and for what."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated, cast

import typer

from app.commands import console
from app.commands.console import AsJson

if TYPE_CHECKING:
    from feedback_store.records import ApiKey, Scope

keys = typer.Typer(help="The API keys: who may call, for what, how often.", no_args_is_help=True)
Name = Annotated[str, typer.Argument(help="Whose key it is, or what for; or its owner (key-…).")]


@keys.command("add")
def add(
    name: Annotated[str, typer.Argument(help="Whose key it is, or what for.")],
    scope: Annotated[
        list[str] | None,
        typer.Option(help="Again for each: chat, feedback, admin, metrics. chat and feedback if none."),
    ] = None,
    days: Annotated[int | None, typer.Option(min=1, max=36_500, help="Until it expires.")] = None,
    per_minute: Annotated[int | None, typer.Option(min=1, help="Requests, instead of the settings'.")] = None,
    at_once: Annotated[int | None, typer.Option(min=1, help="Answers, instead of the settings'.")] = None,
    as_json: AsJson = False,
) -> None:
    """Make a key. It is shown this once, and counts in a running server within seconds."""
    until = None if days is None else datetime.now(UTC) + timedelta(days=days)
    scopes = cast("list[Scope]", scope or ["chat", "feedback"])  # the store names one that isn't any
    with console.opened_store() as store:
        first = not store.api_keys() and not console.settings().api_keys
        made, key = store.add_key(name, scopes, until, per_minute, at_once)
    if as_json:
        console.print_json({"key": key} | _shown(made))
        return
    named = f"{console.escaped(made.name)} ({made.owner})"
    console.err.print(f"The key of {named}, for {', '.join(made.scopes)}. Keep it: it isn't stored.")
    if first:
        console.err.print("It is the first: from now on every caller needs one. Restart a running server for its chat.")
    typer.echo(key)


@keys.command("list")
def list_keys(as_json: AsJson = False) -> None:
    """The keys of the store, without the keys themselves."""
    with console.opened_store() as store:
        known = store.api_keys()
    if as_json:
        console.print_json([_shown(key) for key in known])
        return
    rows = [
        (key.name, key.owner, " ".join(key.scopes), _state(key), key.created_at, key.last_used_at, key.expires_at)
        for key in known
    ]
    columns = ("name", "owner", "scopes", "state", "made", "last used", "expires")
    console.table("API keys", columns, rows, "No keys in the store: `whetstone keys add NAME` makes one.")


@keys.command("revoke")
def revoke(name: Name) -> None:
    """End a key for good. A running server refuses it within seconds; what was said with it stays in the record."""
    with console.opened_store() as store:
        ended = store.revoke_key(name)
    console.out.print(f"The key of [bold]{console.escaped(ended.name)}[/] ({ended.owner}) is revoked.")


@keys.command("forget")
def forget(name: Name) -> None:
    """Remove revoked keys of a name from the list. Without any key left, this machine's callers need none again."""
    with console.opened_store() as store:
        gone, left = store.forget_keys(name), store.api_keys()
    console.out.print(f"{gone} revoked key{'s' if gone > 1 else ''} removed.")
    if not left:
        console.out.print(
            "The store has no key now: unless WHETSTONE_API_KEYS is set, callers on this machine need none."
        )


def _state(key: ApiKey) -> str:
    if key.revoked_at is not None:
        return "revoked"
    return "expired" if key.expires_at is not None and key.expires_at <= datetime.now(UTC) else "in use"


def _shown(key: ApiKey) -> dict[str, object]:
    return {name: value for name, value in vars(key).items() if name != "hash"} | {"state": _state(key)}
