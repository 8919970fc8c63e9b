"""How commands speak: tables for people, JSON for programs, one line for what went wrong."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from app.settings import Settings
    from feedback_store import Store

out = Console()
err = Console(stderr=True)

_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # but tabs and line ends
_UNQUOTED = re.compile("[\x7f-\x9f]")  # controls that JSON lets stand

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def print_json(value: Any) -> None:
    told = json.dumps(value, default=_plain, ensure_ascii=False, indent=2)
    typer.echo(_UNQUOTED.sub(lambda found: f"\\u{ord(found[0]):04x}", told))


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], empty: str, whole: str = "") -> None:
    """`whole`: a column, of ids, that isn't cut or wrapped to fit a narrow terminal."""
    if not rows:
        out.print(empty, style="dim")
        return
    shown = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, header_style="dim")
    for column in columns:
        shown.add_column(column, no_wrap=column == whole, overflow="fold")
    for row in rows:
        shown.add_row(*[_cell(value) for value in row])
    out.print(shown)


def fail(message: str) -> typer.Exit:
    """The error to raise, after its message has been printed."""
    err.print(f"[bold red]Error:[/] {escaped(message)}")
    return typer.Exit(1)


def settings() -> Settings:
    from app.settings import SettingsError, load

    try:
        return load()
    except SettingsError as error:
        raise fail(str(error)) from None


@contextmanager
def opened_store() -> Iterator[Store]:
    """The record, for one command; what goes wrong with it ends the command with one line."""
    from app.record import open_store
    from feedback_store import StoreError

    try:
        with open_store(settings()) as store:
            yield store
    except (StoreError, OSError) as error:
        raise fail(str(error)) from None


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"no JSON for {type(value).__name__}")


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, datetime):
        return value.astimezone().strftime("%Y-%m-%d %H:%M")
    return escaped(str(value))


def printable(text: str) -> str:
    """`text` without control characters: what users said may not steer an operator's terminal."""
    return _CONTROLS.sub("", text)


def escaped(text: str) -> str:
    """`text`, printable, as rich shows it as it is."""
    from rich.markup import escape

    return escape(printable(text))
