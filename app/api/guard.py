"""Who may call: the key, the host name and the size of the body, checked before the body is read."""

from __future__ import annotations

import hmac
import re
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.errors import ApiError
from app.owners import LOCAL_OWNER, owner_of
from app.settings import Settings

OPEN_PATHS = frozenset({"/healthz"})
UPLOAD_PATH = re.compile(r"/v1/conversations/[^/]+/files")
FORM_BYTES = 1 << 20  # what a form adds to the files in it


class Guard:
    """ASGI middleware. Sets `scope["state"]["owner"]`: one owner a key, or `local` where no key is needed."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.app = app
        self._body = BodyLimit(settings.max_body_bytes, "WHETSTONE_MAX_BODY_BYTES")
        self._upload = BodyLimit((settings.files_mb << 20) + FORM_BYTES, "WHETSTONE_FILES_MB")
        self._keys = [key.get_secret_value().encode() for key in settings.api_keys]
        self._hosts = {"localhost", "127.0.0.1", "[::1]", settings.host}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        try:
            scope.setdefault("state", {})["owner"] = self._owner(headers, scope["path"])
            self._limit(scope).check(headers)
        except ApiError as error:
            await error.response()(scope, receive, send)
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

    def _owner(self, headers: Headers, path: str) -> str:
        if not self._keys:
            # Without keys only this machine may call. A web page elsewhere could still point a name of its own at
            # 127.0.0.1 (DNS rebinding); its requests carry that name.
            host = headers.get("host", "").rsplit(":", 1)[0] if "]" not in headers.get("host", "") else "[::1]"
            if host not in self._hosts:
                raise ApiError(403, f"host {host!r} isn't this machine: call 127.0.0.1, or set WHETSTONE_API_KEYS.")
            return LOCAL_OWNER
        if path in OPEN_PATHS:
            return LOCAL_OWNER
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not given:
            raise _unauthorized("no API key: send the header Authorization: Bearer KEY.", None)
        key = given.strip().encode()
        if not any([hmac.compare_digest(key, known) for known in self._keys]):  # all of them: constant time
            raise _unauthorized("this API key isn't known: use one from WHETSTONE_API_KEYS.", "invalid_api_key")
        return owner_of(key)

    def _limit(self, scope: Scope) -> BodyLimit:
        return self._upload if scope["method"] == "POST" and UPLOAD_PATH.fullmatch(scope["path"]) else self._body


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


def _unauthorized(message: str, code: str | None) -> ApiError:
    return ApiError(401, message, code, headers={"WWW-Authenticate": "Bearer"})
