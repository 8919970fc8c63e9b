"""/v1/conversations: a conversation to upload into, its files and its figures, for its owner alone."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Annotated, Any, ParamSpec, TypeVar
from unicodedata import normalize
from urllib.parse import quote

from fastapi import APIRouter, Body, Request
from fastapi.responses import Response, StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.types import Receive, Scope, Send

from app.api.errors import ApiError
from app.api.schema import ConversationRequest
from app.artifacts import file_path
from app.service import Service
from tools.file_rules import UNKNOWN, media_type_of
from tools.python.backend import File
from tools.workspace import FileInfo, Workspaces

P = ParamSpec("P")
T = TypeVar("T")

# Shown, saved or drawn by a browser, and nothing else; whatever isn't named here comes as bytes of no kind.
HARMLESS = frozenset(
    {"text/plain", "text/csv", "application/json", "application/zip", "image/png", "image/jpeg", "image/gif"}
)
_SAFE_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'; sandbox",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "private, no-store",
}
_CHUNK = 256 << 10
_MULTIPART = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": {"files": {"type": "array", "items": {"type": "string", "format": "binary"}}},
                }
            }
        },
    }
}


def router(service: Service) -> APIRouter:
    routes = APIRouter(prefix="/v1/conversations")

    @routes.post("", summary="Begin an empty conversation, to upload into before the first question")
    async def begin(request: Request, body: Annotated[ConversationRequest | None, Body()] = None) -> dict[str, Any]:
        owner: str = request.state.owner
        id_ = await service.call(service.store.create_conversation, owner)
        made = await service.call(service.store.conversation, id_)
        return {"id": id_, "object": "conversation", "created_at": int(made.created_at.timestamp()), "metadata": {}}

    @routes.post("/{conversation_id}/files", summary="Upload files: all are kept or none", openapi_extra=_MULTIPART)
    async def upload(conversation_id: str, request: Request) -> dict[str, Any]:
        files = await own_files(service, request.state.owner, conversation_id)
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "multipart/form-data":
            raise ApiError(400, "send the files as multipart/form-data, each in a part `files`.", "invalid_body")
        async with request.form(max_fields=100) as form:
            parts = [part for _, part in form.multi_items() if isinstance(part, UploadFile)]
            if not parts:
                raise ApiError(400, "files: the form has no file; send each in a part `files`.", "missing", "files")
            given = [File(normalize("NFC", part.filename or ""), await part.read()) for part in parts]
        kept = await _kept(files.write_all, conversation_id, given)
        return {"object": "list", "data": [described(conversation_id, info) for info in kept]}

    @routes.get("/{conversation_id}/files", summary="The conversation's files, uploaded and written, by name")
    async def listing(conversation_id: str, request: Request) -> dict[str, Any]:
        files = await own_files(service, request.state.owner, conversation_id)
        found = await _kept(files.files, conversation_id)
        return {"object": "list", "data": [described(conversation_id, info) for info in found]}

    @routes.get("/{conversation_id}/files/{name}", summary="Download a file", response_class=Response)
    async def download(conversation_id: str, name: str, request: Request) -> Response:
        return await send_file(service, request.state.owner, conversation_id, name)

    @routes.delete("/{conversation_id}/files/{name}", summary="Delete a file")
    async def delete(conversation_id: str, name: str, request: Request) -> dict[str, Any]:
        files = await own_files(service, request.state.owner, conversation_id)
        await _kept(files.remove, conversation_id, name)
        return {"name": name, "object": "whetstone.file", "deleted": True}

    @routes.get("/{conversation_id}/images/{name}", summary="A figure that a program drew", response_class=Response)
    async def image(conversation_id: str, name: str, request: Request) -> Response:
        return await send_image(service, request.state.owner, conversation_id, name)

    return routes


def described(conversation_id: str, info: FileInfo) -> dict[str, Any]:
    return {
        "object": "whetstone.file",
        "name": info.name,
        "bytes": info.bytes,
        "media_type": info.media_type,
        "modified_at": info.modified_at.isoformat(),
        "path": f"/v1/{file_path(conversation_id, info.name)}",
    }


async def own_files(service: Service, owner: str, conversation_id: str) -> Workspaces:
    """The files, for the owner of the conversation. Raises NotFound for anybody else, and ApiError without files."""

    await service.call(service.own_conversation, conversation_id, owner)
    if service.workspaces is None:
        raise ApiError(503, "this server keeps no files.", "files_unavailable")
    return service.workspaces


async def send_file(service: Service, owner: str, conversation_id: str, name: str) -> Response:
    """The file, to be saved: a browser neither shows nor runs it."""
    files = await own_files(service, owner, conversation_id)
    media_type = media_type_of(name)
    return Download(
        await _kept(files.open, conversation_id, name),
        media_type if media_type in HARMLESS else UNKNOWN,
        {"Content-Disposition": attachment(name)},
    )


async def send_image(service: Service, owner: str, conversation_id: str, name: str) -> Response:
    """A figure, to be shown: it was checked to be a PNG when it was kept."""
    files = await own_files(service, owner, conversation_id)
    return Download(await _kept(files.open_image, conversation_id, name), "image/png", {})


class Download(StreamingResponse):
    """An open file, sent bit by bit, and closed however that ends."""

    def __init__(self, file: io.BufferedReader, media_type: str, headers: dict[str, str]) -> None:
        size = file.seek(0, io.SEEK_END)
        file.seek(0)
        super().__init__(
            iter(lambda: file.read(_CHUNK), b""),
            media_type=media_type,
            headers=_SAFE_HEADERS | headers | {"Content-Length": str(size)},
        )
        self._file = file

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._file.close()


def attachment(name: str) -> str:
    """Content-Disposition for any name: RFC 6266, with ASCII for clients that know no better."""
    plain = "".join(character if character.isascii() and character not in '"\\%' else "_" for character in name)
    return f"attachment; filename=\"{plain}\"; filename*=UTF-8''{quote(name, safe='')}"


async def _kept(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """A call to the disk, off the event loop; a disk that fails is told as such."""
    try:
        return await run_in_threadpool(function, *args, **kwargs)
    except OSError as error:
        why = error.strerror or type(error).__name__
        raise ApiError(503, f"the files can't be reached on the server's disk: {why}.", "files_unavailable") from error
