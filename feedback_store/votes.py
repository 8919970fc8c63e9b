"""Votes as the tables have them: the last of each owner, how often an owner was wrong, and what stays when they go."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, Connection, func, insert, select, update
from sqlalchemy.exc import IntegrityError

from feedback_store.gold import fingerprint
from feedback_store.ids import owner_hash
from feedback_store.schema import erased_votes, quarantines, questions, task_origins, tasks

JUDGED_VOTES = 500  # of an owner: the last ones, that decide on a quarantine


def quarantined(connection: Connection, owners: Iterable[str]) -> set[str]:
    """Those of these owners whose golds don't count."""
    hashes = set(connection.execute(select(quarantines.c.owner_hash).where(quarantines.c.active)).scalars())
    return {owner for owner in owners if owner_hash(owner) in hashes} if hashes else set()


def last_votes(connection: Connection, hashes: Sequence[str]) -> Sequence[Any]:
    """The last vote of each owner for each task of these questions, the oldest first: `id`, `task_id`, `owner`,
    `trust` (the most that the owner ever gave that gold with), `expires_at`, `question_hash`, `gold_key`."""
    given = task_origins.c
    last = (
        select(func.max(given.id).label("id"), func.max(given.trust).label("trust"))
        .where(given.task_id.in_(select(tasks.c.id).where(tasks.c.question_hash.in_(hashes))))
        .group_by(given.task_id, given.owner)
        .subquery()
    )
    its_tasks = task_origins.join(last, last.c.id == given.id).join(tasks, tasks.c.id == given.task_id)
    columns = (given.id, given.task_id, given.owner, last.c.trust, given.expires_at)
    votes = select(*columns, tasks.c.question_hash, tasks.c.gold_key).select_from(its_tasks)
    return connection.execute(votes.order_by(given.id)).all()


def ended(expires_at: datetime | None, now: datetime) -> bool:
    return expires_at is not None and expires_at <= now


def is_known_as(known: str | None, basis: str, gold_key: str) -> bool:
    """Whether a question's gold, as `questions` has it, is the one of this key."""
    return known == (fingerprint(gold_key) if basis == "known" else gold_key)


def record_of(connection: Connection, owner: str, now: datetime) -> tuple[int, int]:
    """(questions whose gold is known among an owner's last votes, how many of these say otherwise), of those given
    since they were let go, and of golds that were erased."""
    let_go = connection.execute(select(quarantines.c.at).where(quarantines.c.owner_hash == owner_hash(owner))).scalar()
    judged, wrong = _standing_record(connection, owner, let_go, now)
    gone = select(erased_votes.c.judged, erased_votes.c.wrong).where(erased_votes.c.owner_hash == owner_hash(owner))
    for row in connection.execute(gone):
        judged, wrong = judged + row.judged, wrong + row.wrong
    return judged, wrong


def _standing_record(connection: Connection, owner: str, since: datetime | None, now: datetime) -> tuple[int, int]:
    votes = (
        select(tasks.c.question_hash, tasks.c.gold_key, questions.c.gold_key.label("known"), questions.c.basis,
               task_origins.c.expires_at)
        .join(task_origins, task_origins.c.task_id == tasks.c.id)
        .join(questions, questions.c.hash == tasks.c.question_hash)
        .where(task_origins.c.owner == owner, questions.c.basis != "", questions.c.gold_key.is_not(None))
        .where(tasks.c.gold_key != "")
        .order_by(task_origins.c.id.desc())
        .limit(JUDGED_VOTES)
    )  # fmt: skip
    if since is not None:
        votes = votes.where(task_origins.c.at > since)
    last: dict[str, Any] = {}
    for row in connection.execute(votes):
        last.setdefault(row.question_hash, row)
    wrong = [
        not is_known_as(row.known, row.basis, row.gold_key) for row in last.values() if not ended(row.expires_at, now)
    ]
    return len(wrong), sum(wrong)


@contextmanager
def remembered(connection: Connection, which: ColumnElement[bool], now: datetime, *, rights: bool) -> Iterator[None]:
    """Around a change that takes these origins of tasks out of the votes: what they said against known golds goes on
    counting against their owners. For them only with `rights`, where the owner can't repeat it at will: a right gold
    given and deleted often would outweigh any number of wrong ones."""
    owners = set(connection.execute(select(task_origins.c.owner).where(which).distinct()).scalars()) - {""}
    before = {owner: record_of(connection, owner, now) for owner in sorted(owners)}
    yield
    for owner, (judged, wrong) in before.items():
        left_judged, left_wrong = record_of(connection, owner, now)
        wrong = max(0, wrong - left_wrong)
        judged = max(wrong, judged - left_judged) if rights else wrong
        if judged:
            _add_erased(connection, owner_hash(owner), judged, wrong)


def _add_erased(connection: Connection, hashed: str, judged: int, wrong: int) -> None:
    its = erased_votes.c.owner_hash == hashed
    more = {"judged": erased_votes.c.judged + judged, "wrong": erased_votes.c.wrong + wrong}
    if not connection.execute(update(erased_votes).where(its).values(more)).rowcount:
        try:
            with connection.begin_nested():
                connection.execute(insert(erased_votes).values(owner_hash=hashed, judged=judged, wrong=wrong))
        except IntegrityError:  # another writer was first
            connection.execute(update(erased_votes).where(its).values(more))
    half = {"judged": erased_votes.c.judged // 2, "wrong": erased_votes.c.wrong // 2}
    connection.execute(update(erased_votes).where(its, erased_votes.c.judged > JUDGED_VOTES).values(half))
