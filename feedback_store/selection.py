"""Which turns and conversations are asked for, and reading them in pages of constant memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from sqlalchemy import ColumnElement, Connection, Join, Row, and_, case, exists, func, or_, select

from feedback_store.consent import Consents
from feedback_store.conversation_rows import conversation_of, conversation_rows, step_of, turn_of
from feedback_store.errors import InvalidRecord
from feedback_store.outcomes import outcome_of
from feedback_store.queue import task_of
from feedback_store.records import RIGHT, Conversation, Outcome, QueuedTask, StoredStep, Turn
from feedback_store.schema import conversations, outcomes, search_texts, steps, task_origins, tasks, tool_results, turns
from feedback_store.search import conversations_with, matching
from feedback_store.tool_results import steps_with_results

Judged = Literal["right", "wrong", "none"]


@dataclass(frozen=True)
class Selection:
    """What turns must have in common; None asks for nothing.

    `outcome`: `right`, where some verdict scores above 0.9; `wrong`, where there are verdicts and none does; `none`,
    without a score. `tool`: one that was used. `since` and `until`: when the turn began. `consenting`: only of owners
    who let their conversations train the policy. `search`: words that it has, or its conversation's title (see
    `search`).
    """

    owner: str | None = None
    outcome: Judged | None = None
    version: str | None = None
    tool: str | None = None
    since: datetime | None = None
    until: datetime | None = None
    consenting: bool = False
    search: str | None = None


@dataclass(frozen=True)
class Answered:
    """A finished turn, whose it is, and its verdicts, the oldest first."""

    turn: Turn
    owner: str
    outcomes: list[Outcome]


@dataclass(frozen=True)
class Practised:
    """A task that selected turns asked for, and their answers that its verifier scored right and wrong. `held`: why its
    gold isn't to be trained on, "" where it is: review, rejected, expired."""

    task: QueuedTask
    right: list[str]
    wrong: list[str]
    held: str


class Reading(Consents):
    def find_conversations(self, selection: Selection, limit: int | None = 50) -> list[Conversation]:
        """Those with a turn that is selected, the most recently used first."""
        query = conversation_rows().order_by(conversations.c.updated_at.desc(), conversations.c.id.desc()).limit(limit)
        with self._read() as connection:
            if selection == Selection(owner=selection.owner, search=selection.search):  # those without a turn, too
                if selection.owner is not None:
                    query = query.where(conversations.c.owner == selection.owner)
                if selection.search is not None:
                    query = query.where(conversations.c.id.in_(conversations_with(connection, selection.search)))
            else:
                its = select(turns.c.conversation_id).select_from(_joined()).where(*self._those(connection, selection))
                query = query.where(conversations.c.id.in_(its))
            return [conversation_of(row) for row in connection.execute(query)]

    def count_turns(self, selection: Selection) -> int:
        """Of those that are finished."""
        with self._read() as connection:
            query = select(func.count()).select_from(_joined()).where(*self._finished(connection, selection))
            return int(connection.execute(query).scalar_one())

    def answered(self, selection: Selection, steps: bool = False, page: int = 200) -> Iterator[list[Answered]]:
        """The selected turns that are finished, by conversation and in order, some at a time; with `steps`, theirs.

        No transaction stays open between pages: what is added meanwhile to conversations further on is included.
        """
        after: tuple[str, str] | None = None
        while True:
            with self._read() as connection:
                query = (
                    select(turns, conversations.c.owner)
                    .select_from(_joined())
                    .where(*self._finished(connection, selection))
                    .order_by(turns.c.conversation_id, turns.c.id)
                    .limit(page)
                )
                if after is not None:
                    beyond = and_(turns.c.conversation_id == after[0], turns.c.id > after[1])
                    query = query.where(or_(turns.c.conversation_id > after[0], beyond))
                rows = connection.execute(query).all()
                if not rows:
                    return
                found = _with_parts(connection, rows, steps)
            after = rows[-1].conversation_id, rows[-1].id
            yield found

    def practised(self, selection: Selection, page: int = 200) -> Iterator[list[Practised]]:
        """The tasks that selected turns asked for, oldest first, some at a time; none that was withdrawn."""
        after = ""
        origins = task_origins.join(turns, turns.c.id == task_origins.c.turn_id).join(conversations)
        while True:
            with self._read() as connection:
                finished = self._finished(connection, selection)
                # Asked of each task in turn, so that a page costs what it holds and not what the record does.
                asked = exists().select_from(origins).where(task_origins.c.task_id == tasks.c.id, *finished)
                held = case((tasks.c.expires_at <= self._now(), "expired"), else_=tasks.c.hold).label("held")
                query = (
                    select(tasks, tasks.c.state.label("state_now"), held)
                    .where(tasks.c.id > after, tasks.c.state != "withdrawn", asked)
                    .order_by(tasks.c.id)
                    .limit(page)
                )
                rows = connection.execute(query).all()
                if not rows:
                    return
                judged = (
                    select(outcomes.c.task_id, turns.c.answer, outcomes.c.score)
                    .select_from(_joined().join(outcomes, outcomes.c.turn_id == turns.c.id))
                    .where(outcomes.c.task_id.in_([row.id for row in rows]), outcomes.c.score.is_not(None))
                    .where(turns.c.status == "done", *self._finished(connection, selection))
                    .order_by(outcomes.c.id)
                )
                answers: dict[str, tuple[list[str], list[str]]] = {row.id: ([], []) for row in rows}
                for task_id, answer, score in connection.execute(judged):
                    answers[task_id][0 if score > RIGHT else 1].append(answer)
            after = rows[-1].id
            yield [Practised(task_of(row), *answers[row.id], row.held) for row in rows]

    def _finished(self, connection: Connection, selection: Selection) -> list[ColumnElement[bool]]:
        return [turns.c.status.in_(("done", "no_answer", "length")), *self._those(connection, selection)]

    def _those(self, connection: Connection, selection: Selection) -> list[ColumnElement[bool]]:
        found: list[ColumnElement[bool]] = []
        if selection.owner is not None:
            found.append(conversations.c.owner == selection.owner)
        if selection.version is not None:
            found.append(turns.c.version == selection.version)
        if selection.since is not None:
            found.append(turns.c.created_at >= selection.since)
        if selection.until is not None:
            found.append(turns.c.created_at < selection.until)
        if selection.consenting:
            found.append(self._may_train(conversations.c.owner))
        if selection.search is not None:
            matches, c = matching(connection, selection.search), search_texts.c
            titled = select(c.conversation_id).where(matches, c.turn_id.is_(None))
            in_turn = turns.c.id.in_(select(c.turn_id).where(matches))
            found.append(or_(in_turn, turns.c.conversation_id.in_(titled)))
        if selection.tool is not None:
            used = steps.join(tool_results, tool_results.c.hash == steps.c.result_hash)
            its = steps.c.turn_id == turns.c.id, tool_results.c.tool == selection.tool
            found.append(exists().select_from(used).where(*its))
        if selection.outcome is not None:
            found.append(_judged(selection.outcome))
        return found


def _joined() -> Join:
    return turns.join(conversations, conversations.c.id == turns.c.conversation_id)


def _with_parts(connection: Connection, rows: Sequence[Row[Any]], with_steps: bool) -> list[Answered]:
    ids = [row.id for row in rows]
    its_steps: dict[str, list[StoredStep]] = {}
    if with_steps:
        query = steps_with_results().where(steps.c.turn_id.in_(ids)).order_by(steps.c.turn_id, steps.c.position)
        for step in connection.execute(query):
            its_steps.setdefault(step.turn_id, []).append(step_of(step))
    verdicts: dict[str, list[Outcome]] = {}
    for verdict in connection.execute(select(outcomes).where(outcomes.c.turn_id.in_(ids)).order_by(outcomes.c.id)):
        verdicts.setdefault(verdict.turn_id, []).append(outcome_of(verdict))
    return [Answered(turn_of(row, its_steps.get(row.id, [])), row.owner, verdicts.get(row.id, [])) for row in rows]


def _judged(outcome: str) -> ColumnElement[bool]:
    its = outcomes.c.turn_id == turns.c.id
    right, scored = exists().where(its, outcomes.c.score > RIGHT), exists().where(its, outcomes.c.score.is_not(None))
    by_name = {"right": right, "wrong": and_(scored, ~right), "none": ~scored}
    if outcome not in by_name:
        raise InvalidRecord(f"The outcome {outcome!r} is none of {', '.join(by_name)}.")
    return by_name[outcome]
