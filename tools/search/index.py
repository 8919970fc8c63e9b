"""The local index: the bundled corpus in one SQLite file (FTS5, BM25), and a file for each folder of one's own."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sqlite3
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path

from tools.search.backend import BackendUnavailable, SearchHit
from tools.search.corpus import Document
from tools.search.folder import folder_shard
from tools.search.ranking import DOCUMENTS, Shard, rank, words

log = logging.getLogger(__name__)
FORMAT = 1  # part of an index's key: raise it when the schema changes
_SCHEMA = (
    DOCUMENTS
    + """
CREATE TABLE titles (key TEXT NOT NULL, document INTEGER NOT NULL);
CREATE TABLE meta (key TEXT NOT NULL);
"""
)


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


def index_key(path: Path) -> str | None:
    """The key that `build_index` was given, or None if there is no index at `path` that a search can use."""
    if not path.is_file():
        return None
    with contextlib.suppress(sqlite3.DatabaseError), closing(_open(path)) as database:
        database.execute("SELECT count(*) FROM documents WHERE documents MATCH 'a'").fetchone()
        database.execute("SELECT count(*) FROM titles").fetchone()
        key: str = database.execute("SELECT key FROM meta").fetchone()[0]
        return key
    return None


class LocalIndex:
    """Searches the file that `build_index` wrote, and the indexed folders in `folders`.

    Of these the ones that a person added are searched, and `own`, which a setting names. All files are opened anew for
    each question, so that what is added, read again or removed counts at once.
    """

    name = "local"

    def __init__(self, path: Path, folders: Path | None = None, own: Path | None = None) -> None:
        self.path = path
        self.folders = folders
        self.own = own

    async def search(self, query: str, max_results: int) -> list[SearchHit]:
        return await asyncio.to_thread(self._search, query, max_results)

    def _search(self, query: str, max_results: int) -> list[SearchHit]:
        if max_results < 1:
            return []
        broken: list[BackendUnavailable] = []  # indexes of folders that can't be read: the others still answer
        with ExitStack() as stack:
            shards = list(self._open_all(stack, broken))
            try:
                hits, gone = _best(shards, query, max_results)
            except BackendUnavailable as error:
                if len(shards) == 1:
                    raise
                broken.append(error)
                hits, gone = _best(shards[:1], query, max_results)
        if hits:
            for reason in broken:
                log.warning("searched without a folder: %s", reason)
            return hits
        if gone:
            names = " and ".join(sorted(gone))
            raise BackendUnavailable(
                f"the indexed folder {names} is gone; bring it back, or run `whetstone index remove` with its name"
            )
        if broken:
            raise broken[0]
        return []

    def _open_all(self, stack: ExitStack, broken: list[BackendUnavailable]) -> Iterator[Shard]:
        yield self._corpus(stack)
        files = set(self.folders.glob("*.sqlite")) if self.folders else set()
        if self.own is not None:
            files.add(self.own)
        for path in sorted(files):
            try:
                shard = stack.enter_context(folder_shard(path, named_by_setting=path == self.own))
            except BackendUnavailable as error:
                broken.append(error)
                continue
            if shard is not None:
                yield shard

    def _corpus(self, stack: ExitStack) -> Shard:
        way_out = "restart Whetstone or run `whetstone index` to build it again"
        if not self.path.is_file():
            raise BackendUnavailable(f"the index {self.path} is gone; {way_out}")
        try:
            database = stack.enter_context(closing(_open(self.path)))
            total = database.execute("SELECT max(rowid) FROM documents").fetchone()[0] or 0
        except sqlite3.DatabaseError as error:
            way_out = f"delete it to rebuild: {way_out}"
            raise BackendUnavailable(f"the index {self.path} can't be read ({error}); {way_out}") from error
        return Shard(database, self.path, f"delete it to rebuild: {way_out}", total)


def _best(shards: Sequence[Shard], query: str, max_results: int) -> tuple[list[SearchHit], set[str]]:
    """The best hits, and the folders that would have had some and are gone: what nobody can look up isn't cited."""
    hits: list[SearchHit] = []
    gone: set[str] = set()
    for number, row in rank(shards, query):
        shard = shards[number]
        if shard.root is not None and not shard.root.is_dir():
            gone.add(str(shard.root))
            continue
        if (hit := _hit(shard, row)) not in hits:
            hits.append(hit)
        if len(hits) == max_results:
            break
    return hits, gone


def _open(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro&immutable=1", uri=True)


def _hit(shard: Shard, row: int) -> SearchHit:
    ((title, body, id, source),) = shard.rows("SELECT title, body, id, source FROM documents WHERE rowid = ?", [row])
    return SearchHit(title, body, source, id if shard.root is not None else "")
