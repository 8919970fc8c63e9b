"""How a conversation is read from its row."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Row, Select, func, select

from feedback_store.records import Conversation
from feedback_store.schema import conversations, turns


def conversation_rows() -> Select[Any]:
    """Every column of the conversations, and how many turns each has."""
    count = select(func.count()).where(turns.c.conversation_id == conversations.c.id).scalar_subquery()
    return select(conversations, count.label("turns"))


def conversation_of(row: Row[Any]) -> Conversation:
    return Conversation(row.id, row.owner, row.title, row.turns, row.created_at, row.updated_at)
