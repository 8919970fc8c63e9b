"""A full-text index in one SQLite file: FTS5 with BM25, and a document whose title is asked for comes first."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import re
import sqlite3
import unicodedata
import uuid
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path

from tools.search.backend import BackendUnavailable, SearchHit
from tools.search.corpus import Document

FORMAT = 1  # part of an index's key: raise it when the schema changes
_SCHEMA = """
CREATE VIRTUAL TABLE documents USING fts5(
    title, body, id UNINDEXED, source UNINDEXED, tokenize = "porter unicode61 remove_diacritics 2"
);
CREATE TABLE titles (key TEXT NOT NULL, document INTEGER NOT NULL);
CREATE TABLE meta (key TEXT NOT NULL);
"""
_STOP_TEXT = (
    "a about all also an and any are as at be been being but by can could did do does doing for from get give had has "
    "have having he her here him his how i if in into is it its just know let like many may me might much my need not "
    "of on or our out please s say shall she should show so some t tell than that the their them then there these they "
    "this those to up us use used uses using want was we were what when where which who whom whose why will with would "
    "you your"
)
_STOP_WORDS = frozenset(_STOP_TEXT.split())
_MAX_TERMS = 24  # more than a question has; a pasted page is searched by its beginning
_MAX_TITLE_WORDS = 12
_MAX_QUERY_CHARS = 10_000
_CANDIDATES = 50
_TITLE_WEIGHT = 3.0
_TITLE_BONUS = 0.5  # a whole title weighs half as much as a word that only one document has
_MIN_COVERAGE = 1 / 3


def build_index(path: Path, documents: Iterable[Document], key: str = "") -> int:
    """Write the index of `documents` to `path`, and return their number. `index_key` tells `key` back.

    Atomic: it is built beside `path` and renamed, so a reader never sees half an index, and two builders don't clash.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    count = 0
    try:
        with closing(sqlite3.connect(draft)) as database:
            database.executescript("PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;" + _SCHEMA)
            for count, document in enumerate(documents, start=1):
                row = (count, document.title, document.text, document.id, document.source)
                database.execute("INSERT INTO documents (rowid, title, body, id, source) VALUES (?, ?, ?, ?, ?)", row)
                database.execute("INSERT INTO titles VALUES (?, ?)", (" ".join(words(document.title)), count))
            database.execute("INSERT INTO meta VALUES (?)", [key])
            database.execute("CREATE INDEX titles_key ON titles (key)")
            database.execute("INSERT INTO documents (documents) VALUES ('optimize')")
            database.commit()
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
    return count


def words(text: str) -> list[str]:
    """The words of a text as titles are compared: folded case, no accents, no punctuation. 12.011 is one word."""
    plain = text.casefold()
    if not plain.isascii():
        plain = "".join(c for c in unicodedata.normalize("NFKD", plain) if not unicodedata.combining(c))
    return re.findall(r"\d+(?:\.\d+)+|[^\W_]+", plain)


class LocalIndex:
    """Searches a file that `build_index` wrote."""

    name = "local"

    def __init__(self, path: Path) -> None:
        self.path = path

    async def search(self, query: str, max_results: int) -> list[SearchHit]:
        return await asyncio.to_thread(self._search, query, max_results)

    def _search(self, query: str, max_results: int) -> list[SearchHit]:
        query = query[:_MAX_QUERY_CHARS]
        asked = words(query)
        terms = list(dict.fromkeys(w for w in asked if w not in _STOP_WORDS))[:_MAX_TERMS]
        if not terms:  # "The Who": all it has are stop words
            terms = list(dict.fromkeys(asked))[:_MAX_TERMS]
        if not terms or max_results < 1:
            return []
        try:
            with closing(self._open()) as database:
                return [_hit(database, rowid) for rowid in _rank(database, query, asked, terms)[:max_results]]
        except sqlite3.DatabaseError as error:
            raise BackendUnavailable(f"the index {self.path} can't be read ({error}); delete it to rebuild") from error

    def _open(self) -> sqlite3.Connection:
        return sqlite3.connect(f"{self.path.resolve().as_uri()}?mode=ro&immutable=1", uri=True)


def _rank(database: sqlite3.Connection, query: str, asked: list[str], terms: list[str]) -> list[int]:
    """Row ids, best first.

    BM25 and the titles choose candidates. They are ranked by the question's words that they contain, each weighed by
    its rarity (a mere stem counts half), and by whether the question has their whole title. BM25 breaks the ties; of
    two documents with one title the earlier is first. What has less than a third of the question's weight is no answer
    to it: "capital of Atlantis" finds nothing.
    """
    titled = _titles_in(database, asked[: 4 * _MAX_TERMS])
    match = " OR ".join(f'"{term}"' for term in terms)
    bm25 = f"bm25(documents, {_TITLE_WEIGHT}, 1.0)"
    select = f"SELECT rowid, title, body, -{bm25} FROM documents WHERE documents MATCH ?"
    rows = database.execute(f"{select} ORDER BY {bm25} LIMIT {_CANDIDATES}", [match]).fetchall()
    if titled:
        rows += database.execute(f"{select} AND rowid IN ({', '.join('?' * len(titled))})", [match, *titled]).fetchall()
    if not rows:
        return []
    total: int = database.execute("SELECT max(rowid) FROM documents").fetchone()[0]
    containing = {
        term: {row for (row,) in database.execute("SELECT rowid FROM documents WHERE documents MATCH ?", [f'"{term}"'])}
        for term in terms
    }
    weight = {term: math.log1p(total / (len(found) + 0.5)) for term, found in containing.items()}
    needed = _MIN_COVERAGE * sum(weight.values())
    best = max(bm25_score for *_, bm25_score in rows)
    score: dict[int, float] = {}
    for row, title, body, bm25_score in rows:
        literal = set(words(f"{title} {body}"))
        covered = sum(w if t in literal else w / 2 for t, w in weight.items() if row in containing[t])
        if row in titled:
            accents_too = title.casefold() in query.casefold()
            score[row] = covered + math.log1p(total) * _TITLE_BONUS + accents_too / 2
        elif covered >= needed:
            score[row] = covered + bm25_score / max(best, 1e-9) / 4
    return sorted(score, key=lambda row: (-score[row], row))


def _titles_in(database: sqlite3.Connection, asked: list[str]) -> set[int]:
    """Documents whose whole title is a run of the question's words; of several such runs the longest."""
    for length in range(min(_MAX_TITLE_WORDS, len(asked)), 0, -1):
        runs = [asked[start : start + length] for start in range(len(asked) - length + 1)]
        keys = [" ".join(run) for run in runs if not _STOP_WORDS.issuperset(run)]
        query = f"SELECT document FROM titles WHERE key IN ({', '.join('?' * len(keys))}) LIMIT {_CANDIDATES}"
        if found := {row for (row,) in database.execute(query, keys)}:
            return found
    return set()


def _hit(database: sqlite3.Connection, rowid: int) -> SearchHit:
    row = database.execute("SELECT title, body, source FROM documents WHERE rowid = ?", [rowid]).fetchone()
    return SearchHit(*row)


def index_key(path: Path) -> str | None:
    """The key that `build_index` was given, or None if there is no index at `path` that a search can use."""
    if not path.is_file():
        return None
    with contextlib.suppress(sqlite3.DatabaseError), closing(LocalIndex(path)._open()) as database:
        database.execute("SELECT count(*) FROM documents WHERE documents MATCH 'a'").fetchone()
        database.execute("SELECT count(*) FROM titles").fetchone()
        key: str = database.execute("SELECT key FROM meta").fetchone()[0]
        return key
    return None
