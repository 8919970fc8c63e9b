"""`whetstone index`: the local search index, made ahead of the first question."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from app.commands import console


def index(
    documents: Annotated[
        Path | None, typer.Argument(help="A folder of .txt and .md files; default: the setting `documents`.")
    ] = None,
    query: Annotated[str | None, typer.Option(help="Try the index with this question.")] = None,
) -> None:
    """Build the local search index over the bundled facts and a folder of documents."""
    settings = console.settings()
    folder = (documents.expanduser().absolute() if documents else None) or settings.documents
    import asyncio

    from tools.search import open_library

    settings.home.mkdir(parents=True, exist_ok=True)
    try:
        with console.out.status("Indexing …"):
            library = open_library(settings.home, folder)
    except OSError as error:
        raise console.fail(str(error)) from None
    console.out.print(f"The index is ready, over the bundled facts{f' and {folder}' if folder else ''}.")
    if folder != settings.documents:
        console.out.print(f'To serve with it, put documents = "{folder}" into whetstone.toml.', style="dim")
    if query:
        for hit in asyncio.run(library.search(query, 3)):
            console.out.print(f"[bold]{hit.title}[/]  {hit.text[:200]}", highlight=False)
