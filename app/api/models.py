"""GET /v1/models: what can be asked for by name, and the candidates that may come to be."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from app.api.errors import ApiError
from app.service import Service
from app.settings import Settings
from feedback_store import Version


def router(service: Service, settings: Settings) -> APIRouter:
    routes = APIRouter(prefix="/v1/models")

    @routes.get("", summary="The version in service, the others that can be asked for, then candidates, which can't")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": await _models(service, settings)}

    @routes.get("/{model_id:path}")
    async def model(model_id: str) -> dict[str, Any]:
        known = await _models(service, settings)
        for entry in known:
            if entry["id"] == model_id:
                return entry
        names = ", ".join(entry["id"] for entry in known if entry["whetstone"]["can_be_asked"])
        raise ApiError(404, f"there is no model {model_id!r}; there are {names}.", "model_not_found", "model")

    return routes


async def _models(service: Service, settings: Settings) -> list[dict[str, Any]]:
    """The name that means the version in service, that version, the other published ones, newest first, candidates.

    A version that the gate refused isn't shown: no answer will come of it.
    """
    current = service.router.current
    loaded = service.router.loaded()
    versions = list(reversed(await service.call(service.store.versions)))
    canary, tainted = await service.call(service.store.canary), await service.call(service.store.tainted)
    share = {canary.version: canary.share} if canary else {}
    known = {version.id: version for version in versions}
    others = [v.id for v in versions if v.status == "published" and v.id != current]
    candidates = [v.id for v in versions if v.status == "candidate"]

    def entry(name: str, id_: str) -> dict[str, Any]:
        version: Version | None = known.get(id_)
        status = version.status if version else "published"
        details = {
            "version": id_,
            "parent": version.parent if version else None,
            "status": status,
            "can_be_asked": status == "published",
            "current": id_ == current,
            "canary_share": share.get(id_, 0.0),
            "loaded": id_ in loaded,
            "tainted": id_ in tainted,
        }
        created = int(version.created_at.timestamp()) if version else 0
        return {"id": name, "object": "model", "created": created, "owned_by": "whetstone", "whetstone": details}

    return [entry(settings.model_name, current), *[entry(id_, id_) for id_ in (current, *others, *candidates)]]
