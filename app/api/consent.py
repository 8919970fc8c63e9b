"""/v1/consent: whether one's own conversations may train the policy."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Request

from app.api.schema import ConsentRequest
from app.service import Service
from feedback_store import Consent


def router(service: Service) -> APIRouter:
    routes = APIRouter(prefix="/v1/consent")
    store = service.store

    @routes.get("", summary="Whether one's conversations may train the policy, or are kept for the service alone")
    async def read(request: Request) -> dict[str, Any]:
        return _shown(await service.call(store.consent, request.state.owner))

    @routes.post("", summary="Allow that, or take it back: tasks that wait are withdrawn then")
    async def write(body: ConsentRequest, request: Request) -> dict[str, Any]:
        withdrawn = await service.call(store.set_consent, request.state.owner, body.training)
        now = await service.call(store.consent, request.state.owner)
        return _shown(now) | {"withdrawn": asdict(withdrawn)}

    return routes


def _shown(consent: Consent) -> dict[str, Any]:
    return {"object": "whetstone.consent", "training": consent.training, "stated_at": consent.at}
