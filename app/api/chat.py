"""POST /v1/chat/completions and GET /v1/models."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Send

from app.api import choices, wire
from app.api.asked import to_messages, to_terms
from app.api.errors import ApiError, as_api_error
from app.api.schema import ChatRequest
from app.service import Finished, Question, Service, ServiceEvent, Started
from app.settings import Settings
from serving.engines.base import Sampling

Events = AsyncGenerator[tuple[int, ServiceEvent]]
_SEEDS = 2**31  # an engine's seeds are 32 bits wide; a client's may be any number


_LINE_BREAKS = {ord(mark): f"\\u{ord(mark):04x}" for mark in "\x85\u2028\u2029"}


class EventStream(StreamingResponse):
    """Server-sent events whose source is closed, and so cancelled, as soon as the client goes away."""

    media_type = "text/event-stream"

    async def stream_response(self, send: Send) -> None:
        async with aclosing(self.body_iterator):  # type: ignore[type-var]
            await super().stream_response(send)


def router(service: Service, settings: Settings) -> APIRouter:
    routes = APIRouter(prefix="/v1")

    @routes.post("/chat/completions", summary="Answer a conversation")
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        question = to_question(body, request.state.owner, settings, request.state.request_id)
        answers = [service.answer(each) for each in choices.questions(question, body.n or 1)]
        started = await choices.begin(answers)
        events = choices.together(answers)
        if body.stream:
            include_usage = bool(body.stream_options and body.stream_options.include_usage)
            return await _stream(events, started, include_usage)
        return await _whole(events, started, request, bool(body.logprobs))

    @routes.get("/models", summary="The version in service, then the others that can be asked for")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": await _models(service, settings)}

    @routes.get("/models/{model_id:path}")
    async def model(model_id: str) -> dict[str, Any]:
        models = await _models(service, settings)
        for entry in models:
            if entry["id"] == model_id:
                return entry
        names = ", ".join(entry["id"] for entry in models)
        raise ApiError(404, f"there is no model {model_id!r}; there are {names}.", "model_not_found", "model")

    return routes


def to_question(body: ChatRequest, owner: str, settings: Settings, request_id: str) -> Question:
    """The request, checked, with the settings' defaults where it leaves something open. Raises ApiError."""
    if refused := body.unsupported():
        param, message = refused
        raise ApiError(400, message, "unsupported_parameter", param)
    metadata = body.metadata
    if (body.n or 1) > 1 and metadata and metadata.conversation_id:
        raise ApiError(
            400,
            "n: a conversation goes on with one answer. Leave metadata.conversation_id out, or send n = 1.",
            "invalid_value",
            "n",
        )
    asked = body.max_completion_tokens or body.max_tokens or settings.max_tokens
    return Question(
        owner=owner,
        messages=to_messages(body.messages),
        sampling=Sampling(
            temperature=settings.temperature if body.temperature is None else body.temperature,
            top_p=settings.top_p if body.top_p is None else body.top_p,
            max_tokens=min(asked, settings.max_tokens),
            seed=None if body.seed is None else body.seed % _SEEDS,
        ),
        conversation_id=metadata.conversation_id if metadata else None,
        version=None if body.model == settings.model_name else body.model,
        verifier=metadata.verifier if metadata else None,
        gold=metadata.gold if metadata else None,
        gold_expires_at=metadata.gold_expires_at if metadata else None,
        terms=to_terms(body),
        server_tools=metadata is None or metadata.server_tools == "all",
        request_id=request_id,
    )


async def _whole(events: Events, started: Sequence[Started], request: Request, logprobs: bool) -> Response:
    answers = [wire.Answered(logprobs) for _ in started]
    async with aclosing(events):
        async for index, event in events:
            answers[index].feed(event)
            if await request.is_disconnected():
                return Response(status_code=499)  # nobody reads it; the turns are closed as cancelled
    return JSONResponse(wire.completion(answers).model_dump(exclude_unset=True), headers=_headers(started[0]))


async def _stream(events: Events, started: Sequence[Started], include_usage: bool) -> Response:
    # An error before the first token still has a status of its own, so wait for that token before saying 200.
    first = await anext(events)
    return EventStream(
        _events(events, started, first, include_usage),
        headers=_headers(started[0]) | {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
    )


async def _events(
    events: Events,
    started: Sequence[Started],
    first: tuple[int, ServiceEvent],
    include_usage: bool,
) -> AsyncGenerator[str]:
    made = int(time.time())
    answers = [wire.Chunks(one, index, started[0], made) for index, one in enumerate(started)]
    finished: list[Finished] = []
    async with aclosing(events):
        try:
            for chunks in answers:
                yield _data(chunks.first().model_dump_json(exclude_unset=True))
            step: tuple[int, ServiceEvent] | None = first
            while step is not None:
                index, event = step
                if isinstance(event, Finished):
                    finished.append(event)
                    for chunk in answers[index].last(event):
                        yield _data(chunk.model_dump_json(exclude_unset=True))
                elif not isinstance(event, Started) and (more := answers[index].event(event)) is not None:
                    yield _data(more.model_dump_json(exclude_unset=True))
                step = await anext(events, None)
            if include_usage:
                yield _data(answers[0].usage(finished).model_dump_json(exclude_unset=True))
        except Exception as error:
            yield _data(json.dumps(as_api_error(error).body))
            return
        yield _data("[DONE]")


async def _models(service: Service, settings: Settings) -> list[dict[str, Any]]:
    """The name that means the version in service, that version, then the other published ones, newest first."""
    current = service.router.current
    loaded = service.router.loaded()
    published = [v for v in await service.call(service.store.versions) if v.status == "published"]
    known = {version.id: version for version in published}
    others = [version.id for version in reversed(published) if version.id != current]

    def entry(name: str, id_: str) -> dict[str, Any]:
        version = known.get(id_)
        created = int(version.created_at.timestamp()) if version else 0
        parent = version.parent if version else None
        details = {"version": id_, "parent": parent, "current": id_ == current, "loaded": id_ in loaded}
        return {"id": name, "object": "model", "created": created, "owned_by": "whetstone", "whetstone": details}

    return [entry(settings.model_name, current), *[entry(id_, id_) for id_ in (current, *others)]]


def _headers(started: Started) -> dict[str, str]:
    return {"X-Whetstone-Version": started.version, "X-Whetstone-Turn": started.turn_id}


def _data(payload: str) -> str:
    """An event. What many clients take for the end of a line, and JSON may hold as it is, is escaped."""
    return f"data: {payload.translate(_LINE_BREAKS)}\n\n"
