"""Files in the chat: what a person attaches goes to the conversation, and only its owner's page can fetch from there.

They are served from here and not through gradio's cache, which knows no owner and keeps copies after an erasure.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from unicodedata import normalize

from fastapi import APIRouter, Request
from fastapi.responses import Response

from app.api.errors import ApiError, as_api_error
from app.api.files import own_files, send_file, send_image
from app.artifacts import file_path, files_in, image_path, images_in
from app.service import Service
from app.web.safe import as_link, as_words
from serving.trajectory import Observation
from tools.python.backend import File

Send = Callable[[Service, str, str, str], Awaitable[Response]]


def router(service: Service, owner_of: Callable[[Request], str | None]) -> APIRouter:
    """The routes that `left_behind` links to. `owner_of` is None for who hasn't logged in."""
    routes = APIRouter(prefix="/conversations")

    async def answered(send: Send, conversation_id: str, name: str, request: Request) -> Response:
        try:
            owner = owner_of(request)
            if owner is None:
                raise ApiError(401, "log in to the chat first.")
            return await send(service, owner, conversation_id, name)
        except Exception as error:
            return as_api_error(error).response()

    @routes.get("/{conversation_id}/files/{name}")
    async def file(conversation_id: str, name: str, request: Request) -> Response:
        return await answered(send_file, conversation_id, name, request)

    @routes.get("/{conversation_id}/images/{name}")
    async def image(conversation_id: str, name: str, request: Request) -> Response:
        return await answered(send_image, conversation_id, name, request)

    return routes


async def attach(
    service: Service, owner: str, conversation_id: str | None, uploads: Sequence[str]
) -> tuple[str, list[str]]:
    """Move `uploads`, which lie in gradio's folder for them, to the conversation, or to a new one where there is none.

    Returns the conversation and the files' names. All are kept or none; raises WorkspaceError, StoreError, ApiError,
    and FileNotFoundError for an upload that is there no more.
    """

    def read() -> list[File]:
        return [File(normalize("NFC", path.name), path.read_bytes()) for path in map(Path, uploads)]

    given = await service.call(read)
    if conversation_id is None:
        conversation_id = await service.call(service.store.create_conversation, owner)
    files = await own_files(service, owner, conversation_id)
    await service.call(files.write_all, conversation_id, given)
    for upload in uploads:
        await service.call(Path(upload).unlink, missing_ok=True)
    return conversation_id, [file.name for file in given]


def asked_with(text: str, names: Sequence[str]) -> str:
    """The question as the policy reads it: programs find the files in their working folder."""
    return f"{text}\n\nAttached files: {', '.join(names)}" if names else text


def shown_with(text: str, names: Sequence[str]) -> str:
    """The question as the page shows it."""
    return f"{text}\n\n*Attached: {', '.join(map(as_words, names))}*" if names else text


def left_behind(observation: Observation, conversation_id: str) -> str:
    """The figures that a program drew, as pictures, and the files that it wrote, as links; "" where it left nothing."""
    figures = [
        f"![Figure {number}](<{image_path(conversation_id, image.name)}>)"
        for number, image in enumerate(images_in(observation), start=1)
    ]
    links = [
        f"{as_link(file.name, file_path(conversation_id, file.name))} {size(file.bytes)}".rstrip()
        for file in files_in(observation)
    ]
    return "\n\n".join([*figures, "&emsp;".join(links)]).strip()


def size(count: int | None) -> str:
    """In words: 12 bytes, 3.4 kB, 5.6 MB; "" for None."""
    if count is None:
        return ""
    if count < 1_000:
        return f"{count} byte{'' if count == 1 else 's'}"
    return f"{count / 1_000:.1f} kB" if count < 999_950 else f"{count / 1_000_000:.1f} MB"
