"""Applies the rule of `gold` to the tables: which tasks may be claimed, which wait for a person, who is quarantined.

Everything here runs inside the caller's transaction, after the change that made it necessary.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, bindparam, insert, select, update
from sqlalchemy.exc import IntegrityError

from feedback_store.audit import note
from feedback_store.gold import Policy, Verdict, Vote, weigh
from feedback_store.schema import quarantines, questions, task_origins, tasks

GUARD = "guard"  # who: in the audit, what no person decided
QUESTION_ID = 16  # digits of the hash that name a question to people
JUDGED_VOTES = 500  # of an owner: the last ones, that decide on a quarantine
_CHUNK = 400  # bound parameters in one statement


def lock_question(connection: Connection, digest: str, now: datetime) -> None:
    """Makes the question's row if there is none, and holds it: on a server database, its writers take turns."""
    look = select(questions.c.hash).where(questions.c.hash == digest).with_for_update()
    if connection.execute(look).first() is not None:
        return
    row = {"hash": digest, "gold_key": None, "basis": "", "who": "", "reason": "", "at": now}
    try:
        with connection.begin_nested():
            connection.execute(insert(questions).values(row))
    except IntegrityError:  # another writer was first
        connection.execute(look)


def quarantined(connection: Connection) -> set[str]:
    return set(connection.execute(select(quarantines.c.owner).where(quarantines.c.active)).scalars())


def decide(
    connection: Connection, hashes: Iterable[str], policy: Policy, now: datetime, owners: Collection[str] = ()
) -> None:
    """Settles the questions, then quarantines whoever of their voters, and of `owners`, contradicts what is known too
    often; and so on with the questions of these."""
    todo, watched = set(hashes), set(owners)
    while todo:
        watched |= _settle(connection, sorted(todo), policy, now)
        todo = set()
        barred = quarantined(connection)
        for owner in sorted(watched - barred - set(policy.trusted_owners)):
            if reason := _untrustworthy(connection, owner, policy):
                put_in_quarantine(connection, owner, GUARD, reason, now)
                todo |= questions_of(connection, owner)
        watched = set()


def put_in_quarantine(connection: Connection, owner: str, who: str, reason: str, now: datetime) -> None:
    """Writes it down, and in the audit; `decide` on the owner's questions is the caller's to call."""
    row = {"active": True, "who": who, "reason": reason, "at": now}
    if not connection.execute(update(quarantines).where(quarantines.c.owner == owner).values(row)).rowcount:
        connection.execute(insert(quarantines).values(row | {"owner": owner}))
    note(connection, now, who, "quarantine", owner, {"reason": reason})


def questions_of(connection: Connection, owner: str) -> set[str]:
    """All that an owner gave a gold for."""
    given = select(tasks.c.question_hash).join(task_origins, task_origins.c.task_id == tasks.c.id)
    return set(connection.execute(given.where(task_origins.c.owner == owner).distinct()).scalars())


def record_of(connection: Connection, owner: str, since: datetime | None = None) -> tuple[int, int]:
    """(questions whose gold is known among the owner's last votes, how many of these say otherwise)."""
    votes = (
        select(tasks.c.question_hash, tasks.c.gold_key, questions.c.gold_key.label("known"))
        .join(task_origins, task_origins.c.task_id == tasks.c.id)
        .join(questions, questions.c.hash == tasks.c.question_hash)
        .where(task_origins.c.owner == owner, questions.c.basis != "", tasks.c.gold_key != "")
        .order_by(task_origins.c.id.desc())
        .limit(JUDGED_VOTES)
    )
    if since is not None:
        votes = votes.where(task_origins.c.at > since)
    last: dict[str, bool] = {}
    for row in connection.execute(votes):
        last.setdefault(row.question_hash, row.gold_key != row.known)
    return len(last), sum(last.values())


def _untrustworthy(connection: Connection, owner: str, policy: Policy) -> str:
    let_go = connection.execute(select(quarantines.c.at).where(quarantines.c.owner == owner)).scalar()
    judged, wrong = record_of(connection, owner, let_go)
    if wrong < policy.quarantine_after or wrong <= policy.quarantine_rate * judged:
        return ""
    return f"{wrong} of {judged} golds contradict what is known, more than {policy.quarantine_rate:.0%}"


def _settle(connection: Connection, hashes: Sequence[str], policy: Policy, now: datetime) -> set[str]:
    """The owners of votes on questions whose known gold is new or another."""
    barred = quarantined(connection)
    watched: set[str] = set()
    for start in range(0, len(hashes), _CHUNK):
        chunk = hashes[start : start + _CHUNK]
        its_tasks: dict[str, list[Any]] = defaultdict(list)
        look = select(
            tasks.c.id, tasks.c.question_hash, tasks.c.gold_key, tasks.c.state, tasks.c.hold, tasks.c.reason,
            tasks.c.expires_at,
        )  # fmt: skip
        for row in connection.execute(look.where(tasks.c.question_hash.in_(chunk)).order_by(tasks.c.id)):
            its_tasks[row.question_hash].append(row)
        votes: dict[str, list[Any]] = defaultdict(list)
        given = task_origins.c
        asked = select(given.id, given.task_id, given.owner, given.trust).join(tasks)
        for vote in connection.execute(asked.where(tasks.c.question_hash.in_(chunk)).order_by(task_origins.c.id)):
            votes[vote.task_id].append(vote)
        held: list[dict[str, Any]] = []
        for question in connection.execute(select(questions).where(questions.c.hash.in_(chunk))).all():
            mine = its_tasks[question.hash]
            verdict = _verdict(question, mine, votes, barred, policy, now)
            if question.basis != "review" and (verdict.gold_key, verdict.basis) != (question.gold_key, question.basis):
                connection.execute(
                    update(questions)
                    .where(questions.c.hash == question.hash)
                    .values(gold_key=verdict.gold_key, basis=verdict.basis, reason=verdict.reason, at=now)
                )
                if verdict.basis:
                    watched |= {vote.owner for task in mine for vote in votes[task.id]}
            for task in mine:
                hold, reason = _hold(task, verdict, votes[task.id], barred, now)
                if task.state != "dead" and (hold != task.hold or (hold and reason != task.reason)):
                    held.append({"its_id": task.id, "its_hold": hold, "its_reason": reason})
        if held:
            connection.execute(
                update(tasks)
                .where(tasks.c.id == bindparam("its_id"))
                .values(hold=bindparam("its_hold"), reason=bindparam("its_reason")),
                held,
            )
    return watched


def _verdict(
    question: Any,
    its_tasks: list[Any],
    votes: dict[str, list[Any]],
    barred: set[str],
    policy: Policy,
    now: datetime,
) -> Verdict:
    if question.basis == "review":
        return Verdict(question.gold_key, "review", f"{question.who} decided: {question.reason}".removesuffix(": "))
    counted = [
        (vote.id, Vote(vote.owner, task.gold_key, vote.trust))
        for task in its_tasks
        if task.gold_key and not _expired(task, now)
        for vote in votes[task.id]
        if vote.owner not in barred
    ]
    return weigh([vote for _, vote in sorted(counted, key=lambda pair: pair[0])], policy)


def _hold(task: Any, verdict: Verdict, votes: list[Any], barred: set[str], now: datetime) -> tuple[str, str]:
    if _expired(task, now):
        return "expired", f"its gold held until {task.expires_at:%Y-%m-%d %H:%M} UTC"
    if verdict.basis == "review":
        return ("", "") if task.gold_key == verdict.gold_key else ("rejected", verdict.reason)
    if not votes:  # of a store that was made by hand, or erased since: nothing speaks against it
        return task.hold, task.reason
    if not task.gold_key:  # it takes no part in votes: `no_tool`, say
        silent = all(vote.owner in barred for vote in votes)
        return ("review", "every owner who gave it is quarantined") if silent else ("", "")
    if verdict.gold_key is None:
        return "review", verdict.reason
    return ("", "") if task.gold_key == verdict.gold_key else ("rejected", verdict.reason)


def _expired(task: Any, now: datetime) -> bool:
    return task.expires_at is not None and task.expires_at <= now
