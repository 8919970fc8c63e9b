"""The dead letter: tasks on which too many runs failed, why, and the way back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Connection, select, update

from feedback_store.audit import note
from feedback_store.errors import InvalidRecord, NotFound
from feedback_store.queue import Queue
from feedback_store.records import QueuedTask
from feedback_store.schema import run_tasks, runs, tasks
from feedback_store.settling import decide


@dataclass(frozen=True)
class DeadTask:
    """`reason` says how the last attempt ended; `at`: when."""

    task: QueuedTask
    reason: str
    at: datetime | None


class DeadLetter(Queue):
    def dead_tasks(self, limit: int = 100) -> list[DeadTask]:
        """The oldest first."""
        dead = self.tasks("dead", limit)
        with self._read() as connection:
            return [DeadTask(task, *_last_attempt(connection, task.id)) for task in dead]

    def requeue(self, task_ids: Sequence[str], who: str, reason: str = "") -> int:
        """Puts dead tasks back, with no failure counted; how many. Raises InvalidRecord for one that isn't dead."""
        now = self._now()
        with self._write() as connection:
            self._sweep(connection)
            asked = list(dict.fromkeys(task_ids))
            for task_id in asked:
                row = connection.execute(
                    select(tasks.c.state, tasks.c.question_hash).where(tasks.c.id == task_id).with_for_update()
                ).first()
                if row is None:
                    raise NotFound("task", task_id)
                if row.state != "dead":
                    raise InvalidRecord(f"Task {task_id} isn't dead: it is {row.state}.")
                back = {"state": "pending", "attempts": 0, "run_id": None, "lease_until": None, "updated_at": now}
                connection.execute(update(tasks).where(tasks.c.id == task_id).values(back))
                note(connection, now, who, "queue.requeue", task_id, {"reason": reason})
                decide(connection, [row.question_hash], self.policy, now)
        return len(asked)


def _last_attempt(connection: Connection, task_id: str) -> tuple[str, datetime | None]:
    row = connection.execute(
        select(run_tasks.c.run_id, run_tasks.c.state, run_tasks.c.ended_at, runs.c.status)
        .join(runs, runs.c.id == run_tasks.c.run_id)
        .where(run_tasks.c.task_id == task_id)
        .order_by(run_tasks.c.id.desc())
        .limit(1)
    ).first()
    if row is None:
        return "no run has held it", None
    if row.state in ("claimed", "expired"):
        return f"the lease of {row.run_id} ended: the run was killed, or lasted too long", row.ended_at
    return f"{row.run_id} {'failed' if row.status == 'failed' else 'gave it up as failed'}", row.ended_at
