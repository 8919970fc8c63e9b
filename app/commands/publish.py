"""`whetstone versions add`: an operator's own weights as a version."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from app.commands import console

if TYPE_CHECKING:
    from app.settings import Settings
    from serving.model import BaseModel

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_OF_A_RUN = re.compile(r"v\d+")


def add(
    folder: Annotated[Path, typer.Argument(help="A transformers folder with full weights of the served model.")],
    id_: Annotated[str | None, typer.Option("--id", help="The version's name; default: the folder's.")] = None,
    parent: Annotated[str | None, typer.Option(help="The version that they were made from.")] = None,
) -> None:
    """Publish full weights as a version: checked against the served model, and copied. `use` puts it in service."""
    settings = console.settings()
    name = id_ or folder.expanduser().absolute().name
    if not _ID.fullmatch(name):
        raise console.fail(f"{name!r} is no version's id: letters, digits, dots, dashes. Give one with --id.")
    if _OF_A_RUN.fullmatch(name):
        raise console.fail(f"{name!r} is how runs name their versions: give another one with --id.")
    from feedback_store import NotFound
    from serving.full_weights import ForeignWeights, write_weights

    with console.opened_store() as store:
        if name in {version.id for version in store.versions()}:
            raise console.fail(f"there is a version {name!r} already: give another one with --id.")
        if parent is not None:
            try:
                store.version(parent)
            except NotFound as error:
                raise console.fail(str(error)) from None
        target = settings.home / "versions" / name
        try:
            manifest = write_weights(folder.expanduser().absolute(), target, _base(settings), parent)
        except (ForeignWeights, OSError) as error:
            raise console.fail(str(error)) from None
        store.add_version(name, parent, str(target), manifest.model_dump(), "published")
    console.out.print(f"[bold]{name}[/] is published: `whetstone versions use {name}` puts it in service.")


def _base(settings: Settings) -> BaseModel:
    from serving.model import ModelMissing, folder_model, prepare_base

    if settings.engine_model is not None:
        return folder_model(Path(settings.engine_model).expanduser())
    if settings.engine_urls:
        raise console.fail("which model is served isn't known here: set engine_model to a folder with it.")
    try:
        return prepare_base(settings.home)
    except ModelMissing as error:
        raise console.fail(str(error)) from None
