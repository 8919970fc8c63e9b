"""/v1/admin: versions (which serves, another, back again), runs, the queue and counts, as the command line has them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Query

from app.api.errors import ApiError
from app.api.schema import Rollback, VersionTrial, VersionUse
from app.service import Service
from feedback_store import InvalidRecord, QueuedTask, Run, Taint, Version
from feedback_store.records import TaskState
from serving.engines.base import UnknownVersion

Limit = Annotated[int, Query(ge=1, le=200)]


def router(service: Service) -> APIRouter:
    routes = APIRouter(prefix="/v1/admin")
    store = service.store

    @routes.get("/versions", summary="The versions, oldest first; which serves, and its last changes")
    async def versions(changes: Limit = 20) -> dict[str, Any]:
        def look() -> dict[str, Any]:
            current, tainted = store.current_version(), store.tainted()
            return {
                "object": "list",
                "current": current,
                "data": [_version(version, current, tainted.get(version.id)) for version in store.versions()],
                "changes": [asdict(change) for change in store.version_changes(changes)],
            }

        return await service.call(look) | {"serving_here": await service.router.status()}

    @routes.get("/versions/{version_id}", summary="A version with its manifest, and the tasks that it was trained on")
    async def version(version_id: str) -> dict[str, Any]:
        def look() -> dict[str, Any]:
            found = store.version(version_id)
            shown = _version(found, store.current_version(), store.tainted().get(version_id))
            return shown | {"manifest": found.manifest, "lineage": store.lineage(version_id)}

        return await service.call(look)

    @routes.post("/versions/rollback", summary="Put the version back in service that served before this one")
    async def roll_back(body: Rollback | None = None) -> dict[str, Any]:
        def previous() -> str:
            last = store.version_changes(1)
            if body is not None and body.from_ is not None and (not last or last[0].version_id != body.from_):
                raise ApiError(409, f"{body.from_} isn't in service.", "not_in_service", "from")
            if not last or last[0].previous is None:
                raise ApiError(409, "no version served before this one.", "nothing_to_roll_back")
            return last[0].previous

        return await _use(service, await service.call(previous), body or VersionUse(), "rolled back")

    @routes.post("/versions/{version_id}/use", summary="Put a published version in service, at each endpoint process")
    async def use(version_id: str, body: VersionUse | None = None) -> dict[str, Any]:
        return await _use(service, version_id, body or VersionUse(), "chosen through the endpoint")

    @routes.post("/versions/{version_id}/canary", summary="Try a version on a share of the owners; 0 ends the trial")
    async def canary(version_id: str, body: VersionTrial) -> dict[str, Any]:
        reason = body.reason or "tried through the endpoint"
        with _not_published():
            moved = await service.router.try_on(version_id, body.share, reason, body.move_conversations)
        return {"object": "whetstone.canary", "version": version_id, "share": body.share, "conversations_moved": moved}

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

    @routes.get("/queue", summary="How many tasks there are, and those of one state, oldest first")
    async def queue(state: TaskState = "pending", limit: Limit = 20) -> dict[str, Any]:
        def look() -> dict[str, Any]:
            tasks = [_task(task) for task in store.tasks(state, limit)]
            return {"object": "list", "stats": store.queue_stats(), "data": tasks}

        return await service.call(look)

    @routes.get("/stats", summary="How much is in the record")
    async def stats() -> dict[str, Any]:
        return {"object": "whetstone.stats"} | await service.call(store.stats)

    return routes


async def _use(service: Service, version_id: str, body: VersionUse, why: str) -> dict[str, Any]:
    before = await service.call(service.store.current_version)
    reason = body.reason or why
    await service.call(service.store.version, version_id)
    with _not_published():
        moved = await service.router.use(version_id, reason, body.move_conversations)
    return {
        "object": "whetstone.version_change",
        "version": version_id,
        "previous": before,
        "reason": reason,
        "conversations_moved": moved,
    }


@contextmanager
def _not_published() -> Iterator[None]:
    try:
        yield
    except (InvalidRecord, UnknownVersion) as error:
        raise ApiError(409, str(error), "version_not_published") from None


def _version(version: Version, current: str | None, taint: Taint | None) -> dict[str, Any]:
    return {
        "id": version.id,
        "object": "whetstone.version",
        "parent": version.parent,
        "run": version.run_id,
        "kind": version.manifest.get("kind", "lora"),
        "status": version.status,
        "current": version.id == current,
        "tainted": taint and {"since": taint.since, "tasks": taint.tasks, "runs": taint.runs},
        "created_at": version.created_at,
    }


def _task(task: QueuedTask) -> dict[str, Any]:
    shown = asdict(task)
    del shown["content_hash"]
    return {"object": "whetstone.task"} | shown


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
