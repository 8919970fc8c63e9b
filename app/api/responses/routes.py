"""/v1/responses: answer, read back, delete, and what a response was asked with."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, Response
from openai.types.responses import ResponseItemList

from app.api.errors import ApiError, as_api_error
from app.api.responses import wire
from app.api.responses.asked import ANSWERED, Before, check, context_of, to_question
from app.api.responses.events import Events
from app.api.responses.schema import ResponseRequest
from app.api.streaming import (
    NOBODY_READS,
    UNBUFFERED,
    ClientGone,
    EventStream,
    answer_headers,
    sse,
    while_connected,
)
from app.api.wire import url_citations
from app.erasure import sweep
from app.service import Finished, Service, ServiceEvent, Started
from app.settings import Settings
from feedback_store import InvalidRecord, NotFound, Turn

Answering = AsyncGenerator[ServiceEvent]
Limit = Annotated[int, Query(ge=1, le=100)]
_AS_HERE = {"messages": "input", "response_format": "text.format"}  # what chat calls a parameter, and this route


def router(service: Service, settings: Settings) -> APIRouter:
    routes = APIRouter(prefix="/v1/responses")

    def own(response_id: str, owner: str) -> Turn:
        """The turn that a response is. Raises NotFound for another owner's too, and for one that isn't kept."""
        turn = service.store.turn(wire.turn_id_of(response_id))
        service.own_conversation(turn.conversation_id, owner)
        if "response" not in turn.asked or wire.response_id(turn.id) != response_id:
            raise NotFound("response", response_id)
        return turn

    def found(response_id: str, owner: str) -> Turn:
        try:
            return own(response_id, owner)
        except NotFound:
            raise ApiError(404, f"there is no response {response_id[:80]!r}.", "not_found") from None

    def before(body: ResponseRequest, owner: str) -> Before:
        if body.previous_response_id is not None:
            try:
                turn = own(body.previous_response_id, owner)
            except NotFound:
                message = f"previous_response_id: there is no response {body.previous_response_id[:80]!r}."
                raise ApiError(404, message, "previous_response_not_found", "previous_response_id") from None
            return Before(turn.conversation_id, turn)
        if body.conversation_id is not None:
            conversation = service.own_conversation(body.conversation_id, owner)
            turns = service.store.turns(conversation.id)
            last = next((turn.id for turn in turns if turn.status in (*ANSWERED, "running")), None)
            return Before(conversation.id, service.store.turn(last) if last else None)
        return Before()

    @routes.post("", summary="Answer, and keep the answer to go on from")
    async def create(body: ResponseRequest, request: Request) -> Response:
        check(body)
        owner: str = request.state.owner
        where = await service.call(before, body, owner)
        question, echo = to_question(body, where, owner, settings, request.state.request_id)
        answering = service.answer(question)
        work = _stream(answering, echo) if body.stream else _whole(answering, echo)
        try:
            return await while_connected(request, work)
        except ClientGone:
            return NOBODY_READS
        except Exception as error:
            told = as_api_error(error)
            told.param = _AS_HERE.get(told.param or "", told.param)
            raise told from error

    @routes.get("/{response_id}", summary="A response as it is now")
    async def read(response_id: str, request: Request, stream: bool = False) -> dict[str, Any]:
        _only(request, "stream")
        if stream:
            raise ApiError(400, "stream: a response is streamed once, to who asked.", "unsupported_parameter", "stream")
        turn = await service.call(found, response_id, request.state.owner)
        return wire.written(wire.response(wire.recorded(turn), turn.asked["response"]))

    @routes.delete("/{response_id}", summary="Delete a response with its turn; says what learning keeps")
    async def delete(response_id: str, request: Request) -> dict[str, Any]:
        def erase() -> dict[str, Any]:
            gone = service.store.erase_turn(found(response_id, request.state.owner).id)
            swept = sweep(service.store, settings.home, service.workspaces, vacuum=False)
            kept = {
                "tasks_deleted": gone.tasks_deleted + gone.tasks_emptied,
                "tasks_kept": gone.tasks_kept,
                "versions_tainted": gone.tainted,
                "note": f"Not finished: {swept.unfinished}" if swept.unfinished else "",
            }
            return {"id": response_id, "object": "response", "deleted": True, "whetstone": kept}

        try:
            return await service.call(erase)
        except InvalidRecord as error:
            raise ApiError(409, str(error), "response_busy") from None

    @routes.get("/{response_id}/input_items", summary="What a response was asked with, and what was said before it")
    async def input_items(
        response_id: str,
        request: Request,
        limit: Limit = 20,
        order: Literal["asc", "desc"] = "desc",
        after: Annotated[str | None, Query(description="the last id of the page before")] = None,
    ) -> dict[str, Any]:
        _only(request, "limit", "order", "after")
        turn = await service.call(found, response_id, request.state.owner)
        items = wire.input_items(turn.id, context_of(turn))
        if order == "desc":
            items.reverse()
        if after is not None:
            known = [item["id"] for item in items]
            if after not in known:
                raise ApiError(404, f"after: the response has no item {after[:80]!r}.", "not_found", "after")
            items = items[known.index(after) + 1 :]
        shown = items[:limit]
        page = {
            "object": "list",
            "data": shown,
            "first_id": shown[0]["id"] if shown else "",
            "last_id": shown[-1]["id"] if shown else "",
            "has_more": len(items) > limit,
        }
        return ResponseItemList.model_validate(page).model_dump(exclude_unset=True, by_alias=True)

    return routes


def _only(request: Request, *known: str) -> None:
    """Refuse a query that asks for more than there is. Raises ApiError."""
    for name in request.query_params:
        if name not in known:
            raise ApiError(400, f"{name}: it isn't supported. Leave it out.", "unsupported_parameter", name)


async def _whole(answering: Answering, echo: Mapping[str, Any]) -> Response:
    created_at = time.time()
    async with aclosing(answering):
        async for event in answering:
            if isinstance(event, Finished):
                told = wire.ended(event, _output(event), created_at, time.time())
                return JSONResponse(wire.written(wire.response(told, echo)), headers=answer_headers(event.started))
    raise RuntimeError("an answer ended without its last event: this is a bug.")


def _output(finished: Finished) -> list[dict[str, Any]]:
    turn_id, trajectory = finished.started.turn_id, finished.trajectory
    if trajectory.client_call is not None:
        return [wire.function_call(turn_id, trajectory.client_call)]
    status = "incomplete" if trajectory.stop_reason == "length" else "completed"
    last = max(len(trajectory.steps) - 1, 0)
    return [wire.message(turn_id, last, trajectory.answer, status, wire.flat(url_citations(finished)))]


async def _stream(answering: Answering, echo: Mapping[str, Any]) -> Response:
    started = await anext(answering)
    assert isinstance(started, Started)
    # An error before the first token still has a status of its own, so wait for that token before saying 200.
    first = await anext(answering)
    events = _events(answering, Events(started, echo, time.time()), first)
    return EventStream(events, headers=answer_headers(started) | UNBUFFERED)


async def _events(answering: Answering, response: Events, first: ServiceEvent) -> AsyncGenerator[str]:
    async with aclosing(answering):
        try:
            for kind, told in response.first():
                yield sse(told, kind)
            event: ServiceEvent | None = first
            while event is not None:
                now = response.last(event, time.time()) if isinstance(event, Finished) else response.event(event)
                for kind, told in now:
                    yield sse(told, kind)
                event = await anext(answering, None)
        except Exception as error:
            for kind, told in response.failed(as_api_error(error)):
                yield sse(told, kind)
