"""Deleting a conversation at its owner's wish: its text and tokens, and the tasks that came of it alone."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import delete, select, update

from feedback_store.errors import InvalidRecord, NotFound
from feedback_store.gold import Judging
from feedback_store.schema import (
    conversations,
    outcomes,
    questions,
    run_tasks,
    steps,
    task_origins,
    tasks,
    tool_results,
    turns,
)  # fmt: skip
from feedback_store.settling import decide


@dataclass(frozen=True)
class Deleted:
    """What went: turns, and tasks that waited. `tasks_kept`: a run has claimed them, or others asked for them too."""

    turns: int
    tasks: int
    tasks_kept: int


class Deletion(Judging):
    def delete_conversation(self, conversation_id: str) -> Deleted:
        """Its turns, steps, verdicts, the tool results that nothing else refers to, and tasks of no other origin that
        no run has ever claimed. Raises InvalidRecord while an answer is under way."""
        its = select(turns.c.id).where(turns.c.conversation_id == conversation_id)
        with self._write() as connection:
            if (
                connection.execute(select(conversations.c.id).where(conversations.c.id == conversation_id)).first()
                is None
            ):
                raise NotFound("conversation", conversation_id)
            if connection.execute(its.where(turns.c.status == "running")).first() is not None:
                raise InvalidRecord(
                    f"An answer of conversation {conversation_id} is under way; delete it when that has ended."
                )
            asked_for = set(
                connection.execute(select(task_origins.c.task_id).where(task_origins.c.turn_id.in_(its))).scalars()
            )
            hashes = list(
                connection.execute(
                    select(tasks.c.question_hash).where(tasks.c.id.in_(list(asked_for))).distinct()
                ).scalars()
            )
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
            # What is left of the votes decides; of a question that nobody asks any more, not even its gold stays.
            decide(connection, hashes, self.policy, self._now())
            asked = select(tasks.c.id).where(tasks.c.question_hash == questions.c.hash).exists()
            connection.execute(delete(questions).where(questions.c.hash.in_(hashes), ~asked))
            count = connection.execute(delete(turns).where(turns.c.conversation_id == conversation_id)).rowcount
            connection.execute(delete(conversations).where(conversations.c.id == conversation_id))
        return Deleted(count, gone, len(asked_for) - gone)
