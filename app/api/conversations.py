"""/v1/conversations: read one's own, and delete them."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request

from app.api.errors import ApiError
from app.erasure import sweep
from app.service import Service
from app.settings import Settings
from feedback_store import Conversation, InvalidRecord, Turn

Limit = Annotated[int, Query(ge=1, le=100)]
Search = Annotated[str | None, Query(description="words, all of which a turn or the title must have")]
After = Annotated[str | None, Query(description="the last id of the page before")]


def router(service: Service, settings: Settings) -> APIRouter:
    routes = APIRouter(prefix="/v1/conversations")
    store = service.store

    @routes.get("", summary="One's own conversations, the newest first")
    async def listing(
        request: Request, limit: Limit = 20, after: After = None, search: Search = None
    ) -> dict[str, Any]:
        try:
            found = await service.call(store.conversations_page, request.state.owner, limit + 1, after, search)
        except InvalidRecord as error:
            raise ApiError(400, str(error), "invalid_value", "search") from None
        return _page([_conversation(item) for item in found], limit)

    @routes.get("/{conversation_id}", summary="A conversation with its turns, the oldest first")
    async def read(conversation_id: str, request: Request, limit: Limit = 100, after: After = None) -> dict[str, Any]:
        def look() -> dict[str, Any]:
            found = service.own_conversation(conversation_id, request.state.owner)
            turns = store.turns_page(conversation_id, limit + 1, after)
            return _conversation(found) | {"turns": _page([_turn(turn) for turn in turns], limit)}

        return await service.call(look)

    @routes.delete("/{conversation_id}", summary="Erase a conversation with its files; says what learning keeps")
    async def delete(conversation_id: str, request: Request) -> dict[str, Any]:
        def erase() -> dict[str, Any]:
            service.own_conversation(conversation_id, request.state.owner)
            gone = store.erase(conversation=conversation_id)
            swept = sweep(store, settings.home, service.workspaces, vacuum=False)
            return {
                "id": conversation_id,
                "object": "conversation.deleted",
                "deleted": True,
                "whetstone": {
                    "turns": gone.turns,
                    "tasks_deleted": gone.tasks_deleted + gone.tasks_emptied,
                    "tasks_kept": gone.tasks_kept,
                    "versions_tainted": gone.tainted,
                    "note": " ".join(
                        note
                        for note in (
                            _KEPT if gone.tasks_kept else "",
                            _TAINTED if gone.tainted else "",
                            f"Not finished: {swept.unfinished}" if swept.unfinished else "",
                        )
                        if note
                    ),
                },
            }

        try:
            return await service.call(erase)
        except InvalidRecord as error:
            raise ApiError(409, str(error), "conversation_busy") from None

    return routes


_KEPT = "Tasks that others asked for too, word for word, are kept for them."
_TAINTED = "Versions that were trained on it are marked as tainted; they keep what they learnt until they are replaced."


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
