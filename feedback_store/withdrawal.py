"""Taking tasks back: what a run once claimed loses its text and stays as a name, the rest goes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import TypeVar

from sqlalchemy import Connection, delete, select, update

from feedback_store.schema import outcomes, questions, run_tasks, task_origins, tasks

CHUNK = 500  # ids in one statement
T = TypeVar("T")


def chunks(items: Sequence[T]) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), CHUNK):
        yield items[start : start + CHUNK]


def withdraw(connection: Connection, task_ids: Sequence[str], now: datetime) -> tuple[int, int]:
    """How many tasks were deleted and how many emptied. Those that a run has claimed are emptied (state `withdrawn`,
    no messages, no gold), and keep their origins: which run used them stays known, and whose they were to who forgets
    these later. The same question may be asked for again, as a new task.
    """
    emptied = 0
    hashes: set[str] = set()
    for some in chunks(task_ids):
        its = select(tasks.c.question_hash).where(tasks.c.id.in_(some))
        hashes |= set(connection.execute(its).scalars())
        used = set(
            connection.execute(select(run_tasks.c.task_id).where(run_tasks.c.task_id.in_(some)).distinct()).scalars()
        )
        emptied += len(used)
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
                    reason="",
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
    for some in chunks(sorted(hashes)):  # of a question that nobody asks any more, not even its gold stays
        asked = select(tasks.c.id).where(tasks.c.question_hash == questions.c.hash).exists()
        connection.execute(delete(questions).where(questions.c.hash.in_(some), ~asked))
    return len(task_ids) - emptied, emptied
