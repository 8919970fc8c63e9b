"""The queue of tasks: each asked for any number of times and held once, claimed under a lease by one run at a time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, and_, bindparam, case, func, insert, select, update
from sqlalchemy.exc import IntegrityError

from feedback_store.codec import clean
from feedback_store.conversations import check_messages
from feedback_store.database import Database
from feedback_store.errors import InvalidRecord, NotFound, QueueFull
from feedback_store.ids import new_id
from feedback_store.records import Message, QueuedTask, TaskState
from feedback_store.schema import run_tasks, runs, task_origins, tasks, turns

MAX_ATTEMPTS = 5  # failed ones, after which a task is dead: it would fail the next run as well


def content_hash(messages: Sequence[Message], verifier: str, gold: str) -> str:
    """What makes two tasks the same: 64 hex digits over the prompt, the verifier's name and the gold."""
    content = json.dumps([list(messages), verifier, gold], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(clean(content).encode()).hexdigest()


def put_task(
    connection: Connection,
    messages: Sequence[Message],
    verifier: str,
    gold: str,
    *,
    kind: str,
    source: str,
    owner: str,
    turn_id: str | None,
    max_pending: int,
    now: datetime,
) -> tuple[str, bool]:
    """The task's id and whether it is new, inside the caller's transaction; raises QueueFull before writing."""
    key = content_hash(messages, verifier, gold)
    same = select(tasks.c.id).where(tasks.c.content_hash == key)
    task_id = connection.execute(same).scalar()
    created = task_id is None
    if task_id is None:
        waiting = connection.execute(select(func.count()).where(tasks.c.state == "pending")).scalar_one()
        if waiting >= max_pending:
            raise QueueFull(
                f"The queue is full: {waiting} tasks wait and {max_pending} may. Run a training, or raise max_pending."
            )
        task_id = new_id("task")
        try:
            with connection.begin_nested():
                connection.execute(
                    insert(tasks).values(
                        id=task_id,
                        content_hash=key,
                        messages=list(messages),
                        verifier=verifier,
                        gold=gold,
                        kind=kind,
                        source=source,
                        owner=owner,
                        state="pending",
                        attempts=0,
                        created_at=now,
                        updated_at=now,
                    )
                )
        except IntegrityError:  # on a server database another writer may have added it since the look
            task_id, created = connection.execute(same).scalar_one(), False
    connection.execute(
        insert(task_origins).values(task_id=task_id, turn_id=turn_id, source=source, owner=owner, at=now)
    )
    return task_id, created


def _after_failure() -> ColumnElement[str]:
    return case((tasks.c.attempts + 1 >= MAX_ATTEMPTS, "dead"), else_="pending")


def _state_at(now: datetime) -> ColumnElement[str]:
    """The state as anyone should see it: a lapsed lease no longer holds, though the next claim writes that down."""
    lapsed = and_(tasks.c.state == "claimed", tasks.c.lease_until <= now)
    return case((lapsed, _after_failure()), else_=tasks.c.state)


def give_up_claims(
    connection: Connection, held: ColumnElement[bool], *, failed: bool, claim_state: str, now: datetime
) -> int:
    """Puts claimed tasks that match `held` back (or to rest, after too many failures); returns how many."""
    which = and_(tasks.c.state == "claimed", held)
    connection.execute(
        update(run_tasks)
        .where(
            run_tasks.c.state == "claimed",
            run_tasks.c.task_id.in_(select(tasks.c.id).where(which)),
        )
        .values(state=claim_state, ended_at=now)
    )
    changed: dict[str, Any] = {"state": "pending", "run_id": None, "lease_until": None, "updated_at": now}
    if failed:
        changed |= {"state": _after_failure(), "attempts": tasks.c.attempts + 1}
    return connection.execute(update(tasks).where(which).values(changed)).rowcount


def task_of(row: Row[Any]) -> QueuedTask:
    return QueuedTask(
        id=row.id,
        content_hash=row.content_hash,
        messages=row.messages,
        verifier=row.verifier,
        gold=row.gold,
        kind=row.kind,
        source=row.source,
        owner=row.owner,
        state=row.state_now,
        attempts=row.attempts,
        run_id=row.run_id,
        lease_until=row.lease_until,
        created_at=row.created_at,
    )


def _check_run(connection: Connection, run_id: str) -> None:
    if connection.execute(select(runs.c.id).where(runs.c.id == run_id)).first() is None:
        raise NotFound("run", run_id)


class Queue(Database):
    def add_task(
        self,
        messages: Sequence[Message],
        verifier: str,
        gold: str,
        kind: str,
        source: str,
        owner: str = "",
        turn_id: str | None = None,
    ) -> tuple[str, bool]:
        """(task id, whether it is new). The same messages, verifier and gold again only add where they came from.

        Raises QueueFull for a new task when `max_pending` already wait.
        """
        prompt = check_messages(messages)
        if not verifier:
            raise InvalidRecord("A task needs the name of a verifier.")
        with self._write() as connection:
            if (
                turn_id is not None
                and connection.execute(select(turns.c.id).where(turns.c.id == turn_id)).first() is None
            ):
                raise NotFound("turn", turn_id)
            return put_task(
                connection,
                prompt,
                verifier,
                gold,
                kind=kind,
                source=source,
                owner=owner,
                turn_id=turn_id,
                max_pending=self._max_pending,
                now=self._now(),
            )

    def claim(self, run_id: str, n: int, lease_seconds: float = 3600) -> list[QueuedTask]:
        """Up to `n` waiting tasks for this run alone until the lease ends; those that failed least often, then oldest.

        Lapsed leases are taken back first; each counts as a failed attempt.
        """
        if n < 1 or lease_seconds <= 0:
            raise InvalidRecord(f"Claim at least one task for some time, not n={n}, lease_seconds={lease_seconds}.")
        with self._write() as connection:
            now = self._now()
            until = now + timedelta(seconds=lease_seconds)
            _check_run(connection, run_id)
            give_up_claims(connection, tasks.c.lease_until <= now, failed=True, claim_state="expired", now=now)
            rows = connection.execute(
                select(tasks.c.id)
                .where(tasks.c.state == "pending")
                .order_by(tasks.c.attempts, tasks.c.id)
                .limit(n)
                .with_for_update(skip_locked=True)  # for PostgreSQL; SQLite's write lock is already held
            ).all()
            if not rows:
                return []
            connection.execute(
                update(tasks)
                .where(tasks.c.id == bindparam("claimed_id"))
                .values(state="claimed", run_id=run_id, lease_until=until, updated_at=now),
                [{"claimed_id": row.id} for row in rows],
            )
            connection.execute(
                insert(run_tasks),
                [{"run_id": run_id, "task_id": row.id, "state": "claimed", "claimed_at": now} for row in rows],
            )
            wanted = {row.id for row in rows}
            held = connection.execute(
                select(tasks, tasks.c.state.label("state_now"))
                .where(tasks.c.run_id == run_id, tasks.c.state == "claimed")
                .order_by(tasks.c.attempts, tasks.c.id)
            )
            return [task_of(row) for row in held if row.id in wanted]

    def renew(self, run_id: str, lease_seconds: float = 3600) -> int:
        """Lengthens the lease of every task that the run holds, lapsed ones that nobody took included; how many."""
        with self._write() as connection:
            _check_run(connection, run_id)
            now = self._now()
            return connection.execute(
                update(tasks)
                .where(tasks.c.run_id == run_id, tasks.c.state == "claimed")
                .values(lease_until=now + timedelta(seconds=lease_seconds), updated_at=now)
            ).rowcount

    def complete(self, run_id: str, task_ids: Sequence[str]) -> list[str]:
        """Ends tasks that the run holds, and returns their ids: those that another run took since are left out."""
        with self._write() as connection:
            _check_run(connection, run_id)
            now = self._now()
            held = set(
                connection.execute(
                    select(tasks.c.id).where(tasks.c.run_id == run_id, tasks.c.state == "claimed").with_for_update()
                ).scalars()
            )
            asked = list(dict.fromkeys(task_ids))
            for task_id in asked:
                if (
                    task_id not in held
                    and connection.execute(select(tasks.c.id).where(tasks.c.id == task_id)).first() is None
                ):
                    raise NotFound("task", task_id)
            ended = [task_id for task_id in asked if task_id in held]
            if ended:
                names = [{"ended_id": task_id} for task_id in ended]
                connection.execute(
                    update(tasks)
                    .where(tasks.c.id == bindparam("ended_id"))
                    .values(state="done", lease_until=None, updated_at=now),
                    names,
                )
                connection.execute(
                    update(run_tasks)
                    .where(
                        run_tasks.c.task_id == bindparam("ended_id"),
                        run_tasks.c.run_id == run_id,
                        run_tasks.c.state == "claimed",
                    )
                    .values(state="completed", ended_at=now),
                    names,
                )
            return ended

    def release(self, run_id: str, failed: bool = False) -> int:
        """Puts what the run still holds back; how many. `failed` counts it as a failed attempt of each."""
        with self._write() as connection:
            _check_run(connection, run_id)
            held = tasks.c.run_id == run_id
            return give_up_claims(connection, held, failed=failed, claim_state="released", now=self._now())

    def task(self, task_id: str) -> QueuedTask:
        with self._read() as connection:
            row = connection.execute(
                select(tasks, _state_at(self._now()).label("state_now")).where(tasks.c.id == task_id)
            ).first()
        if row is None:
            raise NotFound("task", task_id)
        return task_of(row)

    def tasks(self, state: TaskState | None = None, limit: int = 100) -> list[QueuedTask]:
        """The oldest first; a task whose lease lapsed shows as pending (or dead)."""
        state_now = _state_at(self._now())
        query = select(tasks, state_now.label("state_now")).order_by(tasks.c.id).limit(limit)
        if state is not None:
            query = query.where(state_now == state)
        with self._read() as connection:
            return [task_of(row) for row in connection.execute(query)]

    def queue_stats(self) -> dict[str, Any]:
        """How many tasks each state has: `{"pending": n, …, "by_kind": {kind: {state: n}}, "max_pending": n}`."""
        state_now = _state_at(self._now()).label("state_now")
        with self._read() as connection:
            rows = connection.execute(
                select(tasks.c.kind, state_now, func.count().label("n")).group_by(tasks.c.kind, state_now)
            ).all()
        states: dict[str, int] = {"pending": 0, "claimed": 0, "done": 0, "dead": 0, "withdrawn": 0}
        by_kind: dict[str, dict[str, int]] = {}
        for row in rows:
            states[row.state_now] += row.n
            by_kind.setdefault(row.kind, {})[row.state_now] = row.n
        return {**states, "by_kind": by_kind, "max_pending": self._max_pending}
