"""Full-text search over conversations: FTS5 on SQLite, a text-search index on PostgreSQL.

`search_texts` holds what was asked and answered, one row a turn, and the titles that people gave; it is written in the
transaction that writes the turn. A query is a list of words, all of which a turn must have; no word is an operator.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Connection, Select, delete, insert, literal_column, select, text, update

from feedback_store.codec import clean
from feedback_store.conversation_rows import conversation_of, conversation_rows
from feedback_store.database import Database
from feedback_store.errors import InvalidRecord
from feedback_store.records import Conversation, Message
from feedback_store.schema import conversations, search_texts

LONGEST_QUERY = 1000  # characters
_WORD = re.compile(r"\w+")
_MARKS = re.compile("[\u0300-\u036f]")  # accents, once they stand behind their letter
# As the migration indexes it: without accents, as FTS5 does, and without marks that would join words: 3.14, a@b.org.
_BARE = "regexp_replace(normalize(search_texts.text, NFKD), '[\u0300-\u036f]', '', 'g')"
_VECTOR = rf"to_tsvector('simple', regexp_replace({_BARE}, '[\x21-\x2f\x3a-\x40\x5b-\x60\x7b-\x7e]+', ' ', 'g'))"


@dataclass(frozen=True)
class Found:
    """A conversation, the newest turn of it that matches (None: its title does), and the words around the match."""

    conversation: Conversation
    turn_id: str | None
    excerpt: str


def turn_text(messages: Sequence[Message], answer: str) -> str:
    """What a search finds a turn by: the last thing that the user said, and the answer."""
    asked = next((m.get("content") for m in reversed(messages) if m.get("role") == "user"), "")
    said = asked if isinstance(asked, str) else ""
    return f"{said}\n{answer}" if answer else said


def add_turn_text(connection: Connection, conversation_id: str, turn_id: str, messages: Sequence[Message]) -> None:
    connection.execute(
        insert(search_texts).values(conversation_id=conversation_id, turn_id=turn_id, text=turn_text(messages, ""))
    )


def add_answer_text(connection: Connection, turn_id: str, answer: str) -> None:
    if answer:
        longer = search_texts.c.text.concat("\n" + clean(answer))
        connection.execute(update(search_texts).where(search_texts.c.turn_id == turn_id).values(text=longer))


def put_title_text(connection: Connection, conversation_id: str, title: str) -> None:
    own = (search_texts.c.conversation_id == conversation_id) & search_texts.c.turn_id.is_(None)
    connection.execute(delete(search_texts).where(own))
    if title:
        connection.execute(insert(search_texts).values(conversation_id=conversation_id, turn_id=None, text=title))


def matching(connection: Connection, query: str) -> ColumnElement[bool]:
    """Of rows of `search_texts`: those that have every word of the query. Raises InvalidRecord for one of no words."""
    if len(query) > LONGEST_QUERY:
        raise InvalidRecord(f"The search has {len(query)} characters and may have {LONGEST_QUERY}: give a few words.")
    words = _WORD.findall(clean(query))
    if not words:
        raise InvalidRecord("The search has no word in it: give at least one.")
    if connection.dialect.name == "sqlite":
        # Each word in quotes is a plain string to FTS5, whatever it means outside of them.
        index = text("SELECT rowid FROM search_index WHERE search_index MATCH :words")
        return search_texts.c.id.in_(index.bindparams(words=" ".join(f'"{word}"' for word in words)))  # type: ignore[arg-type]
    plain = _MARKS.sub("", unicodedata.normalize("NFKD", " ".join(words)))
    wanted = text("plainto_tsquery('simple', :words)").bindparams(words=plain)
    return literal_column(_VECTOR).bool_op("@@")(wanted)


def conversations_with(connection: Connection, query: str) -> Select[Any]:
    """The ids of conversations that match."""
    return select(search_texts.c.conversation_id).where(matching(connection, query))


class Search(Database):
    def search_conversations(self, query: str, owner: str | None = None, limit: int = 20) -> list[Found]:
        """Conversations of which a turn, or the title, has all of the words; the most recently used first.

        Raises InvalidRecord for a query that is too long or has no word in it.
        """
        with self._read() as connection:
            rows = conversation_rows().where(conversations.c.id.in_(conversations_with(connection, query)))
            if owner is not None:
                rows = rows.where(conversations.c.owner == owner)
            rows = rows.order_by(conversations.c.updated_at.desc(), conversations.c.id.desc()).limit(limit)
            found = []
            for row in connection.execute(rows).all():
                c = search_texts.c
                hit = connection.execute(
                    select(c.turn_id, c.text)
                    .where(c.conversation_id == row.id, matching(connection, query))
                    .order_by(c.id.desc())
                    .limit(1)
                ).first()
                if hit is not None:
                    found.append(Found(conversation_of(row), hit.turn_id, excerpt(hit.text, query)))
        return found


def excerpt(found: str, query: str, around: int = 60) -> str:
    """One line of `found` around the first word of the query that stands in it as it is written."""
    flat = " ".join(found.split())
    places = [at for word in _WORD.findall(query) if (at := flat.lower().find(word.lower())) >= 0]
    at = min(places, default=0)
    start, end = max(0, at - around), min(len(flat), at + around)
    return ("…" if start else "") + flat[start:end] + ("…" if end < len(flat) else "")
