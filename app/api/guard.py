"""Who may call: the key, the host name and the size of the body, checked before the body is read."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from fastapi import Depends, Request
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.errors import ApiError, as_api_error
from app.keys import Holder, KeyRing, NotAKey
from app.owners import LOCAL_OWNER
from app.settings import Settings
from feedback_store import Scope as KeyScope
from feedback_store import StoreError

OPEN_PATHS = frozenset({"/healthz"})
UPLOAD_PATH = re.compile(r"/v1/conversations/[^/]+/files")
FORM_BYTES = 1 << 20  # what a form adds to the files in it


class Guard:
    """ASGI middleware. Sets `scope["state"]`: the `holder` of the key, and their `owner` in the record; `local` where
    no key is needed."""

    def __init__(self, app: ASGIApp, settings: Settings, keys: KeyRing) -> None:
        self.app = app
        self._settings = settings
        self._keys = keys
        self._body = BodyLimit(settings.max_body_bytes, "WHETSTONE_MAX_BODY_BYTES")
        self._upload = BodyLimit((settings.files_mb << 20) + FORM_BYTES, "WHETSTONE_FILES_MB")
        self._hosts = {"localhost", "127.0.0.1", "[::1]", settings.host}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        try:
            holder = await self._holder(headers, scope["path"])
            scope.setdefault("state", {}).update(holder=holder, owner=holder.owner)
            self._limit(scope).check(headers)
        except (ApiError, StoreError) as error:
            await as_api_error(error).response()(scope, receive, send)
            return
        limit = self._limit(scope)
        read = 0

        async def receive_within_limit() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > limit.bytes:  # sent in chunks, with no length up front
                raise limit.error()
            return message

        await self.app(scope, receive_within_limit, send)

    async def _holder(self, headers: Headers, path: str) -> Holder:
        if path in OPEN_PATHS and self._settings.api_keys:
            return self._keys.local  # whatever the store's state: this is how a probe hears of it
        keys = await self._keys.refreshed()
        if not keys.needed:
            self._check_local(headers)
            return keys.local
        if path in OPEN_PATHS:
            return keys.local
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not given:
            raise _unauthorized("no API key: send the header Authorization: Bearer KEY.", None)
        try:
            holder = keys.holder(given.strip())
        except NotAKey as error:
            raise _unauthorized(str(error), "invalid_api_key") from None
        keys.used(holder)
        return holder

    def _check_local(self, headers: Headers) -> None:
        """Without keys only this machine may call. A web page elsewhere could still point a name of its own at
        127.0.0.1 (DNS rebinding); its requests carry that name."""
        if not self._settings.is_loopback or "*" in self._settings.cors_origins:  # the last key has been forgotten
            raise _unauthorized("there is no API key: make one with `whetstone keys add NAME`.", None)
        host = headers.get("host", "").rsplit(":", 1)[0] if "]" not in headers.get("host", "") else "[::1]"
        if host not in self._hosts:
            raise ApiError(403, f"host {host!r} isn't this machine: call 127.0.0.1, or set WHETSTONE_API_KEYS.")
        origin = headers.get("origin")  # a page elsewhere may send a browser here without asking it first
        if origin and origin not in self._settings.cors_origins and _host_of(origin) not in self._hosts:
            raise ApiError(403, f"origin {origin[:80]!r} may not call: name it in WHETSTONE_CORS_ORIGINS.")

    def _limit(self, scope: Scope) -> BodyLimit:
        return self._upload if scope["method"] == "POST" and UPLOAD_PATH.fullmatch(scope["path"]) else self._body


def _host_of(origin: str) -> str:
    """As a Host header has it; empty for what is no origin of a server's, such as `null`."""
    try:
        host = urlsplit(origin).hostname or ""
    except ValueError:
        return ""
    return f"[{host}]" if ":" in host else host


@dataclass(frozen=True)
class BodyLimit:
    """`bytes` of a body, and the setting that raises it."""

    bytes: int
    setting: str

    def check(self, headers: Headers) -> None:
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length) > self.bytes:
            raise self.error()

    def error(self) -> ApiError:
        message = f"the body is over {self.bytes} bytes: send less, or raise {self.setting}."
        return ApiError(413, message, "too_large")


def needs(*scopes: KeyScope) -> Any:
    """A route's dependency: a key with one of `scopes`."""

    def check(request: Request) -> None:
        holder: Holder = request.state.holder
        if any(scope in holder.scopes for scope in scopes):
            return
        if holder.owner == LOCAL_OWNER:
            raise ApiError(
                403,
                f"this takes a key with the scope {scopes[0]}, even on this machine: make one with `whetstone keys add "
                f"NAME --scope {scopes[0]}`, or set WHETSTONE_ADMIN_OPEN_ON_LOOPBACK.",
                "missing_scope",
            )
        raise ApiError(
            403,
            f"the API key {holder.name!r} lacks the scope {scopes[0]}; it has {', '.join(holder.scopes)}. "
            f"Use one that was made with --scope {scopes[0]}.",
            "missing_scope",
        )

    return Depends(check)


def _unauthorized(message: str, code: str | None) -> ApiError:
    return ApiError(401, message, code, headers={"WWW-Authenticate": "Bearer"})
