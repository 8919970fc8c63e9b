"""POST /v1/chat/completions."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic_core import to_json

from app.api import choices, wire
from app.api.asked import make_question, said_in_chat, to_messages, to_sampling, to_terms
from app.api.errors import ApiError, as_api_error
from app.api.limits import take_places
from app.api.schema import ChatRequest
from app.api.streaming import (
    NOBODY_READS,
    UNBUFFERED,
    ClientGone,
    EventStream,
    answer_headers,
    sse,
    while_connected,
)
from app.service import Finished, Question, Service, ServiceEvent, Started
from app.settings import Settings

Answering = AsyncGenerator[ServiceEvent]
Events = AsyncGenerator[tuple[int, ServiceEvent]]


def router(service: Service, settings: Settings) -> APIRouter:
    routes = APIRouter(prefix="/v1")

    @routes.post("/chat/completions", summary="Answer a conversation")
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        question = to_question(body, request.state.owner, settings, request.state.request_id)
        take_places(request, (body.n or 1) - 1)
        answers = [service.answer(each) for each in choices.questions(question, body.n or 1)]
        include_usage = bool(body.stream_options and body.stream_options.include_usage)
        answering = _stream(answers, include_usage) if body.stream else _whole(answers, bool(body.logprobs))
        try:
            return await while_connected(request, answering)
        except ClientGone:
            return NOBODY_READS

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
    asked = body.max_completion_tokens or body.max_tokens
    return make_question(
        settings,
        owner,
        request_id,
        body.model,
        metadata,
        messages=to_messages(said_in_chat(body.messages)),
        sampling=to_sampling(settings, body.temperature, body.top_p, asked, body.seed),
        terms=to_terms(body),
    )


async def _whole(begun: Sequence[Answering], logprobs: bool) -> Response:
    started = await choices.begin(begun)
    answers = [wire.Answered(logprobs) for _ in started]
    async with aclosing(choices.together(begun)) as events:
        async for index, event in events:
            answers[index].feed(event)
    return JSONResponse(wire.completion(answers).model_dump(exclude_unset=True), headers=answer_headers(started[0]))


async def _stream(begun: Sequence[Answering], include_usage: bool) -> Response:
    started = await choices.begin(begun)
    events = choices.together(begun)
    # An error before the first token still has a status of its own, so wait for that token before saying 200.
    first = await anext(events)
    return EventStream(_events(events, started, first, include_usage), headers=answer_headers(started[0]) | UNBUFFERED)


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
                yield _event(chunks.first())
            step: tuple[int, ServiceEvent] | None = first
            while step is not None:
                index, event = step
                if isinstance(event, Finished):
                    finished.append(event)
                    for chunk in answers[index].last(event):
                        yield _event(chunk)
                elif not isinstance(event, Started) and (more := answers[index].event(event)) is not None:
                    yield _event(more)
                step = await anext(events, None)
            if include_usage:
                yield _event(answers[0].usage(finished))
        except Exception as error:
            yield _event(as_api_error(error).body)
            return
        yield sse("[DONE]")


def _event(payload: wire.Chunk) -> str:
    return sse(to_json(payload).decode())
