"""`whetstone data export`: the record as files for other tools."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from app.commands import console
from app.commands.console import AsJson

if TYPE_CHECKING:
    from app.export import Format
    from feedback_store.selection import Judged

Moment = Annotated[
    datetime | None, typer.Option(formats=["%Y-%m-%d", "%Y-%m-%dT%H:%M"], metavar="DATE", help="In UTC: 2026-01-31.")
]


def export(
    path: Annotated[Path, typer.Argument(help="A .jsonl or .parquet file, or a folder to put one in.")],
    format: Annotated[
        str, typer.Option(help="openai, trl-sft, trl-grpo, trl-preference or raw: docs/store.md shows each.")
    ] = "openai",
    parquet: Annotated[bool, typer.Option("--parquet", help="In a folder: Parquet instead of JSON lines.")] = False,
    owner: Annotated[str | None, typer.Option(help="Whose.")] = None,
    outcome: Annotated[str | None, typer.Option(help="right, wrong or none: the verdict on a turn.")] = None,
    version: Annotated[str | None, typer.Option(help="That wrote the turn.")] = None,
    since: Moment = None,
    until: Moment = None,
    tokens: Annotated[bool, typer.Option("--tokens", help="raw: token ids, logprobs and masks, too.")] = False,
    redact: Annotated[bool, typer.Option("--redact", help="Take out e-mail addresses, numbers and the like.")] = False,
    service_only: Annotated[
        bool, typer.Option("--include-service-only", help="raw: also of owners who don't consent to training.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write turns to a file, of owners who consent to training. All of it, or no file."""
    from app.export import ExportFailed
    from app.export import export as write
    from app.redaction import RedactionMissing, redactor
    from feedback_store.selection import Selection

    if service_only and format != "raw":
        raise console.fail("--include-service-only goes with --format raw: the other formats are for training.")
    to_folder = path.is_dir() or not path.suffix  # of another name that ends like a file's, the export says so
    file = path / f"{format}.{'parquet' if parquet else 'jsonl'}" if to_folder else path
    begun, ended = (moment and moment.replace(tzinfo=UTC) for moment in (since, until))
    selection = Selection(owner, cast("Judged | None", outcome), version, None, begun, ended, not service_only)
    from rich.progress import Progress

    try:
        with console.opened_store() as store, Progress(console=console.err, transient=True) as bars:
            total = None if format in ("trl-grpo", "trl-preference") else store.count_turns(selection)
            bar = bars.add_task("exporting", total=total)
            done = write(
                store, file, cast("Format", format), selection, redact=redactor() if redact else None, tokens=tokens,
                force=force, progress=lambda read: bars.update(bar, completed=read),
            )  # fmt: skip
    except (ExportFailed, RedactionMissing) as error:
        raise console.fail(str(error)) from None
    if as_json:
        console.print_json(done)
        return
    said = f"{done.rows} rows in {console.escaped(str(done.file))}" if done.rows else "0 rows: no file was written."
    console.out.print(said, highlight=False, soft_wrap=True)
    for reason, n in done.left_out.items():
        console.out.print(f"{n} left out: {console.escaped(reason)}", style="dim", highlight=False)
