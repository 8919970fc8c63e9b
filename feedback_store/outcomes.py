"""Outcomes: verdicts on turns. One that names a verifier and a gold turns the prompt into a task, once."""

from __future__ import annotations

import math
from datetime import datetime
from typing import Any, get_args

from sqlalchemy import Row, insert, select

from feedback_store.admission import Gold, put_task
from feedback_store.consent import NO_CONSENT, Consents
from feedback_store.errors import InvalidRecord, NotFound, QueueFull
from feedback_store.ids import new_id
from feedback_store.records import RIGHT, Outcome, OutcomeSource
from feedback_store.schema import outcomes, turns


def outcome_of(row: Row[Any]) -> Outcome:
    return Outcome(
        id=row.id,
        turn_id=row.turn_id,
        source=row.source,
        score=row.score,
        verifier=row.verifier,
        gold=row.gold,
        reason=row.reason,
        owner=row.owner,
        task_id=row.task_id,
        note=row.note,
        created_at=row.created_at,
        trust=row.trust,
        became=row.became,
        expires_at=row.expires_at,
    )


class Outcomes(Consents):
    def add_outcome(
        self,
        turn_id: str,
        source: OutcomeSource,
        score: float | None,
        verifier: str = "",
        gold: str = "",
        reason: str = "",
        owner: str = "",
        no_task: str = "",
        gold_key: str | None = None,
        expires_at: datetime | None = None,
    ) -> Outcome:
        """Records a verdict (`score` in [0, 1], or None where only the right answer is known).

        `no_task` says why the prompt can't be a task, if it can't; that its owner doesn't consent is a reason too.
        Otherwise, with a verifier and a gold, the turn's prompt becomes a task of kind `verifier`, exactly once for the
        same question, verifier and gold, and the gold a vote of the owner's: see `gold`, and `admission.Gold.key` for
        `gold_key`. From `expires_at` on the gold trains nothing. A task that is done is opened again by a wrong answer
        that began later. A full queue keeps the outcome, makes no task, and says so in `note`.
        """
        if source not in get_args(OutcomeSource):
            raise InvalidRecord(f"The source {source!r} is none of {', '.join(get_args(OutcomeSource))}.")
        if score is not None and not (math.isfinite(score) and 0 <= score <= 1):
            raise InvalidRecord(f"The score {score!r} lies outside [0, 1].")
        now = self._now()
        trust = self.policy.trust(source, owner)
        task_id, note, became = None, "", ""
        with self._write() as connection:
            turn = connection.execute(select(turns.c.messages, turns.c.created_at).where(turns.c.id == turn_id)).first()
            if turn is None:
                raise NotFound("turn", turn_id)
            if not no_task and verifier and gold and not self._consents_to_task(connection, turn_id):
                no_task = NO_CONSENT
            if no_task:
                note = f"No task was made: {no_task}"
            elif verifier and gold:
                missed_at = turn.created_at if score is not None and score <= RIGHT else None
                given = Gold(verifier, gold, source, owner, trust, gold_key, turn_id, expires_at, missed_at)
                try:
                    admitted = put_task(
                        connection,
                        turn.messages,
                        given,
                        kind=verifier,
                        policy=self.policy,
                        max_pending=self._max_pending,
                        now=now,
                    )
                    task_id, note, became = admitted.task_id, admitted.note, admitted.became
                except QueueFull as full:
                    note = f"No task was made. {full}"
            elif verifier or gold:
                missing = "gold" if verifier else "verifier"
                note = f"No task was made: it needs a verifier and a gold, and the {missing} is missing."
            row = {
                "id": new_id("out"),
                "turn_id": turn_id,
                "source": source,
                "score": score,
                "verifier": verifier,
                "gold": gold,
                "reason": reason,
                "owner": owner,
                "task_id": task_id,
                "note": note,
                "created_at": now,
                "trust": trust,
                "became": became,
                "expires_at": expires_at,
            }
            connection.execute(insert(outcomes).values(row))
            return outcome_of(connection.execute(select(outcomes).where(outcomes.c.id == row["id"])).one())

    def outcomes(self, turn_id: str | None = None, limit: int = 100) -> list[Outcome]:
        """The newest first."""
        query = select(outcomes).order_by(outcomes.c.id.desc()).limit(limit)
        if turn_id is not None:
            query = query.where(outcomes.c.turn_id == turn_id)
        with self._read() as connection:
            return [outcome_of(row) for row in connection.execute(query)]
