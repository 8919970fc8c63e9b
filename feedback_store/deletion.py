"""Deleting a conversation, or a turn of it, at its owner's wish: its text and tokens, and the tasks of it alone."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import Connection, Select, delete, select, update

from feedback_store.database import Database
from feedback_store.errors import InvalidRecord, NotFound
from feedback_store.schema import conversations, outcomes, run_tasks, steps, task_origins, tasks, tool_results, turns


@dataclass(frozen=True)
class Deleted:
    """What went: turns, and tasks that waited. `tasks_kept`: a run has claimed them, or others asked for them too."""

    turns: int
    tasks: int
    tasks_kept: int


class Deletion(Database):
    def delete_conversation(self, conversation_id: str) -> Deleted:
        """Its turns, steps, verdicts, the tool results that nothing else refers to, and tasks of no other origin that
        no run has ever claimed. Raises InvalidRecord while an answer is under way."""
        its = select(turns.c.id).where(turns.c.conversation_id == conversation_id)
        with self._write() as connection:
            known = select(conversations.c.id).where(conversations.c.id == conversation_id)
            if connection.execute(known).first() is None:
                raise NotFound("conversation", conversation_id)
            if connection.execute(its.where(turns.c.status == "running")).first() is not None:
                raise InvalidRecord(
                    f"An answer of conversation {conversation_id} is under way; delete it when that has ended."
                )
            gone = _forget(connection, its)
            connection.execute(delete(conversations).where(conversations.c.id == conversation_id))
        return gone

    def delete_turn(self, turn_id: str) -> Deleted:
        """One turn, as `delete_conversation` deletes all. Its conversation stays, without the title if that was this
        turn's; later turns keep what they were asked with, which may tell what was said here. Raises InvalidRecord
        while it is answered."""
        with self._write() as connection:
            row = connection.execute(
                select(turns.c.conversation_id, turns.c.status).where(turns.c.id == turn_id)
            ).first()
            if row is None:
                raise NotFound("turn", turn_id)
            if row.status == "running":
                raise InvalidRecord(f"Turn {turn_id} is being answered; delete it when that has ended.")
            first = select(turns.c.id).where(turns.c.conversation_id == row.conversation_id).order_by(turns.c.id)
            named = connection.execute(first.limit(1)).scalar() == turn_id
            gone = _forget(connection, select(turns.c.id).where(turns.c.id == turn_id))
            if named:
                its = conversations.c.id == row.conversation_id
                connection.execute(update(conversations).where(its).values(title=""))
        return gone


def _forget(connection: Connection, its: Select[tuple[str]]) -> Deleted:
    """Delete the turns that `its` selects, and what depends on them."""
    asked_for = set(connection.execute(select(task_origins.c.task_id).where(task_origins.c.turn_id.in_(its))).scalars())
    results = set(
        connection.execute(
            select(steps.c.result_hash).where(steps.c.turn_id.in_(its), steps.c.result_hash.is_not(None))
        ).scalars()
    )
    connection.execute(delete(outcomes).where(outcomes.c.turn_id.in_(its)))
    connection.execute(delete(steps).where(steps.c.turn_id.in_(its)))
    for digest in results:
        connection.execute(
            delete(tool_results).where(
                tool_results.c.hash == digest,
                ~select(steps.c.turn_id).where(steps.c.result_hash == digest).exists(),
            )
        )
    gone = 0
    for task_id in asked_for:
        its_origins = task_origins.c.task_id == task_id
        mine = task_origins.c.turn_id.in_(its)
        if connection.execute(select(run_tasks.c.id).where(run_tasks.c.task_id == task_id)).first() is not None:
            # That it was asked for stays, for the lineage of what was trained on it; by whom doesn't.
            connection.execute(update(task_origins).where(its_origins, mine).values(turn_id=None))
            continue
        connection.execute(delete(task_origins).where(its_origins, mine))
        if connection.execute(select(task_origins.c.id).where(its_origins)).first() is None:
            connection.execute(delete(tasks).where(tasks.c.id == task_id))
            gone += 1
    count = connection.execute(delete(turns).where(turns.c.id.in_(its))).rowcount
    return Deleted(count, gone, len(asked_for) - gone)
