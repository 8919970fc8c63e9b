"""Which tasks a run trained on, and what becomes of the run when they are erased."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, and_, insert, select, update

from feedback_store.in_use import Askers
from feedback_store.queue import give_up_claims
from feedback_store.schema import erased_uses, run_stages, run_tasks, runs, tasks
from feedback_store.withdrawal import chunks


def set_aside(connection: Connection, run_id: str) -> set[str]:
    """The tasks that a run claimed and didn't train on, as its journal tells."""
    claims = select(run_stages.c.detail).where(run_stages.c.run_id == run_id, run_stages.c.stage == "claim")
    return {id for detail in connection.execute(claims).scalars() for id in _unused(detail)}


def _unused(detail: dict[str, Any]) -> list[str]:
    if "unused" in detail:
        return list(detail["unused"])
    # An older journal: ids by the reason, or how many beside some of the ids. What it doesn't name counts as used.
    named = [*(detail.get("set_aside") or {}).values(), *(detail.get("examples") or {}).values()]
    return [id for ids in named if isinstance(ids, list) for id in ids]


def trained_on(connection: Connection, run_id: str) -> list[str]:
    """The tasks that a run claimed, whatever became of the claims, without those that it set aside; by id."""
    claimed = select(run_tasks.c.task_id).where(run_tasks.c.run_id == run_id).distinct()
    return sorted(set(connection.execute(claimed).scalars()) - set_aside(connection, run_id))


class Uses:
    """Of tasks that an erasure takes, inside its transaction. `taints`: whether the runs' versions are tainted by it.
    `ended` gets the ids of the runs that can't go on."""

    def __init__(self, connection: Connection, now: datetime, taints: bool, ended: list[str]) -> None:
        self._connection = connection
        self._now = now
        self._taints = taints
        self._ended = ended
        self._aside: dict[str, set[str]] = {}  # by run, the tasks that it didn't train on

    def note(self, gone: Askers) -> None:
        """Writes down which runs trained on these tasks; one that was interrupted is ended."""
        for some in chunks(list(gone)):
            used = select(run_tasks.c.run_id, run_tasks.c.task_id).where(run_tasks.c.task_id.in_(some)).distinct()
            by_run: dict[str, list[str]] = {}
            for run_id, task_id in self._connection.execute(used):
                by_run.setdefault(run_id, []).append(task_id)
            for run_id, task_ids in by_run.items():
                self._end(run_id)
                self._take_out_of_report(run_id, task_ids)
            rows = [
                {
                    "run_id": run_id,
                    "task_id": task_id,
                    "conversation_id": conversation,
                    "owner_hash": hashed,
                    "taints": self._taints,
                    "at": self._now,
                }
                for run_id, task_ids in by_run.items()
                for task_id in task_ids
                if task_id not in self._set_aside(run_id)
                for conversation, hashed in sorted(gone[task_id], key=str)
            ]
            if rows:
                self._connection.execute(insert(erased_uses), rows)

    def _set_aside(self, run_id: str) -> set[str]:
        if run_id not in self._aside:
            self._aside[run_id] = set_aside(self._connection, run_id)
        return self._aside[run_id]

    def _end(self, run_id: str) -> None:
        """An interrupted run would go on with weights that were trained on what goes."""
        running = and_(runs.c.id == run_id, runs.c.status == "running")
        report = {"run": run_id, "status": "ended", "reasons": ["interrupted; then tasks of it were erased"]}
        ended = update(runs).where(running).values(status="ended", report=report, finished_at=self._now)
        if self._connection.execute(ended).rowcount:
            give_up_claims(
                self._connection, tasks.c.run_id == run_id, failed=False, claim_state="released", now=self._now
            )
            self._ended.append(run_id)

    def _take_out_of_report(self, run_id: str, task_ids: Sequence[str]) -> None:
        report = self._connection.execute(select(runs.c.report).where(runs.c.id == run_id)).scalar() or {}
        if not (examples := report.get("examples")):
            return
        asked = self._connection.execute(select(tasks.c.messages).where(tasks.c.id.in_(task_ids))).scalars()
        questions = [messages[-1].get("content") for messages in asked if messages]
        left = [example for example in examples if example.get("question") not in questions]
        without = report | {"examples": left}
        self._connection.execute(update(runs).where(runs.c.id == run_id).values(report=without))
