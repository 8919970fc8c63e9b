"""/v1/admin: versions (which serves, another, back again) and runs, as `whetstone versions` and `whetstone runs`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Query

from app.api.errors import ApiError
from app.api.schema import VersionUse
from app.service import Service
from feedback_store import InvalidRecord, Run, Version

Limit = Annotated[int, Query(ge=1, le=200)]


def router(service: Service) -> APIRouter:
    routes = APIRouter(prefix="/v1/admin")
    store = service.store

    @routes.get("/versions", summary="The versions, oldest first; which serves, and its last changes")
    async def versions(changes: Limit = 20) -> dict[str, Any]:
        def look() -> dict[str, Any]:
            current = store.current_version()
            return {
                "object": "list",
                "current": current,
                "data": [_version(version, current) for version in store.versions()],
                "changes": [asdict(change) for change in store.version_changes(changes)],
            }

        return await service.call(look) | {"serving_here": service.router.current}

    @routes.post("/versions/rollback", summary="Put the version back in service that served before this one")
    async def roll_back(body: VersionUse | None = None) -> dict[str, Any]:
        def previous() -> str:
            last = store.version_changes(1)
            if not last or last[0].previous is None:
                raise ApiError(409, "no version served before this one.", "nothing_to_roll_back")
            return last[0].previous

        return await _use(service, await service.call(previous), (body or VersionUse()).reason or "rolled back")

    @routes.post("/versions/{version_id}/use", summary="Put a published version in service, at each endpoint process")
    async def use(version_id: str, body: VersionUse | None = None) -> dict[str, Any]:
        return await _use(service, version_id, (body or VersionUse()).reason or "chosen through the endpoint")

    @routes.get("/runs", summary="The runs of the online loop, newest first")
    async def runs(limit: Limit = 20) -> dict[str, Any]:
        found = await service.call(store.runs, limit)
        return {"object": "list", "data": [_run(run) for run in found]}

    @routes.get("/runs/{run_id}", summary="A run with its journal and its report")
    async def run(run_id: str) -> dict[str, Any]:
        def look() -> dict[str, Any]:
            found = store.run(run_id)
            return _run(found) | {
                "report": found.report,
                "stages": [asdict(stage) for stage in found.stages],
                "tasks": [asdict(task) for task in store.run_tasks(run_id)],
            }

        return await service.call(look)

    return routes


async def _use(service: Service, version_id: str, reason: str) -> dict[str, Any]:
    def swap() -> dict[str, Any]:
        before = service.store.current_version()
        service.store.set_current(version_id, reason)
        return {"object": "whetstone.version_change", "version": version_id, "previous": before, "reason": reason}

    try:
        return await service.call(swap)
    except InvalidRecord as error:  # it isn't published
        raise ApiError(409, str(error), "version_not_published") from None


def _version(version: Version, current: str | None) -> dict[str, Any]:
    return {
        "id": version.id,
        "object": "whetstone.version",
        "parent": version.parent,
        "run": version.run_id,
        "status": version.status,
        "current": version.id == current,
        "created_at": version.created_at,
    }


def _run(run: Run) -> dict[str, Any]:
    return {
        "id": run.id,
        "object": "whetstone.run",
        "recipe": run.recipe,
        "status": run.status,
        "stage": run.stage,
        "alive": run.alive,
        "started_at": run.started_at,
        "finished_at": run.finished_at,
    }
