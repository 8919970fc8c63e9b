"""POST /v1/feedback: a client's verdict on a turn, at once or days later."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from app.api import wire
from app.api.errors import ApiError
from app.api.schema import FeedbackRequest
from app.service import Service

_ANSWERED = ("done", "no_answer", "length")  # what a verdict on a conversation may fall on


def router(service: Service) -> APIRouter:
    routes = APIRouter(prefix="/v1")

    def last_turn(conversation_id: str, owner: str) -> str:
        service.own_conversation(conversation_id, owner)
        turns = service.store.turns(conversation_id)
        finished = next((turn.id for turn in turns if turn.status in _ANSWERED), None)
        if finished is None:
            raise ApiError(409, "the conversation has no finished answer yet.", "no_finished_turn", "conversation_id")
        return finished

    @routes.post(
        "/feedback", summary="Judge a turn, or a conversation's last: a score, or a verifier and the right answer"
    )
    async def feedback(body: FeedbackRequest, request: Request) -> dict[str, Any]:
        owner: str = request.state.owner
        turn_id = body.turn_id
        if turn_id is None:
            turn_id = await service.call(last_turn, body.conversation_id or "", owner)
        outcome = await service.feedback(
            turn_id,
            owner,
            source="client",
            score=body.score,
            verifier=body.verifier,
            gold=body.gold,
            reason=body.comment,
        )
        return {"object": "whetstone.outcome", "turn_id": turn_id} | wire.outcome_summary(outcome)

    return routes
