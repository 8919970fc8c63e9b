"""Conversations, turns and steps: written while an answer streams, so that a crash loses at most the step in flight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any, get_args

from sqlalchemy import Connection, insert, select, update

from feedback_store.codec import pack_ids, pack_logprobs, pack_step_ids, pack_step_mask
from feedback_store.conversation_rows import conversation_of, conversation_rows, step_of, turn_of
from feedback_store.database import Database
from feedback_store.errors import InvalidRecord, NotFound
from feedback_store.ids import new_id
from feedback_store.postgres import Lock, hold
from feedback_store.presence import lives
from feedback_store.processes import Process, this_process
from feedback_store.records import Conversation, FinalStatus, Message, StepLike, Turn
from feedback_store.schema import conversations, steps, turns
from feedback_store.search import add_answer_text, add_turn_text, conversations_with, put_title_text
from feedback_store.tool_results import as_stored, call_hash, put_result, steps_with_results
from feedback_store.versions import may_keep

_OPEN = ("running", "interrupted")  # an interrupted turn may go on: its process was only out of sight


def check_messages(messages: Sequence[Message]) -> list[Message]:
    """`messages` in OpenAI's shape: at least one, each with a role."""
    if not messages:
        raise InvalidRecord("The messages are empty; give at least the user's.")
    for position, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise InvalidRecord(f"Message {position} has no role: {message!r}. Give {{'role': …, 'content': …}}.")
    return list(messages)


def _last_user_message(messages: list[Message]) -> Message | None:
    return next((m for m in reversed(messages) if m["role"] == "user"), None)


def title_of(messages: list[Message]) -> str:
    """What a conversation without a title is called by a turn of it: the start of the user's last message."""
    said = _last_user_message(messages)
    return " ".join(said["content"].split())[:80] if said and isinstance(said.get("content"), str) else ""


def _status_of_open_turn(connection: Connection, turn_id: str) -> str:
    """Nobody else ends the turn, or adds to it, before the transaction is over."""
    status = connection.execute(select(turns.c.status).where(turns.c.id == turn_id).with_for_update()).scalar()
    if status is None:
        raise NotFound("turn", turn_id)
    if status not in _OPEN:
        raise InvalidRecord(f"Turn {turn_id} is finished ({status}); begin a new turn.")
    return str(status)


class Conversations(Database):
    def create_conversation(self, owner: str, title: str = "") -> str:
        """Without a title, the first user message becomes it."""
        conversation_id, now = new_id("conv"), self._now()
        with self._write() as connection:
            connection.execute(
                insert(conversations).values(
                    id=conversation_id, owner=owner, title=title, created_at=now, updated_at=now
                )
            )
            put_title_text(connection, conversation_id, title)
        return conversation_id

    def conversation(self, conversation_id: str) -> Conversation:
        with self._read() as connection:
            row = connection.execute(conversation_rows().where(conversations.c.id == conversation_id)).first()
        if row is None:
            raise NotFound("conversation", conversation_id)
        return conversation_of(row)

    def conversations(self, owner: str | None = None, limit: int = 50) -> list[Conversation]:
        """The most recently used first."""
        query = conversation_rows().order_by(conversations.c.updated_at.desc(), conversations.c.id.desc()).limit(limit)
        if owner is not None:
            query = query.where(conversations.c.owner == owner)
        with self._read() as connection:
            return [conversation_of(row) for row in connection.execute(query)]

    def conversations_page(
        self, owner: str, limit: int, after: str | None = None, search: str | None = None
    ) -> list[Conversation]:
        """An owner's, the newest first; those that began before the conversation `after`; those that `search` finds.

        Raises InvalidRecord for a search that is too long or has no word in it.
        """
        query = conversation_rows().where(conversations.c.owner == owner)
        if after is not None:
            query = query.where(conversations.c.id < after)
        with self._read() as connection:
            if search is not None:
                query = query.where(conversations.c.id.in_(conversations_with(connection, search)))
            rows = connection.execute(query.order_by(conversations.c.id.desc()).limit(limit))
            return [conversation_of(row) for row in rows]

    def rename_conversation(self, conversation_id: str, title: str) -> None:
        with self._write() as connection:
            done = connection.execute(
                update(conversations).where(conversations.c.id == conversation_id).values(title=title)
            )
            if not done.rowcount:
                raise NotFound("conversation", conversation_id)
            put_title_text(connection, conversation_id, title)

    def history(self, conversation_id: str) -> list[Message]:
        """The done turns as OpenAI messages: each user's message and the final answer to it, oldest first."""
        with self._read() as connection:
            if connection.execute(select(conversations.c.id).where(conversations.c.id == conversation_id)).first():
                rows = connection.execute(
                    select(turns.c.messages, turns.c.answer)
                    .where(turns.c.conversation_id == conversation_id, turns.c.status == "done")
                    .order_by(turns.c.id)
                ).all()
            else:
                raise NotFound("conversation", conversation_id)
        said: list[Message] = []
        for row in rows:
            asked = _last_user_message(row.messages)
            if asked is not None:
                said += [{"role": "user", "content": asked.get("content", "")}]
            said += [{"role": "assistant", "content": row.answer}]
        return said

    def begin_turn(
        self,
        conversation_id: str,
        messages: Sequence[Message],
        version: str,
        prompt_ids: Sequence[int],
        request_id: str = "",
        stays: bool = False,
        asked: Mapping[str, Any] | None = None,
    ) -> str:
        """A running turn. `messages` is the whole prompt, `prompt_ids` its tokens as the engine gets them. `asked`: see
        `Turn`.

        `stays`: the conversation's next turns are to keep this turn's version, if it serves (see `versions`).
        """
        prompt = check_messages(messages)
        packed = pack_ids(prompt_ids)
        turn_id, now, me = new_id("turn"), self._now(), this_process()
        with self._write() as connection:
            if stays:
                hold(connection, Lock.VERSIONS, shared=True)
            row = connection.execute(
                select(conversations.c.title, conversations.c.version)
                .where(conversations.c.id == conversation_id)
                .with_for_update()
            ).first()
            if row is None:
                raise NotFound("conversation", conversation_id)
            title, kept = row
            if stays:
                kept = version if may_keep(connection, version, kept) else None
            title = title or title_of(prompt)
            connection.execute(
                update(conversations)
                .where(conversations.c.id == conversation_id)
                .values(updated_at=now, title=title, version=kept)
            )
            connection.execute(
                insert(turns).values(
                    id=turn_id,
                    conversation_id=conversation_id,
                    request_id=request_id,
                    messages=prompt,
                    asked=dict(asked) if asked else None,
                    prompt_ids=packed,
                    version=version,
                    status="running",
                    answer="",
                    error="",
                    host=me.host,
                    pid=me.pid,
                    process_started=me.started,
                    created_at=now,
                )
            )
            add_turn_text(connection, conversation_id, turn_id, prompt)
        return turn_id

    def append_step(self, turn_id: str, step: StepLike) -> None:
        """Records one complete step of an open turn; on return it is on the disk."""
        lengths = len(step.token_ids), len(step.logprobs), len(step.mask)
        if len(set(lengths)) != 1:
            raise InvalidRecord(
                f"Step {step.index} of turn {turn_id}: token_ids, logprobs and mask must be parallel, "
                f"but have {lengths[0]}, {lengths[1]} and {lengths[2]} entries."
            )
        seen = None if step.observation is None else as_stored(step.observation)
        given: str = getattr(step, "tool_input", "") or step.input  # a step of one's own may know no difference
        values: dict[str, Any] = {
            "turn_id": turn_id,
            "position": step.index,
            "version": step.version,
            "drawn_by": [list(each) for each in getattr(step, "drawn_by", ())] or None,
            "token_ids": pack_step_ids(step.token_ids),
            "logprobs": pack_logprobs(step.logprobs),
            "mask": pack_step_mask(step.mask),
            "text": step.text,
            "thought": step.thought,
            "action": step.action,
            "input": step.input,
            "well_formed": step.well_formed,
            "seconds": step.seconds,
            "call_hash": None if seen is None else call_hash(seen.tool, given),
            "observation_seconds": None if seen is None else seen.seconds,
            "created_at": self._now(),
        }
        with self._write() as connection:
            _status_of_open_turn(connection, turn_id)
            same = select(steps.c.position).where(steps.c.turn_id == turn_id, steps.c.position == step.index)
            if connection.execute(same).first() is not None:
                raise InvalidRecord(f"Turn {turn_id} already has a step {step.index}.")
            values["result_hash"] = None if seen is None else put_result(connection, seen, values["created_at"])
            connection.execute(insert(steps).values(values))

    def finish_turn(self, turn_id: str, answer: str, status: FinalStatus, error: str = "") -> None:
        if status not in get_args(FinalStatus):
            raise InvalidRecord(f"A turn can't end as {status!r}; give one of {', '.join(get_args(FinalStatus))}.")
        now = self._now()
        with self._write() as connection:
            _status_of_open_turn(connection, turn_id)
            connection.execute(
                update(turns)
                .where(turns.c.id == turn_id)
                .values(status=status, answer=answer, error=error, finished_at=now)
            )
            add_answer_text(connection, turn_id, answer)
            its_conversation = select(turns.c.conversation_id).where(turns.c.id == turn_id).scalar_subquery()
            connection.execute(
                update(conversations).where(conversations.c.id == its_conversation).values(updated_at=now)
            )

    def turn(self, turn_id: str) -> Turn:
        """The turn with its steps decoded."""
        with self._read() as connection:
            row = connection.execute(select(turns).where(turns.c.id == turn_id)).first()
            if row is None:
                raise NotFound("turn", turn_id)
            its_steps = steps_with_results().where(steps.c.turn_id == turn_id).order_by(steps.c.position)
            return turn_of(row, [step_of(step) for step in connection.execute(its_steps)])

    def turns(self, conversation_id: str | None = None, limit: int = 50) -> list[Turn]:
        """Without their steps, the newest first."""
        query = select(turns).order_by(turns.c.id.desc()).limit(limit)
        if conversation_id is not None:
            query = query.where(turns.c.conversation_id == conversation_id)
        with self._read() as connection:
            return [turn_of(row, []) for row in connection.execute(query)]

    def turns_page(self, conversation_id: str, limit: int, after: str | None = None) -> list[Turn]:
        """A conversation's, without their steps, the oldest first; those after the turn `after`."""
        query = select(turns).where(turns.c.conversation_id == conversation_id)
        if after is not None:
            query = query.where(turns.c.id > after)
        with self._read() as connection:
            return [turn_of(row, []) for row in connection.execute(query.order_by(turns.c.id).limit(limit))]

    def recover(self, stale_seconds: float = 86_400) -> int:
        """Marks running turns whose process is gone as interrupted, steps kept; returns how many.

        Where that can't be told (another host or container wrote it, and never said that it lives), a turn older than
        `stale_seconds` counts as left.
        """
        now = self._now()
        oldest = now - timedelta(seconds=stale_seconds)
        left = 0
        with self._write() as connection:
            running = connection.execute(
                select(turns.c.id, turns.c.host, turns.c.pid, turns.c.process_started, turns.c.created_at)
                .where(turns.c.status == "running")
                .order_by(turns.c.id)
                .with_for_update(skip_locked=True)  # one that is written to lives
            ).all()
            for row in running:
                alive = lives(connection, Process(row.host, row.pid, row.process_started), now)
                if alive or (alive is None and row.created_at > oldest):
                    continue
                connection.execute(
                    update(turns)
                    .where(turns.c.id == row.id)
                    .values(status="interrupted", finished_at=now, error="the process that wrote this turn ended")
                )
                left += 1
        return left
