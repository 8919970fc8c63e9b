"""Log lines for people, or as JSON for a collector, each with the id of the request that it belongs to."""

from __future__ import annotations

import json
import logging
import re
import time
import uuid
from contextvars import ContextVar
from datetime import UTC, datetime

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.settings import Settings

request_id: ContextVar[str] = ContextVar("request_id", default="")
trace_ids: ContextVar[tuple[str, str] | None] = ContextVar("trace_ids", default=None)
"""Of the request's span, (trace, span), where traces are on."""
access = logging.getLogger("whetstone.access")
_GIVEN = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_EXTRAS = ("method", "path", "status", "seconds", "owner")


class JsonLines(logging.Formatter):
    """One JSON object a line: time (UTC), level, logger, message, request_id, trace_id, span_id, exception; of a
    request its fields."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if said := getattr(record, "request_id", "") or request_id.get():
            line["request_id"] = said
        if ids := trace_ids.get():
            line["trace_id"], line["span_id"] = ids
        line |= {name: value for name in _EXTRAS if (value := getattr(record, name, None)) is not None}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


class ForPeople(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        said, ids = request_id.get(), trace_ids.get()
        traced = f", trace {ids[0]}" if ids else ""
        return super().format(record) + (f" [request {said}{traced}]" if said else "")


def set_up(settings: Settings) -> None:
    """For a process that serves: everything goes to standard error, in the format and from the level that are set."""
    handler = logging.StreamHandler()
    plain = ForPeople("%(asctime)s %(levelname)s %(name)s: %(message)s")
    handler.setFormatter(JsonLines() if settings.log_format == "json" else plain)
    logging.basicConfig(level=settings.log_level.upper(), handlers=[handler], force=True)
    for chatty in ("httpx", "httpcore", "asyncio"):
        logging.getLogger(chatty).setLevel(logging.WARNING)


class RequestIds:
    """ASGI middleware: the client's X-Request-Id, or a new one, in the state, the log, the record and the answer; and
    a line for each request (level info). The query isn't logged, nor what was said."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        id_ = given if _GIVEN.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = id_
        token = request_id.set(id_)
        began = time.perf_counter()
        status = 500

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = id_
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        finally:
            method, path = scope["method"], scope["path"]
            seconds = round(time.perf_counter() - began, 3)
            extra = {"method": method, "path": path, "status": status, "seconds": seconds,
                     "owner": scope["state"].get("owner"), "request_id": id_}  # fmt: skip
            access.info("%s %r %d in %.3f s", method, path, status, seconds, extra=extra)
            request_id.reset(token)
