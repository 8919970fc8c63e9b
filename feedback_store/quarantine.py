"""Quarantine: an owner whose golds don't count, by the guard's doing or a person's. Reversible: nothing is deleted."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Row, delete, or_, select, update

from feedback_store.audit import note
from feedback_store.errors import InvalidRecord, NotFound
from feedback_store.gold import Judging
from feedback_store.ids import owner_hash
from feedback_store.postgres import hold_owner
from feedback_store.records import Quarantine
from feedback_store.schema import erased_votes, quarantines
from feedback_store.settling import decide, put_in_quarantine, questions_of


def _quarantine(row: Row[Any]) -> Quarantine:
    return Quarantine(row.owner or row.owner_hash, row.active, row.who, row.reason, row.at)


class Quarantines(Judging):
    def quarantines(self) -> list[Quarantine]:
        """Owners in quarantine, then those who were let go; the newest first."""
        look = select(quarantines).order_by(quarantines.c.active.desc(), quarantines.c.at.desc(), quarantines.c.owner)
        with self._read() as connection:
            return [_quarantine(row) for row in connection.execute(look)]

    def quarantine(self, owner: str, who: str, reason: str) -> Quarantine:
        """From now on the owner's golds count for nothing; tasks that rest on them alone wait for review.

        What a run holds stays with it. Raises InvalidRecord for a trusted owner.
        """
        if owner in self.policy.trusted_owners:
            raise InvalidRecord(f"{owner} is one of trusted_owners: take it out of that setting first.")
        with self._write() as connection:
            put_in_quarantine(connection, owner, who, reason, self._now())
            decide(connection, questions_of(connection, owner), self.policy, self._now())
            its = quarantines.c.owner_hash == owner_hash(owner)
            return _quarantine(connection.execute(select(quarantines).where(its)).one())

    def lift_quarantine(self, owner: str, who: str, reason: str = "") -> Quarantine:
        """The owner's golds count again, as they did; only those given from now on can bring them back in. Of owners
        who are forgotten the hash is all that is left, and does as well."""
        now = self._now()
        with self._write() as connection:
            known = or_(quarantines.c.owner_hash == owner_hash(owner), quarantines.c.owner_hash == owner)
            row = connection.execute(select(quarantines).where(known, quarantines.c.active)).first()
            if row is None:
                raise NotFound("owner in quarantine", owner)
            name, its = row.owner or owner, quarantines.c.owner_hash == row.owner_hash
            hold_owner(connection, name)
            changed = {"active": False, "who": who, "reason": reason, "at": now}
            connection.execute(update(quarantines).where(its).values(changed))
            connection.execute(delete(erased_votes).where(erased_votes.c.owner_hash == row.owner_hash))
            note(connection, now, who, "quarantine.lift", name, {"reason": reason})
            decide(connection, questions_of(connection, name), self.policy, now)
            return _quarantine(connection.execute(select(quarantines).where(its)).one())
