"""How a gold enters the queue: as a task, once for each question and gold, and as its owner's vote for that gold."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from sqlalchemy import Connection, func, insert, select, update
from sqlalchemy.exc import IntegrityError

from feedback_store.codec import check_zone, clean
from feedback_store.errors import InvalidRecord, QueueFull
from feedback_store.gold import Policy, plain_key, question_hash
from feedback_store.ids import new_id
from feedback_store.postgres import hold_owner
from feedback_store.records import Became, Message
from feedback_store.schema import outcomes, task_origins, tasks, turns
from feedback_store.settling import decide, drop_unasked, lock_question, name_again
from feedback_store.votes import quarantined

NOTES: Final[dict[Became, str]] = {
    "": "",
    "queued": "",
    "known": "This task was already in the queue.",
    "reopened": "It was learnt before and answered wrongly again, so it is queued once more.",
    "done": "It was learnt already; an answer that gets it wrong again would queue it once more.",
    "dead": "Training failed on it too often, so it rests: `whetstone queue dead` shows why.",
    "review": "It trains nothing until a person has decided: {reason}.",
    "rejected": "It trains nothing: {reason}.",
    "quarantined": "It trains nothing until a person has looked: earlier golds of this owner contradicted known ones.",
    "expired": "It trains nothing: {reason}.",
}


_RETOLD_BY = 100  # origins, of which one may have the task's words


@dataclass(frozen=True)
class Gold:
    """What is right for a prompt, by whose word. `key`: equal for golds that mean the same, as the verifier's side
    knows; None compares their text, "" takes no part in votes. `missed_at`: when an answer that it was held against,
    and that was wrong, began; None where there was none.
    """

    verifier: str
    text: str
    source: str
    owner: str
    trust: float
    key: str | None = None
    turn_id: str | None = None
    expires_at: datetime | None = None
    missed_at: datetime | None = None


@dataclass(frozen=True)
class Admission:
    """`created`: whether the task is new. `note` says what became of the gold, empty where it is simply queued."""

    task_id: str
    created: bool
    became: Became
    note: str


def content_hash(messages: Sequence[Message], verifier: str, gold: str) -> str:
    """What makes two tasks the same: 64 hex digits over the prompt, the verifier's name and the gold."""
    content = json.dumps([list(messages), verifier, gold], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(clean(content).encode()).hexdigest()


def put_task(
    connection: Connection,
    messages: Sequence[Message],
    gold: Gold,
    *,
    kind: str,
    policy: Policy,
    max_pending: int,
    now: datetime,
) -> Admission:
    """Takes the gold, inside the caller's transaction; raises QueueFull or InvalidRecord, and has written nothing."""
    check_zone(gold.expires_at, "The gold's end")
    if gold.expires_at is not None and gold.expires_at <= now:
        raise InvalidRecord(f"The gold would have expired on {gold.expires_at:%Y-%m-%d %H:%M} UTC: give a later time.")
    digest = question_hash(messages)
    key = plain_key(gold.text) if gold.key is None else gold.key
    hold_owner(connection, gold.owner, shared=True)  # no quarantine of theirs passes by what is not yet to be seen
    name_again(connection, gold.owner)
    lock_question(connection, digest, now)
    found = _same(connection, messages, gold, digest, key)
    task_id, created, reopened = (found.id if found else new_id("task")), False, False
    if found is None:
        try:
            _check_room(connection, max_pending)
        except QueueFull:
            drop_unasked(connection, [digest])
            raise
        created = _insert(connection, task_id, messages, gold, digest, key, kind, now)
        if not created:
            found = _same(connection, messages, gold, digest, key)
            assert found is not None, "another writer has just added it"
            task_id = found.id
    elif found.state == "done" and gold.missed_at is not None and gold.missed_at > found.updated_at:
        _check_room(connection, max_pending)
        changed = {"state": "pending", "attempts": 0, "run_id": None, "lease_until": None, "updated_at": now}
        connection.execute(update(tasks).where(tasks.c.id == task_id).values(changed))
        reopened = True
    origin = {"task_id": task_id, "turn_id": gold.turn_id, "source": gold.source, "owner": gold.owner, "at": now}
    connection.execute(insert(task_origins).values(origin | {"trust": gold.trust, "expires_at": gold.expires_at}))
    decide(connection, [digest], policy, now, owners=[gold.owner])
    became, note = _told(connection, task_id, gold.owner, created, reopened)
    return Admission(task_id, created, became, note)


def retell(connection: Connection, task_id: str) -> None:
    """Gives a task that several asked for, alike but not the same, the words of one who still does: those of its turn
    and its outcome. They stay where someone's are the task's own, or nobody's are in the record."""
    task = connection.execute(
        select(tasks.c.messages, tasks.c.verifier, tasks.c.gold).where(tasks.c.id == task_id)
    ).one()
    look = (
        select(turns.c.messages, outcomes.c.verifier, outcomes.c.gold)
        .select_from(task_origins.join(turns, turns.c.id == task_origins.c.turn_id))
        .join(outcomes, (outcomes.c.turn_id == turns.c.id) & (outcomes.c.task_id == task_origins.c.task_id))
        .where(task_origins.c.task_id == task_id, outcomes.c.owner == task_origins.c.owner, outcomes.c.gold != "")
        .order_by(task_origins.c.id, outcomes.c.id)
        .limit(_RETOLD_BY)
    )
    said = [(row.messages, row.verifier, row.gold) for row in connection.execute(look)]
    if not said or tuple(task) in said:
        return
    messages, verifier, gold = said[0]
    digest = content_hash(messages, verifier, gold)
    if connection.execute(select(tasks.c.id).where(tasks.c.content_hash == digest)).first() is not None:
        digest = hashlib.sha256(f"{digest} {task_id}".encode()).hexdigest()  # another task has exactly these words
    told = {"messages": messages, "verifier": verifier, "gold": gold, "content_hash": digest}
    connection.execute(update(tasks).where(tasks.c.id == task_id).values(told))


def _same(connection: Connection, messages: Sequence[Message], gold: Gold, digest: str, key: str) -> Any | None:
    look = select(tasks.c.id, tasks.c.state, tasks.c.updated_at)
    exact = look.where(tasks.c.content_hash == content_hash(messages, gold.verifier, gold.text))
    if (found := connection.execute(exact).first()) is not None or not key:
        return found
    alike = (tasks.c.question_hash == digest, tasks.c.verifier == gold.verifier, tasks.c.gold_key == key)
    return connection.execute(look.where(*alike).order_by(tasks.c.id)).first()


def _check_room(connection: Connection, max_pending: int) -> None:
    may_be_claimed_some_day = (tasks.c.state == "pending", tasks.c.hold.in_(("", "review")))
    waiting = connection.execute(select(func.count()).where(*may_be_claimed_some_day)).scalar_one()
    if waiting >= max_pending:
        raise QueueFull(
            f"The queue is full: {waiting} tasks wait and {max_pending} may. Run a training, or raise max_pending."
        )


def _insert(
    connection: Connection,
    task_id: str,
    messages: Sequence[Message],
    gold: Gold,
    digest: str,
    key: str,
    kind: str,
    now: datetime,
) -> bool:
    row = {
        "id": task_id,
        "content_hash": content_hash(messages, gold.verifier, gold.text),
        "messages": list(messages),
        "verifier": gold.verifier,
        "gold": gold.text,
        "kind": kind,
        "source": gold.source,
        "owner": gold.owner,
        "state": "pending",
        "attempts": 0,
        "created_at": now,
        "updated_at": now,
        "question_hash": digest,
        "gold_key": key,
        "expires_at": gold.expires_at,
    }
    try:
        with connection.begin_nested():
            connection.execute(insert(tasks).values(row))
    except IntegrityError:  # on a server database another writer may have added it since the look
        return False
    return True


def _told(connection: Connection, task_id: str, owner: str, created: bool, reopened: bool) -> tuple[Became, str]:
    task = connection.execute(select(tasks.c.state, tasks.c.hold, tasks.c.reason).where(tasks.c.id == task_id)).one()
    became: Became = "queued" if created else "reopened" if reopened else "known"
    if task.state in ("done", "dead"):
        became = task.state
    elif task.hold and quarantined(connection, [owner]):
        became = "quarantined"
    elif task.hold:
        became = task.hold
    return became, NOTES[became].format(reason=task.reason)
