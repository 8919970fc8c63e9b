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

FORMAT = 1  # part of the index's file name: raise it when the schema changes
_SCHEMA = """
CREATE VIRTUAL TABLE documents USING fts5(
    title, body, id UNINDEXED, source UNINDEXED, tokenize = "porter unicode61 remove_diacritics 2"
);
CREATE TABLE titles (key TEXT NOT NULL, document INTEGER NOT NULL);
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
_CANDIDATES = 20
_TITLE_WEIGHT = 3.0
_TITLE_BONUS = 1.0
_MIN_COVERAGE = 1 / 3


def build_index(path: Path, documents: Iterable[Document]) -> int:
    """Write the index of `documents` to `path`, and return their number.

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
            database.execute("CREATE INDEX titles_key ON titles (key)")
            database.execute("INSERT INTO documents (documents) VALUES ('optimize')")
            database.commit()
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
    return count


def words(text: str) -> list[str]:
    """The words of a text in the form that titles are compared in: folded case, no accents, no punctuation."""
    decomposed = unicodedata.normalize("NFKD", text.casefold())
    plain = "".join(c for c in decomposed if not unicodedata.combining(c))
    return re.findall(r"[^\W_]+", plain)


class LocalIndex:
    """Searches a file that `build_index` wrote."""

    name = "local"

    def __init__(self, path: Path) -> None:
        self.path = path

    async def search(self, query: str, max_results: int) -> list[SearchHit]:
        return await asyncio.to_thread(self._search, query, max_results)

    def _search(self, query: str, max_results: int) -> list[SearchHit]:
        asked = words(query[:10_000])
        terms = list(dict.fromkeys(w for w in asked if w not in _STOP_WORDS))[:_MAX_TERMS]
        if not terms:  # "The Who": all it has are stop words
            terms = list(dict.fromkeys(asked))[:_MAX_TERMS]
        if not terms or max_results < 1:
            return []
        try:
            with closing(self._open()) as database:
                return [_hit(database, rowid) for rowid in _rank(database, asked, terms)[:max_results]]
        except sqlite3.DatabaseError as error:
            raise BackendUnavailable(f"the index {self.path} can't be read ({error}); delete it to rebuild") from error

    def _open(self) -> sqlite3.Connection:
        return sqlite3.connect(f"{self.path.resolve().as_uri()}?mode=ro&immutable=1", uri=True)


def _rank(database: sqlite3.Connection, asked: list[str], terms: list[str]) -> list[int]:
    """Row ids, best first: BM25, plus a bonus for a title that stands in the question word for word.

    What shares only common words with the question is no answer to it: hits weigh in with the informativeness of the
    words that they contain, and need a third of the question's.
    """
    titled = _titles_in(database, asked[: 4 * _MAX_TERMS])
    match = " OR ".join(f'"{term}"' for term in terms)
    bm25 = f"bm25(documents, {_TITLE_WEIGHT}, 1.0)"
    query = f"SELECT rowid, -{bm25} FROM documents WHERE documents MATCH ?"
    score: dict[int, float] = dict(database.execute(f"{query} ORDER BY {bm25} LIMIT {_CANDIDATES}", (match,)))
    if titled:
        marks = ", ".join("?" * len(titled))
        score.update(database.execute(f"{query} AND rowid IN ({marks})", (match, *titled)))
    total = database.execute("SELECT max(rowid) FROM documents").fetchone()[0] or 0
    weights, containing = {}, {}
    for term in terms:
        rows = {
            row for (row,) in database.execute("SELECT rowid FROM documents WHERE documents MATCH ?", [f'"{term}"'])
        }
        weights[term] = math.log1p(total / (len(rows) + 0.5))
        containing[term] = rows
    needed = _MIN_COVERAGE * sum(weights.values())
    longest = max(titled.values(), default=0)
    kept: dict[int, float] = {}
    for row, value in score.items():
        covered = sum(weight for term, weight in weights.items() if row in containing[term])
        if row in titled and titled[row] == longest:
            kept[row] = value + _TITLE_BONUS * longest
        elif covered >= needed:
            kept[row] = value
    return sorted(kept, key=lambda row: (-kept[row], row))


def _titles_in(database: sqlite3.Connection, asked: list[str]) -> dict[int, int]:
    """Rows whose whole title is a run of the question's words, with the run's length."""
    runs: dict[str, int] = {}
    for start in range(len(asked)):
        for end in range(start + 1, min(start + _MAX_TITLE_WORDS, len(asked)) + 1):
            run = asked[start:end]
            if not all(word in _STOP_WORDS for word in run):
                runs[" ".join(run)] = len(run)
    found: dict[int, int] = {}
    keys = list(runs)
    for first in range(0, len(keys), 500):  # below SQLite's limit on variables
        part = keys[first : first + 500]
        marks = ", ".join("?" * len(part))
        for key, row in database.execute(f"SELECT key, document FROM titles WHERE key IN ({marks})", part):
            found[row] = runs[key]
    return found


def _hit(database: sqlite3.Connection, rowid: int) -> SearchHit:
    row = database.execute("SELECT title, body, source FROM documents WHERE rowid = ?", [rowid]).fetchone()
    return SearchHit(*row)


def readable(path: Path) -> bool:
    """Is there an index at `path` that a search can use?"""
    if not path.is_file():
        return False
    with contextlib.suppress(sqlite3.DatabaseError), closing(LocalIndex(path)._open()) as database:
        database.execute("SELECT count(*) FROM documents WHERE documents MATCH 'a'").fetchone()
        database.execute("SELECT count(*) FROM titles").fetchone()
        return True
    return False
