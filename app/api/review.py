"""/v1/admin/review: the questions whose gold a person must decide, as `whetstone queue review`; and the quarantine."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request

from app.api.errors import ApiError
from app.api.schema import Reason, ReviewDecision
from app.service import Service
from feedback_store import InvalidRecord, Quarantine, Review

Limit = Annotated[int, Query(ge=1, le=200)]


def router(service: Service) -> APIRouter:
    routes = APIRouter(prefix="/v1/admin")
    store = service.store

    @routes.get("/review", summary="The questions whose gold a person must decide, the longest waiting first")
    async def reviews(limit: Limit = 50) -> dict[str, Any]:
        found = await service.call(store.reviews, limit)
        return {"object": "list", "data": [_review(review) for review in found]}

    @routes.get("/review/{review_id}", summary="A question with its golds and who gave them")
    async def show(review_id: str) -> dict[str, Any]:
        return _review(await _refused(service.call(store.review, review_id)))

    @routes.post("/review/{review_id}", summary="Decide: a gold that was given trains from now on, or none does")
    async def decide(review_id: str, body: ReviewDecision, request: Request) -> dict[str, Any]:
        who = request.state.owner
        return _review(await _refused(service.call(store.decide_review, review_id, body.gold, who, body.reason)))

    @routes.delete("/review/{review_id}", summary="Take a decision back: the votes decide again")
    async def withdraw(review_id: str, request: Request) -> dict[str, Any]:
        return _review(await _refused(service.call(store.withdraw_review, review_id, request.state.owner)))

    @routes.get("/quarantine", summary="Owners whose golds don't count, and those who were let go")
    async def quarantines() -> dict[str, Any]:
        found = await service.call(store.quarantines)
        return {"object": "list", "data": [_quarantine(one) for one in found]}

    @routes.post("/quarantine/{owner}", summary="From now on an owner's golds count for nothing")
    async def quarantine(owner: str, request: Request, body: Reason | None = None) -> dict[str, Any]:
        reason = (body.reason if body else "") or "put there through the endpoint"
        return _quarantine(await _refused(service.call(store.quarantine, owner, request.state.owner, reason)))

    @routes.delete("/quarantine/{owner}", summary="An owner's golds count again")
    async def lift(owner: str, request: Request) -> dict[str, Any]:
        return _quarantine(await _refused(service.call(store.lift_quarantine, owner, request.state.owner)))

    return routes


async def _refused(call: Any) -> Any:
    try:
        return await call
    except InvalidRecord as error:
        raise ApiError(409, str(error), "not_decided") from None


def _review(review: Review) -> dict[str, Any]:
    return {"object": "whetstone.review"} | asdict(review)


def _quarantine(quarantine: Quarantine) -> dict[str, Any]:
    return {"object": "whetstone.quarantine"} | asdict(quarantine)
