"""/v1/conversations: read one's own, and delete them."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request

from app.api.errors import ApiError
from app.service import Service
from feedback_store import Conversation, InvalidRecord, Turn

Limit = Annotated[int, Query(ge=1, le=100)]
After = Annotated[str | None, Query(description="the last id of the page before")]


def router(service: Service) -> APIRouter:
    routes = APIRouter(prefix="/v1/conversations")
    store = service.store

    @routes.get("", summary="One's own conversations, the newest first")
    async def listing(request: Request, limit: Limit = 20, after: After = None) -> dict[str, Any]:
        found = await service.call(store.conversations_page, request.state.owner, limit + 1, after)
        return _page([_conversation(item) for item in found], limit)

    @routes.get("/{conversation_id}", summary="A conversation with its turns, the oldest first")
    async def read(conversation_id: str, request: Request, limit: Limit = 100, after: After = None) -> dict[str, Any]:
        def look() -> dict[str, Any]:
            found = service.own_conversation(conversation_id, request.state.owner)
            turns = store.turns_page(conversation_id, limit + 1, after)
            return _conversation(found) | {"turns": _page([_turn(turn) for turn in turns], limit)}

        return await service.call(look)

    @routes.delete("/{conversation_id}", summary="Delete a conversation with its files; says what learning keeps")
    async def delete(conversation_id: str, request: Request) -> dict[str, Any]:
        def erase() -> dict[str, Any]:
            service.own_conversation(conversation_id, request.state.owner)
            gone = store.delete_conversation(conversation_id)
            if service.workspaces is not None:
                service.workspaces.forget(conversation_id)
            return {
                "id": conversation_id,
                "object": "conversation.deleted",
                "deleted": True,
                "whetstone": {
                    "turns": gone.turns,
                    "tasks_deleted": gone.tasks,
                    "tasks_kept": gone.tasks_kept,
                    "note": _KEPT if gone.tasks_kept else "",
                },
            }

        try:
            return await service.call(erase)
        except InvalidRecord as error:
            raise ApiError(409, str(error), "conversation_busy") from None

    return routes


_KEPT = (
    "Tasks that a run has taken, or that others asked for too, are kept with their question and right answer; "
    "versions that were trained on them keep what they learnt."
)


def _page(items: list[dict[str, Any]], limit: int) -> dict[str, Any]:
    """OpenAI's list of at most `limit` of `items`, which has one more where there is a next page."""
    shown = items[:limit]
    return {
        "object": "list",
        "data": shown,
        "first_id": shown[0]["id"] if shown else None,
        "last_id": shown[-1]["id"] if shown else None,
        "has_more": len(items) > limit,
    }


def _conversation(found: Conversation) -> dict[str, Any]:
    return {
        "id": found.id,
        "object": "conversation",
        "created_at": int(found.created_at.timestamp()),
        "metadata": {},
        "whetstone": {"title": found.title, "turns": found.turns, "updated_at": int(found.updated_at.timestamp())},
    }


def _turn(turn: Turn) -> dict[str, Any]:
    return {
        "id": turn.id,
        "object": "whetstone.turn",
        "created_at": int(turn.created_at.timestamp()),
        "version": turn.version,
        "status": turn.status,
        "messages": turn.messages,
        "answer": turn.answer,
        "error": turn.error or None,
    }
