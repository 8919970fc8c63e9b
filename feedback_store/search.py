"""Full-text search over conversations: FTS5 on SQLite, a text-search index on PostgreSQL.

`search_texts` holds what was asked and answered, one row a turn, and the titles that people gave; it is written in the
transaction that writes the turn. A query is a list of words, all of which a turn must have; no word is an operator.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import Any

from sqlalchemy import ColumnElement, Connection, Select, delete, func, insert, literal_column, select, text, update

from feedback_store.codec import clean
from feedback_store.database import Database
from feedback_store.errors import InvalidRecord
from feedback_store.records import Message
from feedback_store.schema import search_texts
from feedback_store.withdrawal import chunks

LONGEST_QUERY = 1000  # characters
_WORD = re.compile(r"\w+")
_MARKS = re.compile("[\u0300-\u036f]")  # accents, once they stand behind their letter
# Signs that stand in no word, for Python's \w. To PostgreSQL they may join words: "3.14", "a/b", "user@mail.org".
_SIGNS = "[!-/:-@[-^`{-~\u00a0-\u00bf\u00d7\u00f7\u2000-\u206f\u2190-\u23ff\u3000-\u3003\u3008-\u301f]+"


def vector_of(column: str) -> str:
    """SQL of what PostgreSQL indexes of a column: its words without accents and the signs between, as FTS5 does."""
    plain = f"regexp_replace(normalize({column}, NFKD), '[\u0300-\u036f]', '', 'g')"
    return f"to_tsvector('simple', regexp_replace({plain}, '{_SIGNS}', ' ', 'g'))"


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
    return literal_column(vector_of("search_texts.text")).bool_op("@@")(wanted)


def conversations_with(connection: Connection, query: str) -> Select[Any]:
    """The ids of conversations that match."""
    return select(search_texts.c.conversation_id).where(matching(connection, query))


class Search(Database):
    def excerpts(self, query: str, conversation_ids: Sequence[str]) -> dict[str, str]:
        """By conversation, the words around the newest match: of its turns and its title. Without one it is left out.

        Raises InvalidRecord for a query that is too long or has no word in it.
        """
        c, found = search_texts.c, {}
        with self._read() as connection:
            matches = matching(connection, query)
            for some in chunks(conversation_ids):
                newest = select(func.max(c.id)).where(c.conversation_id.in_(some), matches).group_by(c.conversation_id)
                for id, text in connection.execute(select(c.conversation_id, c.text).where(c.id.in_(newest))):
                    found[id] = excerpt(text, query)
        return found


def excerpt(found: str, query: str, around: int = 60) -> str:
    """One line of `found` around the first word of the query that stands in it as it is written."""
    flat = " ".join(found.split())
    places = [at for word in _WORD.findall(query) if (at := flat.lower().find(word.lower())) >= 0]
    at = min(places, default=0)
    start, end = max(0, at - around), min(len(flat), at + around)
    return ("…" if start else "") + flat[start:end] + ("…" if end < len(flat) else "")
