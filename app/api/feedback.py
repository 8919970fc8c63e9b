"""POST /v1/feedback: a client's verdict on a turn, at once or days later."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from app.api import wire
from app.api.schema import FeedbackRequest
from app.service import Service


def router(service: Service) -> APIRouter:
    routes = APIRouter(prefix="/v1")

    @routes.post("/feedback", summary="Judge a turn: a score, or a verifier and the right answer")
    async def feedback(body: FeedbackRequest, request: Request) -> dict[str, Any]:
        outcome = await service.feedback(
            body.turn_id,
            request.state.owner,
            source="client",
            score=body.score,
            verifier=body.verifier,
            gold=body.gold,
            reason=body.comment,
        )
        return {"object": "whetstone.outcome", "turn_id": body.turn_id} | wire.outcome_summary(outcome)

    return routes
