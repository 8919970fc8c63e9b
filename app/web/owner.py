"""Whose conversation it is: this machine's, or on an open port the holder of the key that logged in."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import gradio as gr
from fastapi import FastAPI, Request
from starlette.responses import PlainTextResponse
from starlette.routing import Mount
from starlette.types import ASGIApp, Receive, Scope, Send

from app.keys import KeyRing, NotAKey
from app.owners import LOCAL_OWNER
from feedback_store import StoreError


def owner_of_request(request: gr.Request) -> str:
    return request.username or LOCAL_OWNER


def login(keys: KeyRing) -> Callable[[str, str], Awaitable[bool]] | None:
    """The page's login: an API key with the scope chat as the password. None where there is no key, since only this
    machine can call.

    The user name must be the key's owner name in the record (`key-…`), so that nobody can be somebody else.
    """
    keys.refresh()
    if not keys.needed:
        return None

    async def check(username: str, password: str) -> bool:
        try:
            holder = (await keys.refreshed()).holder(password.strip())
        except (NotAKey, StoreError):
            return False
        keys.used(holder)
        return username == holder.owner and "chat" in holder.scopes

    return check


class HoldersOnly:
    """ASGI middleware: ends the logins whose key was revoked or has expired, and the open page once there is a key.

    `logins` gives gradio's: the owner by the cookie's token; None for a page that was made without a login.
    """

    def __init__(self, app: ASGIApp, keys: KeyRing, logins: Callable[[], dict[str, str] | None]) -> None:
        self.app = app
        self._keys = keys
        self._logins = logins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket"):
            try:
                keys = await self._keys.refreshed()
            except StoreError as error:
                await PlainTextResponse(str(error), 503)(scope, receive, send)
                return
            logins = self._logins()
            if logins is None and keys.needed:
                said = "There is an API key now: restart `whetstone up`, so that the chat asks for it."
                await PlainTextResponse(said, 503)(scope, receive, send)
                return
            for token in [token for token, owner in (logins or {}).items() if not keys.may(owner, "chat")]:
                (logins or {}).pop(token, None)
        await self.app(scope, receive, send)


def page_of(app: FastAPI) -> gr.routes.App:
    """The page that gradio serves in `app`."""
    return next(route.app for route in app.routes if isinstance(route, Mount) and isinstance(route.app, gr.routes.App))


def owner_of_download(app: FastAPI, request: Request) -> str | None:
    """Who asks for a file beside the page that gradio serves in `app`; None without the cookie of gradio's login."""
    page = page_of(app)
    if page.auth is None:
        return LOCAL_OWNER
    for name in (f"access-token-{page.cookie_id}", f"access-token-unsecure-{page.cookie_id}"):
        if owner := page.tokens.get(request.cookies.get(name)):
            return str(owner)
    return None
