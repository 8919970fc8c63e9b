"""The endpoint as one ASGI application: OpenAI's chat routes, feedback, health."""

from __future__ import annotations

from fastapi import FastAPI
from fastapi.responses import JSONResponse
from starlette.middleware.cors import CORSMiddleware

from app.api import admin, chat, consent, conversations, errors, feedback, files, metrics, models
from app.api.guard import Guard, needs
from app.api.limits import Limits
from app.api.responses import routes as responses
from app.keys import KeyRing
from app.logs import RequestIds
from app.service import Service
from app.settings import Settings


def create_app(service: Service, settings: Settings) -> FastAPI:
    app = FastAPI(
        title="Whetstone",
        description="A chat agent that gets better overnight. The routes under /v1 are OpenAI's.",
        docs_url=None,  # the documentation page would load its scripts from a host elsewhere
        redoc_url=None,
    )
    errors.install(app)
    app.include_router(chat.router(service, settings), dependencies=[needs("chat")])
    app.include_router(responses.router(service, settings), dependencies=[needs("chat")])
    app.include_router(models.router(service, settings), dependencies=[needs("chat")])
    app.include_router(feedback.router(service), dependencies=[needs("feedback")])
    app.include_router(files.router(service), dependencies=[needs("chat")])
    app.include_router(conversations.router(service, settings), dependencies=[needs("chat")])
    app.include_router(consent.router(service), dependencies=[needs("chat")])
    app.include_router(metrics.router(service), dependencies=[needs("metrics", "admin")])
    app.include_router(admin.router(service), dependencies=[needs("admin")])

    @app.get("/healthz", summary="200 when the engine and the store answer, else 503 and which doesn't")
    async def healthz() -> JSONResponse:
        healthy, report = await service.health()
        return JSONResponse(report, 200 if healthy else 503)

    # The last one added is the outermost: the id, the count, origins, the key, its limits.
    app.add_middleware(Limits, settings=settings)
    app.add_middleware(Guard, settings=settings, keys=KeyRing(service.store, settings))
    if settings.cors_origins:  # a key travels in a header and never in a cookie, so no credentials
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=["*"],
        )
    app.add_middleware(metrics.Counted, metrics=service.metrics)
    app.add_middleware(RequestIds)
    return app
