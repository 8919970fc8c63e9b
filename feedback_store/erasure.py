"""Erasure: the text and the tokens of conversations go, ids and times stay, and what trained on them is marked.

The record changes in one transaction. What lies outside of it (files, the runs' own copies, what a database leaves
behind in its file) is swept afterwards: `sweep` says what is still to do, and is safe to follow again after a crash.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime

from sqlalchemy import Connection, delete, select, update

from feedback_store.audit import note
from feedback_store.database import again_after_conflicts, in_several_transactions
from feedback_store.erasing import Erased, Reason, Work
from feedback_store.errors import InvalidRecord, NotFound
from feedback_store.gold import Judging
from feedback_store.ids import owner_hash
from feedback_store.schema import audit, consents, conversations, erased_uses, tombstones, turns
from feedback_store.settling import decide, forget_in_quarantine, keep_known
from feedback_store.taints import tainted_versions
from feedback_store.withdrawal import chunks

_ROWS = (
    select(conversations.c.id, conversations.c.owner, conversations.c.created_at)
    .order_by(conversations.c.id)
    .with_for_update()
)
# On PostgreSQL the lock keeps new turns out; SQLite has one writer anyway.
RETENTION = "retention"  # who: in the audit, what only grew too old


class Erasure(Judging):
    def erase(
        self, *, conversation: str | None = None, owner: str | None = None, dry_run: bool = False, who: str = ""
    ) -> Erased:
        """Forgets a conversation, or all of an owner's with every task that they asked for, in one transaction.

        The caller sweeps afterwards (see `unswept`). What was erased before is counted in `already`. Raises NotFound,
        and Busy while an answer of it, or a run that uses its tasks, is under way. `dry_run` only counts. `who`: in
        the audit; the owner themself, by the hash, where nobody is named.
        """
        if (conversation is None) == (owner is None):
            raise InvalidRecord("Say what to forget: a conversation, or an owner.")
        with self._erasing("forgotten", dry_run, skip_busy=False) as (connection, work):
            whose = conversations.c.id == conversation if owner is None else conversations.c.owner == owner
            rows = connection.execute(_ROWS.where(whose)).all()
            work.erased.already = _already(connection, conversation, owner)
            for some in chunks(rows):
                work.erase(some)
            found = bool(rows or work.erased.already)
            if owner is not None:
                found |= work.erase_tasks_of(owner) | work.erase_verdicts_of(owner)
                # what they refused stays refused
                connection.execute(delete(consents).where(consents.c.owner == owner, consents.c.training))
                forget_in_quarantine(connection, owner)
                nameless = {"subject": owner_hash(owner), "detail": {}}
                connection.execute(update(audit).where(audit.c.subject == owner).values(nameless))
            if not found:
                raise NotFound(*("owner", owner) if owner is not None else ("conversation", str(conversation)))
            of = str(conversation) if owner is None else owner_hash(owner)
            if rows or owner is not None:
                _note(connection, work, who or owner_hash(owner or rows[0].owner), "forget", of)
        return work.erased

    def erase_turn(self, turn_id: str, who: str = "") -> Erased:
        """Forgets one turn, as `erase` does a conversation, which stays. Later turns keep what they were asked with,
        which may tell what was said here. Raises NotFound and Busy."""
        with self._erasing("forgotten", False, skip_busy=False) as (connection, work):
            row = connection.execute(select(turns).where(turns.c.id == turn_id)).first()
            if row is None:
                raise NotFound("turn", turn_id)
            whose = select(conversations.c.owner).where(conversations.c.id == row.conversation_id)
            owner = connection.execute(whose).scalar_one()
            work.erase_turn(row, owner)
            _note(connection, work, who or owner_hash(owner), "forget.turn", turn_id)
        return work.erased

    @in_several_transactions
    def expire(self, before: datetime, dry_run: bool = False) -> Erased:
        """Erases the conversations that have rested since `before`, some in each transaction; the caller sweeps.

        Versions that were trained on them aren't tainted: nobody took anything back. Conversations of which an answer
        or a task is in use are skipped.
        """
        total = Erased(dry_run=dry_run)
        for some in chunks(self._rested(before)):
            total.add(self._expire(some, before, dry_run))
        return total

    @again_after_conflicts
    def _rested(self, before: datetime) -> list[str]:
        old = select(conversations.c.id).where(conversations.c.updated_at < before).order_by(conversations.c.id)
        with self._read() as connection:
            return list(connection.execute(old).scalars())

    @again_after_conflicts
    def _expire(self, some: Sequence[str], before: datetime, dry_run: bool) -> Erased:
        with self._erasing("expired", dry_run, skip_busy=True) as (connection, work):
            still = conversations.c.id.in_(some), conversations.c.updated_at < before
            work.erase(connection.execute(_ROWS.where(*still)).all())
            if work.erased.conversations:
                _note(connection, work, RETENTION, "expire", f"rested since {before:%Y-%m-%d %H:%M}")
        return work.erased

    @contextmanager
    def _erasing(self, reason: Reason, dry_run: bool, skip_busy: bool) -> Iterator[tuple[Connection, Work]]:
        with self._write() as connection:
            if connection.dialect.name == "sqlite":
                connection.exec_driver_sql("PRAGMA secure_delete = ON")  # what is deleted is overwritten
            tainted = set(tainted_versions(connection))
            work = Work(connection, self._now(), reason, skip_busy)
            yield connection, work
            work.forget_reviews()
            if reason == "expired":
                keep_known(connection, work.questions)
            decide(connection, work.questions, self.policy, work.now)  # their votes are gone
            work.judge(tainted)
            if dry_run:
                work.erased.dry_run = True
                transaction = connection.get_transaction()
                assert transaction is not None, "_write begins one"
                transaction.rollback()


def _note(connection: Connection, work: Work, who: str, action: str, subject: str) -> None:
    """Into the audit: how much went, no text."""
    counts = {"conversations": len(work.erased.conversations), "turns": work.erased.turns}
    counts["tasks"] = work.erased.tasks_deleted + work.erased.tasks_emptied
    note(connection, work.now, who, action, subject, counts)


def _already(connection: Connection, conversation: str | None, owner: str | None) -> int:
    """How many were erased before. What expired then is forgotten now: what was trained on it is tainted."""
    stones, uses = tombstones.c, erased_uses.c
    if owner is None:
        its, used = stones.conversation_id == conversation, uses.conversation_id == conversation
    else:
        its, used = stones.owner_hash == owner_hash(owner), uses.owner_hash == owner_hash(owner)
    connection.execute(update(erased_uses).where(used).values(taints=True))
    return connection.execute(update(tombstones).where(its).values(reason="forgotten")).rowcount
