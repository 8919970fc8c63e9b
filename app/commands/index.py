"""`whetstone index`: the folders of one's own documents that search reads, beside the bundled facts."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from typer.core import TyperGroup

from app.commands import console
from app.commands.console import AsJson

if TYPE_CHECKING:
    from tools.search import LocalIndex, Report

_SHOWN = 20  # files that were skipped; --json has all


class _FolderOrCommand(TyperGroup):
    """`whetstone index FOLDER` means `whetstone index add FOLDER`."""

    def resolve_command(self, ctx, args):  # type: ignore[no-untyped-def]  # click's types aren't typer's
        if args[0] not in self.commands:
            args = ["add", *args]
        return super().resolve_command(ctx, args)


index = typer.Typer(
    cls=_FolderOrCommand,
    invoke_without_command=True,
    help="Folders of your own documents that search reads: .txt, .md, .html, .pdf.",
)
Query = Annotated[str | None, typer.Option(help="Try the index with this question.")]
Folder = Annotated[Path, typer.Argument(help="A folder of .txt, .md, .html and .pdf files.")]


@index.callback()
def build(context: typer.Context, query: Query = None) -> None:
    """Build the local index: the bundled facts, and the folder that the setting `documents` names."""
    if context.invoked_subcommand:
        return
    from tools.search import open_library

    settings = console.settings()
    try:
        settings.home.mkdir(parents=True, exist_ok=True)
        with console.err.status("Indexing …"):
            library = open_library(settings.home, settings.documents)
    except OSError as error:
        raise console.fail(str(error)) from None
    console.out.print(
        f"The index is ready, over the bundled facts{f' and {settings.documents}' if settings.documents else ''}.",
        highlight=False,
        markup=False,
    )
    _try(library, query)


@index.command()
def add(folder: Folder, query: Query = None, as_json: AsJson = False) -> None:
    """Read a folder and have search use it, at once and from now on. Run it again after files have changed."""
    from tools.search import folders_of, index_folder, open_library

    settings = console.settings()
    try:
        with _progress() as progress:
            report = index_folder(folders_of(settings.home), folder.expanduser().absolute(), progress=progress)
    except OSError as error:
        raise console.fail(str(error)) from None
    if as_json:
        console.print_json(report)
    else:
        _tell(report)
        _warn(settings.search_backends)
    _try(open_library(settings.home) if query else None, query)


@index.command("list")
def show(as_json: AsJson = False) -> None:
    """List the folders that search reads."""
    from tools.search import folders_of, indexed_folders

    settings = console.settings()
    found = indexed_folders(folders_of(settings.home))
    if as_json:
        console.print_json(found)
        return
    documents = settings.documents.resolve() if settings.documents else None
    rows = []
    for item in found:
        used = "added" if item.added else "setting" if item.folder == documents else "not searched"
        state = used if item.present else f"{used}, gone"
        rows.append((item.folder, item.files, item.passages, item.skipped, state, item.read_at))
    columns = ["folder", "files", "passages", "skipped", "state", "read"]
    console.table("Indexed folders", columns, rows, "No folder is indexed: whetstone index add FOLDER")


@index.command()
def remove(folder: Folder, as_json: AsJson = False) -> None:
    """Forget a folder: search reads it no more. Its files stay as they are."""
    from tools.search import folders_of, remove_folder

    settings = console.settings()
    place = folder.expanduser().absolute()
    if not remove_folder(folders_of(settings.home), place):
        raise console.fail(f"{place} isn't indexed; `whetstone index list` shows what is.")
    if as_json:
        console.print_json({"removed": place})
        return
    console.out.print(f"Search reads {place} no more.", highlight=False, markup=False)
    if settings.documents and settings.documents.resolve() == place.resolve():
        console.out.print("The setting `documents` names it: it will be indexed again at the next start.", style="dim")


@contextmanager
def _progress() -> Iterator[Callable[[int, int, str], None]]:
    columns = (
        TextColumn("Reading"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[name]}", markup=False),
    )
    with Progress(*columns, console=console.err, transient=True) as shown:
        task = shown.add_task("", total=None, name="")
        yield lambda done, total, name: shown.update(task, completed=done, total=total, name=name[-40:])


def _tell(report: Report) -> None:
    files = f"{report.new} new, {report.changed} changed, {report.unchanged} unchanged, {report.removed} removed"
    text = f"{report.folder}: {files} files; {report.passages} passages."
    console.out.print(text, highlight=False, markup=False, soft_wrap=True)
    for notes, said in ((report.skipped, "skipped"), (report.partial, "in part")):
        for note in notes[:_SHOWN]:
            console.out.print(
                f"  {said}: {note.path} {note.reason}", style="yellow", highlight=False, markup=False, soft_wrap=True
            )
        if len(notes) > _SHOWN:
            console.out.print(f"  and {len(notes) - _SHOWN} more; --json has all", style="dim")


def _warn(backends: Sequence[str]) -> None:
    """Tell of settings by which the folder wouldn't be searched, or hardly ever."""
    if "local" not in backends:
        said = "search_backends lacks local: add it, or search won't read this folder."
    elif backends[0] != "local":
        said = f"Search asks {backends[0]} first, and your folders if that finds nothing: see search_backends."
    else:
        return
    console.out.print(said, style="yellow", highlight=False, markup=False, soft_wrap=True)


def _try(library: LocalIndex | None, query: str | None) -> None:
    if library is None or not query:
        return
    from tools.search import BackendUnavailable

    try:
        hits = asyncio.run(library.search(query, 3))
    except BackendUnavailable as error:
        raise console.fail(str(error)) from None
    for hit in hits:
        console.out.print(
            console.printable(f"{hit.title}  [{hit.url or hit.source}]"), style="bold", highlight=False, markup=False
        )
        console.out.print(console.printable(f"  {hit.text[:200]}"), highlight=False, markup=False)
    if not hits:
        console.out.print("Nothing found.", style="dim")
