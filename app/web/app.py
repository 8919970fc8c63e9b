"""The chat page as an ASGI application of its own, which a browser can use without asking any other host."""

from __future__ import annotations

import os

os.environ.update(GRADIO_ANALYTICS_ENABLED="False", HF_HUB_OFFLINE="1")  # read when gradio is imported

import gradio as gr
from fastapi import FastAPI
from starlette.datastructures import MutableHeaders
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.keys import KeyRing
from app.service import Service
from app.settings import Settings
from app.web import files, page
from app.web.owner import HoldersOnly, login, owner_of_download, page_of
from app.web.theme import theme

# The page's own scripts are inline; everything comes from here. So whatever a model or a search result writes,
# a browser sends nothing anywhere else.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; worker-src 'self' blob:; "
    "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'self'"
)


class OwnHostOnly:
    """ASGI middleware: the content policy on every page that has none of its own."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.setdefault("Content-Security-Policy", POLICY)  # a download has a stricter one
                headers["Referrer-Policy"] = "no-referrer"
            await send(message)

        await self.app(scope, receive, send_with_policy if scope["type"] == "http" else send)


def create_web(service: Service, settings: Settings) -> FastAPI:
    app = FastAPI(title="Whetstone chat", docs_url=None, redoc_url=None, openapi_url=None)
    keys = KeyRing(service.store, settings)
    check = login(keys)
    app.add_middleware(OwnHostOnly)
    app.add_middleware(HoldersOnly, keys=keys, logins=lambda: page_of(app).tokens if check else None)
    if check is None:  # only this machine: see app.api.guard on DNS rebinding
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=["localhost", "127.0.0.1", "[::1]", settings.host])
    app.include_router(files.router(service, lambda request: owner_of_download(app, request)))
    mounted: FastAPI = gr.mount_gradio_app(
        app,
        page.build(service, settings),
        path="/",
        server_name=settings.host,
        server_port=settings.web_port,
        footer_links=[],
        run_history=False,
        auth=check,
        auth_message="The password is an API key; the user name is its owner (key-…), as `whetstone` prints it.",
        ssr_mode=False,
        theme=theme(),
        css_paths=[page.STYLE],
        max_file_size=settings.files_mb << 20,
    )
    return mounted
