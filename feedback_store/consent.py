"""Consent: whether what an owner says may train the policy, or is kept for the service alone."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import ColumnElement, Connection, and_, exists, false, func, or_, select, true
from sqlalchemy.dialects import postgresql, sqlite

from feedback_store.errors import InvalidRecord
from feedback_store.gold import Judging
from feedback_store.schema import consents, conversations, task_origins, tasks, turns
from feedback_store.settling import decide
from feedback_store.withdrawal import withdraw

NO_CONSENT = "its owner wants the conversation kept for the service only."


@dataclass(frozen=True)
class Consent:
    """`training`: whether an owner's conversations may train the policy. `at`: when they said so; None where they
    didn't, and the setting decides."""

    owner: str
    training: bool
    at: datetime | None


@dataclass(frozen=True)
class Withdrawn:
    """Tasks that left the queue: deleted, or emptied where a run had used them. `held`: a run works on them now."""

    deleted: int
    emptied: int
    held: int


class Consents(Judging):
    training_by_default = True
    """For owners who said nothing."""

    def consent(self, owner: str) -> Consent:
        with self._read() as connection:
            row = connection.execute(select(consents).where(consents.c.owner == owner)).first()
        if row is None:
            return Consent(owner, self.training_by_default, None)
        return Consent(owner, row.training, row.at)

    def consents(self) -> list[Consent]:
        """Of the owners who said something, by name."""
        with self._read() as connection:
            rows = connection.execute(select(consents).order_by(consents.c.owner))
            return [Consent(row.owner, row.training, row.at) for row in rows]

    def set_consent(self, owner: str, training: bool) -> Withdrawn:
        """Records what an owner said. Without consent no tasks are made of their conversations, and those that wait
        leave the queue, unless others asked for them too. What a run holds at the moment goes before the next one."""
        if not owner:
            raise InvalidRecord("Consent is an owner's: give their name.")
        with self._write() as connection:
            make = postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert
            said = {"training": training, "at": self._now()}
            statement = make(consents).values(owner=owner, **said)
            connection.execute(statement.on_conflict_do_update(index_elements=["owner"], set_=said))
            return Withdrawn(0, 0, 0) if training else self._withdraw(connection)

    def withdraw_without_consent(self) -> Withdrawn:
        """Takes back the waiting tasks that only owners without consent asked for: the setting may have changed, or a
        run given them back. To be called before a run claims."""
        with self._write() as connection:
            return self._withdraw(connection)

    def _withdraw(self, connection: Connection) -> Withdrawn:
        now = self._now()
        o = task_origins.c
        its = o.task_id == tasks.c.id
        by_consenting = or_(o.owner == "", self._may_train(o.owner))
        unwanted = and_(exists().where(its), ~exists().where(its, by_consenting))
        waits = or_(tasks.c.state.in_(("pending", "dead")), tasks.c.lease_until <= now)
        rows = connection.execute(
            select(tasks.c.id, waits.label("waits")).where(tasks.c.state != "withdrawn", unwanted)
        )
        waiting = [row.id for row in rows if row.waits]
        held_query = select(func.count()).select_from(tasks).where(tasks.c.state == "claimed", ~waits, unwanted)
        held = connection.execute(held_query).scalar_one()
        deleted, emptied, asked = withdraw(connection, waiting, now)
        decide(connection, asked, self.policy, now)  # their votes are gone
        return Withdrawn(deleted, emptied, held)

    def _may_train(self, owner: ColumnElement[str]) -> ColumnElement[bool]:
        """Whether the owner in a column consents: what they said, or the default."""
        said = select(consents.c.training).where(consents.c.owner == owner).correlate_except(consents).scalar_subquery()
        return func.coalesce(said, true() if self.training_by_default else false())

    def _consents_to_task(self, connection: Connection, turn_id: str) -> bool:
        its = turns.join(conversations, conversations.c.id == turns.c.conversation_id)
        owner = select(self._may_train(conversations.c.owner)).select_from(its).where(turns.c.id == turn_id)
        return bool(connection.execute(owner).scalar())
