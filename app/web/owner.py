"""Whose conversation it is: this machine's, or on an open port the holder of the key that logged in."""

from __future__ import annotations

import hmac
from collections.abc import Callable

import gradio as gr
from fastapi import FastAPI, Request
from starlette.routing import Mount

from app.owners import LOCAL_OWNER, owner_of
from app.settings import Settings


def owner_of_request(request: gr.Request) -> str:
    return request.username or LOCAL_OWNER


def login(settings: Settings) -> Callable[[str, str], bool] | None:
    """The page's login: an API key as the password. None where no key is set, since only this machine can call.

    The user name must be the key's owner name in the record (`key-…`), so that nobody can be somebody else.
    """
    keys = [key.get_secret_value().encode() for key in settings.api_keys]
    if not keys:
        return None

    def check(username: str, password: str) -> bool:
        given = password.strip().encode()
        known = any([hmac.compare_digest(given, key) for key in keys])
        return known and username == owner_of(given)

    return check


def owner_of_download(app: FastAPI, settings: Settings, request: Request) -> str | None:
    """Who asks for a file beside the page that gradio serves in `app`; None without the cookie of gradio's login."""
    if not settings.api_keys:
        return LOCAL_OWNER
    page = next(route.app for route in app.routes if isinstance(route, Mount) and isinstance(route.app, gr.routes.App))
    for name in (f"access-token-{page.cookie_id}", f"access-token-unsecure-{page.cookie_id}"):
        if owner := page.tokens.get(request.cookies.get(name)):
            return str(owner)
    return None
