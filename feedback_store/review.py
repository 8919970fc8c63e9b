"""The review list: questions whose gold nobody knows until a person decides, and what was decided."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, func, select, update

from feedback_store.audit import note
from feedback_store.errors import InvalidRecord, NotFound
from feedback_store.gold import Judging
from feedback_store.queue import state_at
from feedback_store.records import Claim, Review
from feedback_store.schema import questions, task_origins, tasks
from feedback_store.settling import QUESTION_ID, decide, lock_question
from feedback_store.votes import ended, is_known_as, quarantined


class Reviews(Judging):
    def reviews(self, limit: int = 50) -> list[Review]:
        """The questions that wait for a person, the longest first."""
        waiting = (
            select(tasks.c.question_hash)
            .where(tasks.c.state == "pending", tasks.c.hold == "review")
            .group_by(tasks.c.question_hash)
            .order_by(func.min(tasks.c.id))
            .limit(limit)
        )
        with self._read() as connection:
            return [self._look(connection, digest) for digest in connection.execute(waiting).scalars().all()]

    def review(self, review_id: str) -> Review:
        """A question by the start of its hash, or by the id of one of its tasks, whether it waits for review or not."""
        with self._read() as connection:
            return self._look(connection, self._hash(connection, review_id))

    def decide_review(self, review_id: str, gold: str | None, who: str, reason: str = "") -> Review:
        """Ends the argument: `gold`, one that was given, is right and trains; None: none is, nor will others be.

        It holds until it is decided again or withdrawn. Owners who said otherwise are judged by it.
        """
        now = self._now()
        with self._write() as connection:
            digest = self._hash(connection, review_id)
            lock_question(connection, digest, now)
            key = None
            if gold is not None:
                columns = select(tasks.c.gold, tasks.c.gold_key, tasks.c.expires_at)
                rows = connection.execute(columns.where(tasks.c.question_hash == digest)).all()
                keys = {row.gold: row.gold_key for row in rows if row.gold_key}
                if gold not in keys:
                    raise InvalidRecord(
                        f"Nobody gave the gold {gold!r} for this question; there are {', '.join(map(repr, keys))}. "
                        "Teach it first (feedback on the turn), then accept it."
                    )
                key = keys[gold]
                if all(ended(row.expires_at, now) for row in rows if row.gold_key == key):
                    raise InvalidRecord(
                        f"The gold {gold!r} has expired, so it would train nothing. Teach it again, then accept it."
                    )
            values = {"gold_key": key, "basis": "review", "who": who, "reason": reason, "at": now}
            connection.execute(update(questions).where(questions.c.hash == digest).values(values))
            right = select(tasks.c.id).where(tasks.c.question_hash == digest, tasks.c.gold == gold).order_by(tasks.c.id)
            detail = {"task": connection.execute(right.limit(1)).scalar(), "reason": reason}  # which has the gold
            note(
                connection,
                now,
                who,
                "review.accept" if gold is not None else "review.reject",
                digest[:QUESTION_ID],
                detail,
            )
            decide(connection, [digest], self.policy, now, owners=_voters(connection, digest))
            return self._look(connection, digest)

    def withdraw_review(self, review_id: str, who: str, reason: str = "") -> Review:
        """Takes a decision back: the votes decide again. Raises InvalidRecord where nothing was decided."""
        now = self._now()
        with self._write() as connection:
            digest = self._hash(connection, review_id)
            its = (questions.c.hash == digest, questions.c.basis == "review")
            open_again = {"gold_key": None, "basis": "", "who": "", "reason": "", "at": now}
            if not connection.execute(update(questions).where(*its).values(open_again)).rowcount:
                raise InvalidRecord(f"Nothing was decided about question {digest[:QUESTION_ID]}.")
            note(connection, now, who, "review.withdraw", digest[:QUESTION_ID], {"reason": reason})
            decide(connection, [digest], self.policy, now)
            return self._look(connection, digest)

    def _hash(self, connection: Connection, review_id: str) -> str:
        by_task = connection.execute(select(tasks.c.question_hash).where(tasks.c.id == review_id)).scalar()
        if by_task is not None:
            return str(by_task)
        start = (questions.c.hash >= review_id, questions.c.hash < f"{review_id}g")
        found = connection.execute(select(questions.c.hash).where(*start).limit(2)).scalars().all()
        if not review_id or len(found) != 1:
            if found:
                raise InvalidRecord(f"Several questions begin with {review_id!r}: give more digits.")
            raise NotFound("question", review_id)
        return str(found[0])

    def _look(self, connection: Connection, digest: str) -> Review:
        question = connection.execute(select(questions).where(questions.c.hash == digest)).one()
        look = select(tasks, state_at(self._now()).label("state_now")).where(tasks.c.question_hash == digest)
        its_tasks = connection.execute(look.order_by(tasks.c.id)).all()
        if not its_tasks:
            raise NotFound("task of question", digest[:QUESTION_ID])
        waiting = [task for task in its_tasks if task.state_now == "review"]
        return Review(
            id=digest[:QUESTION_ID],
            messages=its_tasks[0].messages,
            verifiers=sorted({task.verifier for task in its_tasks}),
            golds=_golds(connection, its_tasks),
            reason=(waiting or its_tasks)[0].reason,
            basis=question.basis,
            decided_by=question.who,
            decision=next(
                (task.gold for task in its_tasks if is_known_as(question.gold_key, question.basis, task.gold_key)), None
            ),
            at=question.at,
        )


def _golds(connection: Connection, its_tasks: list[Any] | Any) -> list[Claim]:
    by_key: dict[str, list[Any]] = {}
    for task in its_tasks:
        by_key.setdefault(task.gold_key, []).append(task)
    last: dict[str, tuple[str, float]] = {}
    key_of = {task.id: task.gold_key for task in its_tasks}
    look = select(task_origins).where(task_origins.c.task_id.in_(list(key_of))).order_by(task_origins.c.id)
    votes = connection.execute(look).all()
    barred = quarantined(connection, {vote.owner for vote in votes})
    for vote in votes:
        last[vote.owner] = (key_of[vote.task_id], 0.0 if vote.owner in barred else vote.trust)
    claims = []
    for key, alike in by_key.items():
        owners = {owner: trust for owner, (its_key, trust) in last.items() if its_key == key}
        claims.append(
            Claim(
                gold=alike[0].gold,
                trust=sum(owners.values()),
                owners=dict(sorted(owners.items(), key=lambda item: (-item[1], item[0]))),
                task_ids=[task.id for task in alike],
                states=[task.state_now for task in alike],
            )
        )
    return sorted(claims, key=lambda claim: -claim.trust)


def _voters(connection: Connection, digest: str) -> list[str]:
    its = select(task_origins.c.owner).join(tasks).where(tasks.c.question_hash == digest)
    return list(connection.execute(its.distinct()).scalars())
