"""The queue of tasks: each asked for any number of times and held once, claimed under a lease by one run at a time."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any, get_args

from sqlalchemy import ColumnElement, Connection, Row, and_, bindparam, case, func, insert, or_, select, update

from feedback_store.admission import Gold, put_task
from feedback_store.conversations import check_messages
from feedback_store.errors import InvalidRecord, NotFound
from feedback_store.gold import Judging, Policy
from feedback_store.records import Message, QueuedTask, TaskState
from feedback_store.schema import questions, run_tasks, runs, tasks, turns
from feedback_store.settling import decide

MAX_ATTEMPTS = 5  # failed ones, after which a task is dead: it would fail the next run as well


def _after_failure() -> ColumnElement[str]:
    return case((tasks.c.attempts + 1 >= MAX_ATTEMPTS, "dead"), else_="pending")


def state_at(now: datetime) -> ColumnElement[str]:
    """The state as anyone should see it: a lapsed lease no longer holds, nor does an expired gold, though the next
    claim writes that down; what waits for a person or was rejected isn't pending."""
    lapsed = and_(tasks.c.state == "claimed", tasks.c.lease_until <= now)
    state = case((lapsed, _after_failure()), else_=tasks.c.state)
    return case(
        (state != "pending", state),
        (tasks.c.expires_at <= now, "expired"),
        (tasks.c.hold != "", tasks.c.hold),
        else_=state,
    )


def may_be_claimed(now: datetime) -> ColumnElement[bool]:
    fresh = or_(tasks.c.expires_at.is_(None), tasks.c.expires_at > now)
    return and_(tasks.c.state == "pending", tasks.c.hold == "", fresh)


def expire(connection: Connection, policy: Policy, now: datetime) -> None:
    """Marks the golds whose time is over; what they stood against is weighed anew without them."""
    due = select(questions.c.hash).where(questions.c.weigh_at <= now)
    decide(connection, connection.execute(due).scalars(), policy, now)


def give_up_claims(
    connection: Connection,
    held: ColumnElement[bool],
    *,
    failed: bool,
    claim_state: str,
    now: datetime,
    passing_by: bool = False,
) -> int:
    """Puts claimed tasks that match `held` back (or to rest, after too many failures); returns how many.

    `passing_by` leaves those alone that another transaction is at.
    """
    which = select(tasks.c.id).where(tasks.c.state == "claimed", held)
    # Locked before either table is written: else a lease that is renewed meanwhile would lose its row in `run_tasks`.
    ids = connection.execute(which.with_for_update(skip_locked=passing_by)).scalars().all()
    if not ids:
        return 0
    each = [{"given_up": task_id} for task_id in ids]
    connection.execute(
        update(run_tasks)
        .where(run_tasks.c.state == "claimed", run_tasks.c.task_id == bindparam("given_up"))
        .values(state=claim_state, ended_at=now),
        each,
    )
    changed: dict[str, Any] = {"state": "pending", "run_id": None, "lease_until": None, "updated_at": now}
    if failed:
        changed |= {"state": _after_failure(), "attempts": tasks.c.attempts + 1}
    connection.execute(update(tasks).where(tasks.c.id == bindparam("given_up")).values(changed), each)
    return len(ids)


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
        reason=row.reason,
        expires_at=row.expires_at,
    )


def _check_run(connection: Connection, run_id: str) -> None:
    if connection.execute(select(runs.c.id).where(runs.c.id == run_id)).first() is None:
        raise NotFound("run", run_id)


class Queue(Judging):
    def add_task(
        self,
        messages: Sequence[Message],
        verifier: str,
        gold: str,
        kind: str,
        source: str,
        owner: str = "",
        turn_id: str | None = None,
        gold_key: str | None = None,
        expires_at: datetime | None = None,
    ) -> tuple[str, bool]:
        """(task id, whether it is new). The same question, verifier and gold again only add where they came from.

        The gold is a vote of the owner's, see `gold`; `gold_key` as `admission.Gold.key`. Raises QueueFull for a new
        task when `max_pending` already wait.
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
            trust = self.policy.trust(source, owner)
            given = Gold(verifier, gold, source, owner, trust, gold_key, turn_id, expires_at)
            admitted = put_task(
                connection,
                prompt,
                given,
                kind=kind,
                policy=self.policy,
                max_pending=self._max_pending,
                now=self._now(),
            )
            return admitted.task_id, admitted.created

    def claim(
        self, run_id: str, n: int, lease_seconds: float = 3600, only: Sequence[str] | None = None
    ) -> list[QueuedTask]:
        """Up to `n` waiting tasks for this run alone until the lease ends; those that failed least often, then oldest.

        `only`: of these ids. Lapsed leases are taken back first; each counts as a failed attempt. `claim_batch` claims
        with the guards against poisoning, which this doesn't know.
        """
        if n < 1 or lease_seconds <= 0:
            raise InvalidRecord(f"Claim at least one task for some time, not n={n}, lease_seconds={lease_seconds}.")
        with self._write() as connection:
            now = self._now()
            until = now + timedelta(seconds=lease_seconds)
            _check_run(connection, run_id)
            self._sweep(connection)
            rows = connection.execute(
                select(tasks.c.id)
                .where(may_be_claimed(now), *([] if only is None else [tasks.c.id.in_(only)]))
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

    def _sweep(self, connection: Connection) -> None:
        """Writes down what time has done: leases that lapsed, golds that expired."""
        now = self._now()
        lapsed = tasks.c.lease_until <= now
        give_up_claims(connection, lapsed, failed=True, claim_state="expired", now=now, passing_by=True)
        expire(connection, self.policy, now)

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
                    select(tasks.c.id)
                    .where(tasks.c.run_id == run_id, tasks.c.state == "claimed")
                    .order_by(tasks.c.id)
                    .with_for_update()
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
                select(tasks, state_at(self._now()).label("state_now")).where(tasks.c.id == task_id)
            ).first()
        if row is None:
            raise NotFound("task", task_id)
        return task_of(row)

    def tasks(self, state: TaskState | None = None, limit: int = 100) -> list[QueuedTask]:
        """The oldest first; a task whose lease lapsed shows as pending (or dead)."""
        state_now = state_at(self._now())
        query = select(tasks, state_now.label("state_now")).order_by(tasks.c.id).limit(limit)
        if state is not None:
            query = query.where(state_now == state)
        with self._read() as connection:
            return [task_of(row) for row in connection.execute(query)]

    def queue_stats(self) -> dict[str, Any]:
        """How many tasks each state has: `{"pending": n, …, "by_kind": {kind: {state: n}}, "max_pending": n}`."""
        state_now = state_at(self._now()).label("state_now")
        with self._read() as connection:
            rows = connection.execute(
                select(tasks.c.kind, state_now, func.count().label("n")).group_by(tasks.c.kind, state_now)
            ).all()
        states: dict[str, int] = dict.fromkeys(get_args(TaskState), 0)
        by_kind: dict[str, dict[str, int]] = {}
        for row in rows:
            states[row.state_now] += row.n
            by_kind.setdefault(row.kind, {})[row.state_now] = row.n
        return {**states, "by_kind": by_kind, "max_pending": self._max_pending}
