"""What can't be erased now: an answer that is under way, and tasks that a run under way has claimed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, false, func, select

from feedback_store.errors import InvalidRecord
from feedback_store.presence import lives
from feedback_store.processes import Process
from feedback_store.schema import run_tasks, runs, task_origins, tasks, turns
from feedback_store.withdrawal import chunks

Askers = dict[str, set[tuple[str | None, str]]]
"""By task, who asked for it: (conversation, owner's hash)."""


class Busy(InvalidRecord):
    """An answer or a run works with what is to be erased."""


class InUse:
    """A look at what is under way, inside of an erasure's transaction."""

    def __init__(self, connection: Connection, now: datetime) -> None:
        self._connection = connection
        self._now = now
        self._alive: list[str] | None = None  # runs under way, once they are asked for

    def conversations(self, ids: Sequence[str], asked: Mapping[str, set[tuple[str | None, str]]]) -> dict[str, str]:
        """Of these conversations, which asked for the tasks `asked`, those that can't be erased now, and why."""
        running = select(turns.c.conversation_id).where(turns.c.conversation_id.in_(ids), turns.c.status == "running")
        busy = {
            id: f"An answer of conversation {id} is under way; erase it when that has ended."
            for id in self._connection.execute(running).scalars()
        }
        its = select(turns.c.id).where(turns.c.conversation_id.in_(ids))
        for task_id, run in self._held(list(asked)).items():
            if self._is_alone(task_id, task_origins.c.turn_id.in_(its)):
                busy |= {conversation: _held(run, task_id) for conversation, _ in asked[task_id] if conversation}
        return busy

    def check_tasks(self, task_ids: Sequence[str], mine: ColumnElement[bool]) -> None:
        """Raises Busy if a run holds one that nobody asked for but by the origins that match `mine`."""
        for task_id, run in self._held(task_ids).items():
            if self._is_alone(task_id, mine):
                raise Busy(_held(run, task_id))

    def _is_alone(self, task_id: str, mine: ColumnElement[bool]) -> bool:
        others = select(task_origins.c.id).where(task_origins.c.task_id == task_id, ~func.coalesce(mine, false()))
        return self._connection.execute(others).first() is None

    def _held(self, task_ids: Sequence[str]) -> dict[str, str]:
        """Of these tasks, those that a run under way has claimed, and the run."""
        if self._alive is None:
            running = self._connection.execute(select(runs).where(runs.c.status == "running")).all()
            self._alive = [row.id for row in running if self._is_alive(row)]
        held: dict[str, str] = {}
        for some in chunks(task_ids) if self._alive else ():
            claims = select(run_tasks.c.task_id, run_tasks.c.run_id).where(
                run_tasks.c.task_id.in_(some), run_tasks.c.run_id.in_(self._alive)
            )
            held |= {row.task_id: row.run_id for row in self._connection.execute(claims)}
        return held

    def _is_alive(self, run: Row[Any]) -> bool:
        alive = lives(self._connection, Process(run.host, run.pid, run.process_started), self._now)
        if alive is not None:
            return alive
        until = self._connection.execute(select(func.max(tasks.c.lease_until)).where(tasks.c.run_id == run.id)).scalar()
        return until is not None and until > self._now  # a run of another machine counts as long as its leases do


def _held(run_id: str, task_id: str) -> str:
    return (
        f"Run {run_id} is under way and has claimed the task {task_id}, which came of it. Erase when the run has "
        "ended, or interrupt it first: it can't go on then."
    )
