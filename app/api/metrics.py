"""GET /metrics for Prometheus, and the count of what the endpoint was asked and answered."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import Response
from prometheus_client.exposition import choose_encoder
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.metrics import Metrics
from app.service import Service
from feedback_store import StoreError
from serving.engines.base import EngineError

_METHODS = frozenset({"GET", "POST", "DELETE", "OPTIONS", "HEAD", "PUT", "PATCH"})


def router(service: Service) -> APIRouter:
    routes = APIRouter()
    metrics = service.metrics

    @routes.get("/metrics", summary="For Prometheus", response_class=Response)
    async def scrape(request: Request) -> Response:
        metrics.running.set(service.in_flight)
        metrics.in_service.clear()
        try:
            metrics.engine_up.set((await service.engine.health()).get("ok") is True)
            metrics.in_service.labels(service.router.current).set(1)
        except EngineError:
            metrics.engine_up.set(0)
        try:
            stats = await service.call(service.store.queue_stats)
            for state in ("pending", "claimed", "done", "dead"):
                metrics.queue.labels(state).set(stats[state])
        except StoreError:
            metrics.queue.clear()  # no number rather than an old one
        encode, media_type = choose_encoder(request.headers.get("accept", ""))
        return Response(await service.call(encode, metrics.registry), media_type=media_type)

    return routes


class Counted:
    """ASGI middleware: counts each request by its route, never by its path, which anybody can make up."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self._requests = metrics.requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = 500

        async def send_and_see(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, send_and_see)
        finally:
            route = getattr(scope.get("route"), "path", "none")
            method = scope["method"] if scope["method"] in _METHODS else "other"
            self._requests.labels(method, route, str(status)).inc()
