"""Lineage both ways: from an answer to what it was learnt from, and from a conversation to what has learnt from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal

from sqlalchemy import ColumnElement, Connection, Row, Select, Table, select

from feedback_store.database import Database
from feedback_store.errors import NotFound
from feedback_store.ids import owner_hash
from feedback_store.schema import (
    conversations,
    erased_turns,
    erased_uses,
    run_tasks,
    runs,
    steps,
    task_origins,
    tasks,
    tombstones,
    turns,
    versions,
)
from feedback_store.taints import Taint, tainted_versions
from feedback_store.uses import set_aside, trained_on

_DEEPEST = 100  # generations of versions: who walks or prints the tree does so by recursion
Kind = Literal["owner", "conversation", "turn", "task", "run", "version"]


@dataclass
class Trace:
    """A thing, what it came from, and what came of it. `note` tells its state. `more`: how many weren't listed."""

    kind: Kind
    id: str
    note: str = ""
    came_from: list[Trace] = field(default_factory=list)
    led_to: list[Trace] = field(default_factory=list)
    more: int = 0


class LineageTree(Database):
    def trace(self, id: str, limit: int = 20) -> Trace:
        """The tree around a conversation, turn, task, run, version or owner; of a list's items, and of a line of
        versions, the first `limit`; of a line never more than a hundred.

        Up: answer, version, run, tasks, conversations; versions also their parents. Down: conversation, tasks, runs,
        versions and their descendants. What was erased is there by id and time. Raises NotFound.
        """
        with self._read() as connection:
            return _Tracer(connection, limit).trace(id)


class _Tracer:
    def __init__(self, connection: Connection, limit: int) -> None:
        self._connection = connection
        self._limit = limit
        self._deepest = min(limit, _DEEPEST)
        self._tainted: dict[str, Taint] = tainted_versions(connection)

    def trace(self, id: str) -> Trace:
        makers: list[tuple[Table, str, Callable[[Row[Any]], Trace]]] = [
            (conversations, "id", self._conversation),
            (turns, "id", self._turn),
            (tasks, "id", self._task),
            (runs, "id", self._run),
            (versions, "id", self._version),
            (tombstones, "conversation_id", self._tombstone),
            (erased_turns, "turn_id", self._erased_turn),
        ]
        for table, key, make in makers:
            row = self._connection.execute(select(table).where(table.c[key] == id)).first()
            if row is not None:
                return make(row)
        return self._owner(id)

    # -- each kind, both ways

    def _owner(self, owner: str) -> Trace:
        found = self._ids(select(conversations.c.id).where(conversations.c.owner == owner))
        asked = self._ids(select(task_origins.c.task_id).where(task_origins.c.owner == owner).distinct())
        its = tombstones.c.owner_hash == owner_hash(owner)
        gone = self._connection.execute(select(tombstones).where(its).order_by(tombstones.c.conversation_id)).all()
        if not (found or asked or gone):
            raise NotFound("conversation, turn, task, run, version or owner", owner)
        top = Trace("owner", owner, f"{len(found)} conversations, {len(gone)} erased")
        self._fill(top, "led_to", sorted(asked), self._task_down)
        self._fill(top, "led_to", gone, self._tombstone)
        return top

    def _conversation(self, row: Row[Any]) -> Trace:
        top = Trace("conversation", row.id, f"of {row.owner}, {row.created_at:%Y-%m-%d %H:%M}")
        wrote = self._ids(select(turns.c.version).where(turns.c.conversation_id == row.id).order_by(turns.c.id))
        self._fill(top, "came_from", list(dict.fromkeys(wrote)), self._version_up)
        self._fill(top, "led_to", self._asked_for(turns.c.conversation_id == row.id), self._task_down)
        return top

    def _tombstone(self, row: Row[Any]) -> Trace:
        top = _gone(row)
        wrote = select(erased_turns.c.version).where(erased_turns.c.conversation_id == row.conversation_id).distinct()
        self._fill(top, "came_from", sorted(self._ids(wrote)), self._version_up)
        used = select(erased_uses.c.run_id).where(erased_uses.c.conversation_id == row.conversation_id).distinct()
        self._fill(top, "led_to", sorted(self._ids(used)), self._run_down)
        return top

    def _turn(self, row: Row[Any]) -> Trace:
        top = Trace("turn", row.id, f"of {row.conversation_id}, {row.status}")
        its = self._ids(select(steps.c.version).where(steps.c.turn_id == row.id).order_by(steps.c.position))
        self._fill(top, "came_from", list(dict.fromkeys([row.version, *its])), self._version_up)
        self._fill(top, "led_to", self._asked_for(turns.c.id == row.id), self._task_down)
        return top

    def _erased_turn(self, row: Row[Any]) -> Trace:
        top = Trace("turn", row.turn_id, f"of {row.conversation_id}, erased {row.erased_at:%Y-%m-%d %H:%M}")
        self._fill(top, "came_from", [row.version], self._version_up)
        return top

    def _task(self, row: Row[Any]) -> Trace:
        top = self._task_down(row.id)
        top.came_from = self._task_up(row.id).came_from
        return top

    def _run(self, row: Row[Any]) -> Trace:
        top = self._run_up(row.id)
        top.led_to = self._run_down(row.id).led_to
        return top

    def _version(self, row: Row[Any]) -> Trace:
        top = self._version_up(row.id)
        top.led_to = self._version_down(row.id).led_to
        return top

    # -- up: what something came from

    def _version_up(self, version: str) -> Trace:
        """With its ancestors, each below its child; of a long line the nearest."""
        top = one = Trace("version", version)
        depth = 0
        while (parent := self._tell_origin(one)) and depth < self._deepest:
            one.came_from.append(Trace("version", parent))
            one, depth = one.came_from[-1], depth + 1
        one.more += bool(parent)
        return top

    def _tell_origin(self, version: Trace) -> str | None:
        """Notes a version's state and its run; returns its parent."""
        row = self._row(versions, version.id)
        version.note = self._version_note(version.id, row)
        if row is not None and row.run_id:
            version.came_from.append(self._run_up(row.run_id))
        return None if row is None else row.parent

    def _run_up(self, run_id: str) -> Trace:
        top = Trace("run", run_id, self._run_note(run_id))
        self._fill(top, "came_from", trained_on(self._connection, run_id), self._task_up)
        return top

    def _task_up(self, task_id: str) -> Trace:
        top = Trace("task", task_id, self._task_note(task_id))
        asked = (
            select(turns.c.conversation_id)
            .join(task_origins, task_origins.c.turn_id == turns.c.id)
            .where(task_origins.c.task_id == task_id)
            .distinct()
        )
        self._fill(top, "came_from", sorted(self._ids(asked)), lambda id: Trace("conversation", id))
        uses = select(erased_uses.c.conversation_id).where(erased_uses.c.task_id == task_id)
        gone = select(tombstones).where(tombstones.c.conversation_id.in_(uses))
        self._fill(top, "came_from", self._connection.execute(gone).all(), _gone)
        return top

    # -- down: what came of something

    def _task_down(self, task_id: str) -> Trace:
        top = Trace("task", task_id, self._task_note(task_id))
        used = sorted(self._ids(select(run_tasks.c.run_id).where(run_tasks.c.task_id == task_id).distinct()))
        trained = [run for run in used if task_id not in set_aside(self._connection, run)]
        self._fill(top, "led_to", trained, self._run_down)
        return top

    def _run_down(self, run_id: str) -> Trace:
        top = Trace("run", run_id, self._run_note(run_id))
        made = select(versions.c.id).where(versions.c.run_id == run_id).order_by(versions.c.created_at)
        self._fill(top, "led_to", self._ids(made), self._version_down)
        return top

    def _version_down(self, version: str) -> Trace:
        """With its descendants; of a long line the nearest."""
        top = Trace("version", version)
        generation = [top]
        for depth in range(self._deepest + 1):
            following: list[Trace] = []
            for one in generation:
                one.note = self._version_note(one.id, self._row(versions, one.id))
                query = select(versions.c.id).where(versions.c.parent == one.id).order_by(versions.c.created_at)
                children = self._ids(query)
                if depth == self._deepest:
                    one.more += len(children)
                else:
                    self._fill(one, "led_to", children, lambda id: Trace("version", id))
                    following += one.led_to
            generation = following
        return top

    # -- parts

    def _row(self, table: Table, id: str) -> Row[Any] | None:
        return self._connection.execute(select(table).where(table.c.id == id)).first()

    def _ids(self, query: Select[Any]) -> list[str]:
        return list(self._connection.execute(query).scalars())

    def _asked_for(self, of: ColumnElement[bool]) -> list[str]:
        query = select(task_origins.c.task_id).join(turns, turns.c.id == task_origins.c.turn_id).where(of)
        return sorted(set(self._ids(query)))

    def _fill(
        self, top: Trace, way: Literal["came_from", "led_to"], items: Sequence[Any], make: Callable[[Any], Trace]
    ) -> None:
        getattr(top, way).extend(make(item) for item in islice(items, self._limit))
        top.more += max(0, len(items) - self._limit)

    def _run_note(self, run_id: str) -> str:
        row = self._row(runs, run_id)
        return "not registered" if row is None else str(row.status)

    def _task_note(self, task_id: str) -> str:
        row = self._row(tasks, task_id)
        return "deleted" if row is None else f"{row.kind}, {row.state}"

    def _version_note(self, version: str, row: Row[Any] | None) -> str:
        if row is None:
            return "not registered"
        taint = self._tainted.get(version)
        return str(row.status) + (f", tainted since {taint.since:%Y-%m-%d}" if taint else "")


def _gone(tombstone: Row[Any]) -> Trace:
    return Trace("conversation", tombstone.conversation_id, f"{tombstone.reason} {tombstone.erased_at:%Y-%m-%d %H:%M}")
