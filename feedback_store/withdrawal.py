"""Taking tasks back: what a run once claimed loses its text and stays as a name, the rest goes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import TypeVar

from sqlalchemy import Connection, delete, select, update

from feedback_store.schema import outcomes, run_tasks, task_origins, tasks
from feedback_store.settling import drop_unasked
from feedback_store.votes import remembered

CHUNK = 500  # ids in one statement
T = TypeVar("T")


def chunks(items: Sequence[T]) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), CHUNK):
        yield items[start : start + CHUNK]


def withdraw(connection: Connection, task_ids: Sequence[str], now: datetime) -> tuple[int, int, set[str]]:
    """How many tasks were deleted and how many emptied, and the questions, which are to be decided anew.

    Those that a run has claimed are emptied (state `withdrawn`, no messages, no gold), and keep their origins: which
    run used them stays known, and whose they were to who forgets these later. The same question may be asked for again,
    as a new task.
    """
    emptied = 0
    hashes: set[str] = set()
    for some in chunks(task_ids):
        hashes |= set(connection.execute(select(tasks.c.question_hash).where(tasks.c.id.in_(some))).scalars())
        with remembered(connection, task_origins.c.task_id.in_(some), now, rights=False):
            emptied += _withdraw(connection, some, now)
    for some in chunks(sorted(hashes)):
        drop_unasked(connection, some)
    return len(task_ids) - emptied, emptied, hashes


def _withdraw(connection: Connection, some: Sequence[str], now: datetime) -> int:
    """How many were emptied."""
    used = set(
        connection.execute(select(run_tasks.c.task_id).where(run_tasks.c.task_id.in_(some)).distinct()).scalars()
    )
    lapsed = run_tasks.c.task_id.in_(used) & (run_tasks.c.state == "claimed")
    connection.execute(update(run_tasks).where(lapsed).values(state="expired", ended_at=now))
    if used:
        connection.execute(
            update(tasks)
            .where(tasks.c.id.in_(used))
            .values(
                content_hash="withdrawn:" + tasks.c.id,
                messages=[],
                gold="",
                question_hash="",
                gold_key="",
                hold="",
                reason="",
                expires_at=None,
                owner="",
                state="withdrawn",
                run_id=None,
                lease_until=None,
                updated_at=now,
            )
        )
    connection.execute(update(outcomes).where(outcomes.c.task_id.in_(some)).values(task_id=None))
    unused = [id for id in some if id not in used]
    connection.execute(delete(task_origins).where(task_origins.c.task_id.in_(unused)))
    connection.execute(delete(tasks).where(tasks.c.id.in_(unused)))
    return len(used)
