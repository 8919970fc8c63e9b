"""Ranks a question over index files: which passages answer it, best first.

BM25 is SQLite FTS5's own; what is added here is that titles and rare words count for more.
"""

from __future__ import annotations

import math
import re
import sqlite3
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.search.backend import BackendUnavailable

DOCUMENTS = """
CREATE VIRTUAL TABLE documents USING fts5(
    title, body, id UNINDEXED, source UNINDEXED, tokenize = "porter unicode61 remove_diacritics 2"
);
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

Place = tuple[int, int]  # a shard's number, a row in it


@dataclass(frozen=True)
class Shard:
    """An open index file. `root` is the folder that it was read from, None for the bundled corpus.

    `way_out` tells a person what to do when it can't be read. `total` is its number of passages.
    """

    database: sqlite3.Connection
    path: Path
    way_out: str
    total: int = 0
    root: Path | None = None

    def rows(self, sql: str, values: Sequence[Any]) -> list[Any]:
        """Raises BackendUnavailable when the file is damaged."""
        try:
            return self.database.execute(sql, values).fetchall()
        except sqlite3.DatabaseError as error:
            raise BackendUnavailable(f"the index {self.path} can't be read ({error}); {self.way_out}") from error

    def matching(self, term: str) -> set[int]:
        return {row for (row,) in self.rows("SELECT rowid FROM documents WHERE documents MATCH ?", [f'"{term}"'])}

    def titled(self, keys: Sequence[str]) -> list[int]:
        """Rows whose whole title is one of `keys`; many passages may share one."""
        marks = ", ".join("?" * len(keys))
        return [row for (row,) in self.rows(f"SELECT document FROM titles WHERE key IN ({marks})", keys)]


def words(text: str) -> list[str]:
    """The words of a text as titles are compared: folded case, no accents, no punctuation. 12.011 is one word."""
    plain = text.casefold()
    if not plain.isascii():
        plain = "".join(c for c in unicodedata.normalize("NFKD", plain) if not unicodedata.combining(c))
    return re.findall(r"\d+(?:\.\d+)+|[^\W_]+", plain)


def rank(shards: Sequence[Shard], query: str) -> list[Place]:
    """The places of what answers `query`, best first.

    BM25 and the titles choose candidates. They are ranked by the question's words that they contain, each weighed by
    its rarity over all shards (a mere stem counts half), and by whether the question has their whole title. BM25 breaks
    the ties; of two documents with one title the earlier is first. What has less than a third of the question's weight
    is no answer to it: "capital of Atlantis" finds nothing.
    """
    query = query[:_MAX_QUERY_CHARS]
    asked = words(query)
    terms = list(dict.fromkeys(word for word in asked if word not in _STOP_WORDS))[:_MAX_TERMS]
    if not terms:  # "The Who": all it has are stop words
        terms = list(dict.fromkeys(asked))[:_MAX_TERMS]
    if not terms:
        return []
    titled = _titles_in(shards, asked[: 4 * _MAX_TERMS])
    candidates = [row for number, shard in enumerate(shards) for row in _candidates(number, shard, terms, titled)]
    if not candidates:
        return []
    total = sum(shard.total for shard in shards)
    containing = {term: [shard.matching(term) for shard in shards] for term in terms}
    weight = {term: math.log1p(total / (sum(map(len, found)) + 0.5)) for term, found in containing.items()}
    needed = _MIN_COVERAGE * sum(weight.values())
    best = max(bm25_score for *_, bm25_score in candidates)
    score: dict[Place, float] = {}
    for number, row, title, body, bm25_score in candidates:
        literal = set(words(f"{title} {body}"))
        covered = sum(w if t in literal else w / 2 for t, w in weight.items() if row in containing[t][number])
        if (number, row) in titled:
            accents_too = title.casefold() in query.casefold()
            score[number, row] = covered + math.log1p(total) * _TITLE_BONUS + accents_too / 2
        elif covered >= needed:
            score[number, row] = covered + bm25_score / max(best, 1e-9) / 4
    return sorted(score, key=lambda place: (-score[place], place))


def _candidates(
    number: int, shard: Shard, terms: Sequence[str], titled: set[Place]
) -> list[tuple[int, int, str, str, float]]:
    """(shard, row, title, body, BM25) of the best by BM25, and of documents whose title is asked for."""
    match = " OR ".join(f'"{term}"' for term in terms)
    bm25 = f"bm25(documents, {_TITLE_WEIGHT}, 1.0)"
    select = f"SELECT rowid, title, body, -{bm25} FROM documents WHERE documents MATCH ?"
    rows = shard.rows(f"{select} ORDER BY {bm25} LIMIT {_CANDIDATES}", [match])
    own = sorted(row for at, row in titled if at == number)[:_CANDIDATES]
    if own:
        rows += shard.rows(f"{select} AND rowid IN ({', '.join('?' * len(own))})", [match, *own])
    return [(number, *row) for row in rows]


def _titles_in(shards: Sequence[Shard], asked: list[str]) -> set[Place]:
    """Documents whose whole title is a run of the question's words; of several such runs the longest."""
    for length in range(min(_MAX_TITLE_WORDS, len(asked)), 0, -1):
        runs = [asked[start : start + length] for start in range(len(asked) - length + 1)]
        keys = [" ".join(run) for run in runs if not _STOP_WORDS.issuperset(run)]
        found = {(number, row) for number, shard in enumerate(shards) for row in shard.titled(keys)}
        if found:
            return found
    return set()
