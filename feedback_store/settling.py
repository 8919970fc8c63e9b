"""Applies the rule of `gold` to the tables: which tasks may be claimed, which wait for a person, who is quarantined.

Everything here runs inside the caller's transaction, after the change that made it necessary.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, bindparam, delete, insert, select, update
from sqlalchemy.exc import IntegrityError

from feedback_store.audit import note
from feedback_store.gold import Policy, Verdict, Vote, fingerprint, weigh
from feedback_store.ids import owner_hash
from feedback_store.postgres import hold_owner
from feedback_store.schema import quarantines, questions, task_origins, tasks
from feedback_store.votes import ended, is_known_as, last_votes, quarantined, record_of

GUARD = "guard"  # who: in the audit, what no person decided
QUESTION_ID = 16  # digits of the hash that name a question to people
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


def drop_unasked(connection: Connection, hashes: Collection[str]) -> None:
    """Of a question that nobody asks any more, not even its gold stays."""
    asked = select(tasks.c.id).where(tasks.c.question_hash == questions.c.hash).exists()
    connection.execute(delete(questions).where(questions.c.hash.in_(hashes), ~asked))


def keep_known(connection: Connection, hashes: Collection[str]) -> None:
    """To be called before `decide`, when votes went only because they grew old: what they made known stays known, by
    the gold's fingerprint alone."""
    known = (questions.c.gold_key.is_not(None), questions.c.basis.in_(("trusted", "consensus")))
    look = select(questions.c.hash, questions.c.gold_key).where(*known)
    asked = sorted(hashes)
    for start in range(0, len(asked), _CHUNK):
        some = questions.c.hash.in_(asked[start : start + _CHUNK])
        for row in connection.execute(look.where(some).with_for_update()).all():
            kept = {"gold_key": fingerprint(row.gold_key), "basis": "known"}
            connection.execute(update(questions).where(questions.c.hash == row.hash).values(kept))


def decide(
    connection: Connection, hashes: Iterable[str], policy: Policy, now: datetime, owners: Collection[str] = ()
) -> None:
    """Settles the questions, then quarantines whoever of their voters, and of `owners`, contradicts what is known too
    often; and so on with the questions of these."""
    todo, watched = set(hashes), set(owners)
    while todo:
        watched |= _settle(connection, sorted(todo), policy, now)
        todo = set()
        barred = quarantined(connection, watched)
        for owner in sorted(watched - barred - set(policy.trusted_owners)):
            if reason := _untrustworthy(connection, owner, policy, now):
                put_in_quarantine(connection, owner, GUARD, reason, now)
                todo |= questions_of(connection, owner)
        watched = set()


def put_in_quarantine(connection: Connection, owner: str, who: str, reason: str, now: datetime) -> None:
    """Writes it down, and in the audit; `decide` on the owner's questions is the caller's to call. Waits until no gold
    of the owner's is being taken: the next one knows."""
    hold_owner(connection, owner)
    hashed = owner_hash(owner)
    row = {"owner": owner, "active": True, "who": who, "reason": reason, "at": now}
    if not connection.execute(update(quarantines).where(quarantines.c.owner_hash == hashed).values(row)).rowcount:
        connection.execute(insert(quarantines).values(row | {"owner_hash": hashed}))
    note(connection, now, who, "quarantine", owner, {"reason": reason})


def forget_in_quarantine(connection: Connection, owner: str) -> None:
    """Their name goes and, as long as it is in force, the quarantine stays: the key still works."""
    its = quarantines.c.owner_hash == owner_hash(owner)
    connection.execute(delete(quarantines).where(its, ~quarantines.c.active))
    connection.execute(update(quarantines).where(its).values(owner="", reason=""))


def name_again(connection: Connection, owner: str) -> None:
    """Gives an owner who was forgotten in quarantine, and is back, their name there."""
    its = quarantines.c.owner_hash == owner_hash(owner), quarantines.c.owner == ""
    connection.execute(update(quarantines).where(*its).values(owner=owner))


def questions_of(connection: Connection, owner: str) -> set[str]:
    """All that an owner gave a gold for."""
    given = select(tasks.c.question_hash).join(task_origins, task_origins.c.task_id == tasks.c.id)
    return set(connection.execute(given.where(task_origins.c.owner == owner).distinct()).scalars())


def _untrustworthy(connection: Connection, owner: str, policy: Policy, now: datetime) -> str:
    judged, wrong = record_of(connection, owner, now)
    if wrong < policy.quarantine_after or wrong <= policy.quarantine_rate * judged:
        return ""
    return f"{wrong} of {judged} golds contradict what is known, more than {policy.quarantine_rate:.0%}"


def _settle(connection: Connection, hashes: Sequence[str], policy: Policy, now: datetime) -> set[str]:
    """The owners of votes on questions whose known gold is new or another."""
    watched: set[str] = set()
    for start in range(0, len(hashes), _CHUNK):
        chunk = hashes[start : start + _CHUNK]
        locked = select(questions).where(questions.c.hash.in_(chunk)).order_by(questions.c.hash).with_for_update()
        asked = connection.execute(locked).all()
        its_tasks: dict[str, list[Any]] = defaultdict(list)
        look = select(
            tasks.c.id, tasks.c.question_hash, tasks.c.gold_key, tasks.c.state, tasks.c.hold, tasks.c.reason,
            tasks.c.expires_at,
        )  # fmt: skip
        for row in connection.execute(look.where(tasks.c.question_hash.in_(chunk)).order_by(tasks.c.id)):
            its_tasks[row.question_hash].append(row)
        votes: dict[str, list[Any]] = defaultdict(list)
        for vote in last_votes(connection, chunk):
            votes[vote.question_hash].append(vote)
        barred = quarantined(connection, {vote.owner for its in votes.values() for vote in its})
        changed: list[dict[str, Any]] = []
        for question in asked:
            mine = votes[question.hash]
            word = {vote.owner: vote for vote in mine if vote.gold_key and vote.owner not in barred}
            verdict = _verdict(question, word, policy, now)
            values: dict[str, Any] = {}
            if question.basis != "review" and (verdict.gold_key, verdict.basis) != (question.gold_key, question.basis):
                values = {"gold_key": verdict.gold_key, "basis": verdict.basis, "reason": verdict.reason, "at": now}
                if verdict.basis:
                    watched |= {vote.owner for vote in mine}
            ends = [vote.expires_at for vote in mine if vote.expires_at is not None]
            weigh_at = min((end for end in ends if end > now), default=None)
            if values or weigh_at != question.weigh_at:
                its = update(questions).where(questions.c.hash == question.hash)
                connection.execute(its.values(values | {"weigh_at": weigh_at}))
            for task in its_tasks[question.hash]:
                given = [vote for vote in mine if vote.task_id == task.id]
                expires_at = _end(task, given, word, barred)
                hold, reason = _hold(task, verdict, given, barred, expires_at, now)
                if task.state == "dead":  # its reason says why it died
                    hold, reason = task.hold, task.reason
                if (expires_at, hold) != (task.expires_at, task.hold) or (hold and reason != task.reason):
                    changed.append({"its_id": task.id, "its_hold": hold, "its_reason": reason, "its_end": expires_at})
        if changed:
            connection.execute(
                update(tasks)
                .where(tasks.c.id == bindparam("its_id"))
                .values(hold=bindparam("its_hold"), reason=bindparam("its_reason"), expires_at=bindparam("its_end")),
                changed,
            )
    return watched


def _verdict(question: Any, word: dict[str, Any], policy: Policy, now: datetime) -> Verdict:
    """By each owner's last word on the question; who let it expire has none, and an older one isn't gone back to."""
    if question.basis == "review":
        return Verdict(question.gold_key, "review", f"{question.who} decided: {question.reason}".removesuffix(": "))
    standing = [vote for vote in word.values() if not ended(vote.expires_at, now)]
    standing.sort(key=lambda vote: vote.id)
    verdict = weigh([Vote(vote.owner, vote.gold_key, vote.trust) for vote in standing], policy)
    if question.basis == "known" and not verdict.basis:
        return Verdict(question.gold_key, "known", "golds that have been erased by age made another one known")
    return verdict


def _end(task: Any, given: list[Any], word: dict[str, Any], barred: set[str]) -> datetime | None:
    """When the last of the votes that count for a task ends. Whoever repeats a gold can't end what others said."""
    if task.gold_key:
        counted = [vote for vote in given if vote.owner in word and word[vote.owner].id == vote.id]
    else:
        counted = [vote for vote in given if vote.owner not in barred]
    ends = [vote.expires_at for vote in counted or given]
    if not ends:
        return task.expires_at  # type: ignore[no-any-return]
    return None if None in ends else max(ends)


def _hold(
    task: Any, verdict: Verdict, given: list[Any], barred: set[str], expires_at: datetime | None, now: datetime
) -> tuple[str, str]:
    if expires_at is not None and expires_at <= now:
        return "expired", f"its gold held until {expires_at:%Y-%m-%d %H:%M} UTC"
    wins = verdict.gold_key is not None and is_known_as(verdict.gold_key, verdict.basis, task.gold_key)
    if verdict.basis == "review":
        return ("", "") if wins else ("rejected", verdict.reason)
    if not given:  # of a store that was made by hand, or erased since: nothing speaks against it
        return task.hold, task.reason
    if not task.gold_key:  # it takes no part in votes: `no_tool`, say
        silent = all(vote.owner in barred for vote in given)
        return ("review", "every owner who gave it is quarantined") if silent else ("", "")
    if verdict.gold_key is None:
        return "review", verdict.reason
    return ("", "") if wins else ("rejected", verdict.reason)
