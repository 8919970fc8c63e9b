"""Answers on their way to a client: server-sent events, the headers that name an answer, and a client that leaves."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import Response, StreamingResponse
from starlette.types import Send

from app.service import Started

T = TypeVar("T")
UNBUFFERED = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
_LINE_BREAKS = {ord(mark): f"\\u{ord(mark):04x}" for mark in "\x85\u2028\u2029"}


class EventStream(StreamingResponse):
    """Server-sent events whose source is closed, and so cancelled, as soon as the client goes away."""

    media_type = "text/event-stream"

    async def stream_response(self, send: Send) -> None:
        async with aclosing(self.body_iterator):  # type: ignore[type-var]
            await super().stream_response(send)


class ClientGone(Exception):
    """Nobody waits for the answer any more; its turns are closed as cancelled."""


NOBODY_READS = Response(status_code=499)  # as nginx writes it in its log


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """What `work` returns or raises. It is cancelled, and ClientGone raised, as soon as the client goes away."""
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientGone
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def answer_headers(started: Started) -> dict[str, str]:
    return {"X-Whetstone-Version": started.version, "X-Whetstone-Turn": started.turn_id}


def sse(payload: str, event: str | None = None) -> str:
    """A server-sent event. What many clients take for the end of a line, and JSON may hold as it is, is escaped."""
    named = f"event: {event}\n" if event else ""
    return f"{named}data: {payload.translate(_LINE_BREAKS)}\n\n"
