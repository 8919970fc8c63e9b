"""How conversations, turns and steps are read from their rows."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Row, Select, func, select

from feedback_store.codec import unpack_ids, unpack_logprobs, unpack_step_ids, unpack_step_mask
from feedback_store.records import Conversation, StoredStep, Turn
from feedback_store.schema import conversations, turns
from feedback_store.tool_results import stored_observation


def conversation_rows() -> Select[Any]:
    """Every column of the conversations, and how many turns each has."""
    count = select(func.count()).where(turns.c.conversation_id == conversations.c.id).scalar_subquery()
    return select(conversations, count.label("turns"))


def conversation_of(row: Row[Any]) -> Conversation:
    return Conversation(row.id, row.owner, row.title, row.turns, row.created_at, row.updated_at)


def step_of(row: Row[Any]) -> StoredStep:
    """Of a row of `steps_with_results`."""
    logprobs = unpack_logprobs(row.logprobs)
    return StoredStep(
        index=row.position,
        token_ids=unpack_step_ids(row.token_ids, len(logprobs)),
        logprobs=logprobs,
        mask=unpack_step_mask(row.mask, len(logprobs)),
        version=row.version,
        text=row.text,
        thought=row.thought,
        action=row.action,
        input=row.input,
        observation=stored_observation(row),
        well_formed=row.well_formed,
        seconds=row.seconds,
        drawn_by=tuple((version, tokens) for version, tokens in row.drawn_by or ()),
    )


def turn_of(row: Row[Any], its_steps: list[StoredStep]) -> Turn:
    return Turn(
        id=row.id,
        conversation_id=row.conversation_id,
        request_id=row.request_id,
        messages=row.messages,
        prompt_ids=unpack_ids(row.prompt_ids),
        version=row.version,
        status=row.status,
        answer=row.answer,
        error=row.error,
        created_at=row.created_at,
        finished_at=row.finished_at,
        steps=its_steps,
        asked=row.asked or {},
    )
