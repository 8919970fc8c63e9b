"""Quarantine: an owner whose golds don't count, by the guard's doing or a person's. Reversible: nothing is deleted."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Row, select, update

from feedback_store.audit import note
from feedback_store.errors import InvalidRecord, NotFound
from feedback_store.gold import Judging
from feedback_store.records import Quarantine
from feedback_store.schema import quarantines
from feedback_store.settling import decide, put_in_quarantine, questions_of


def _quarantine(row: Row[Any]) -> Quarantine:
    return Quarantine(row.owner, row.active, row.who, row.reason, row.at)


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
            its = quarantines.c.owner == owner
            return _quarantine(connection.execute(select(quarantines).where(its)).one())

    def lift_quarantine(self, owner: str, who: str, reason: str = "") -> Quarantine:
        """The owner's golds count again, as they did; only those given from now on can bring them back in."""
        now = self._now()
        with self._write() as connection:
            its = quarantines.c.owner == owner
            changed = update(quarantines).where(its, quarantines.c.active)
            if not connection.execute(changed.values(active=False, who=who, reason=reason, at=now)).rowcount:
                raise NotFound("owner in quarantine", owner)
            note(connection, now, who, "quarantine.lift", owner, {"reason": reason})
            decide(connection, questions_of(connection, owner), self.policy, now)
            return _quarantine(connection.execute(select(quarantines).where(its)).one())
