"""An indexed folder: a SQLite file of its passages, brought up to date by reading what is new or changed in it.

A file of the folder is replaced in one transaction. A build that is killed leaves a whole index, some of whose files
are newer than others, and the next build goes on from there.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import quote

from tools.documents import DocumentReader, Unreadable, passages
from tools.search.backend import BackendUnavailable
from tools.search.ranking import DOCUMENTS, Shard, words
from tools.search.walk import MEDIA_TYPES, Found, display_name, read_file, walk

Progress = Callable[[int, int, str], None]  # files done, files in all, the one that is next

_FORMAT = 1  # of the schema; a file of another one is built anew
_READERS = 2  # raise it when the readers give other text: all files are read again
_SCHEMA = (
    DOCUMENTS
    + """
CREATE TABLE files (
    id INTEGER PRIMARY KEY, path BLOB NOT NULL UNIQUE, size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL,
    hash TEXT NOT NULL, readers INTEGER NOT NULL, passages INTEGER NOT NULL, note TEXT NOT NULL
);
CREATE TABLE titles (key TEXT NOT NULL, document INTEGER NOT NULL, file INTEGER NOT NULL);
CREATE INDEX titles_key ON titles (key);
CREATE INDEX titles_file ON titles (file);
CREATE TABLE meta (root BLOB NOT NULL, added INTEGER NOT NULL, read_at TEXT NOT NULL);
"""
)


@dataclass(frozen=True)
class Note:
    """A file that isn't searched, or only in part, and why; `path` is relative to the folder."""

    path: str
    reason: str


@dataclass(frozen=True)
class Report:
    """What a build did. `new`, `changed`, `unchanged` and `removed` count files; `skipped` aren't searched at all."""

    folder: Path
    new: int
    changed: int
    unchanged: int
    removed: int
    passages: int
    skipped: tuple[Note, ...]
    partial: tuple[Note, ...]


@dataclass(frozen=True)
class IndexedFolder:
    """`added`: by a person, so every search reads it; otherwise a setting has named it. `present`: it still exists."""

    folder: Path
    files: int
    passages: int
    skipped: int
    added: bool
    present: bool
    read_at: datetime


def shard_path(folders: Path, folder: Path) -> Path:
    """Where the index of `folder` is."""
    return folders / f"{hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:16]}.sqlite"


def index_folder(folders: Path, folder: Path, *, added: bool = True, progress: Progress | None = None) -> Report:
    """Bring the index of `folder` up to date; `folders` holds the indexes. Blocks as long as reading takes.

    A file that has its size and time of change isn't read; one with the same content is, but not indexed again. What
    can't be read is skipped and named. Raises NotADirectoryError, and OSError where `folders` can't be written.
    """
    if not folder.is_dir():
        wrong = (
            "isn't a folder; name the one that it is in"
            if folder.exists()
            else "doesn't exist; make it, or name another one"
        )
        raise NotADirectoryError(f"The document folder {folder} {wrong}.")
    root = folder.resolve()
    path = shard_path(folders, root)
    folders.mkdir(parents=True, exist_ok=True)
    try:
        with closing(_opened_for_writing(path, root)) as database:
            return _update(database, root, added, progress or (lambda done, total, name: None))
    except sqlite3.OperationalError as error:  # a full disk, a folder without rights, another build that takes too long
        raise OSError(f"The index of {folder} can't be written to {path}: {error}.") from error


def remove_folder(folders: Path, folder: Path) -> bool:
    """Forget a folder, which may itself be gone. False if it wasn't indexed."""
    wanted = {folder.absolute(), folder.resolve()}
    for path in sorted(folders.glob("*.sqlite")):
        if path == shard_path(folders, folder) or _root_of(path) in wanted:
            _delete(path)
            return True
    return False


def indexed_folders(folders: Path) -> list[IndexedFolder]:
    """All, by name. A damaged index isn't listed: `whetstone index add` builds it anew."""
    found = []
    for path in folders.glob("*.sqlite"):
        with contextlib.suppress(sqlite3.DatabaseError), closing(_opened_for_reading(path)) as database:
            root, added, read_at = database.execute("SELECT root, added, read_at FROM meta").fetchone()
            counts = "SELECT count(*), total(passages), total(passages = 0) FROM files"
            files, passage_count, skipped = map(int, database.execute(counts).fetchone())
            place = Path(os.fsdecode(root))
            when = datetime.fromisoformat(read_at)
            found.append(
                IndexedFolder(place, files - skipped, passage_count, skipped, bool(added), place.is_dir(), when)
            )
    return sorted(found, key=lambda item: item.folder)


@contextmanager
def folder_shard(path: Path, *, named_by_setting: bool) -> Iterator[Shard | None]:
    """An indexed folder opened for searching, or None if it isn't to be searched. Raises BackendUnavailable."""
    way_out = "restart Whetstone, or run `whetstone index add` with its folder, to build it again"
    if not path.is_file():
        if named_by_setting:
            raise BackendUnavailable(f"the index {path} is gone; {way_out}")
        yield None  # it was there a moment ago: removed
        return
    try:
        database = _opened_for_reading(path)
    except sqlite3.DatabaseError as error:
        raise BackendUnavailable(f"the index {path} can't be read ({error}); {way_out}") from error
    with closing(database):
        try:
            unfinished = database.execute("PRAGMA user_version").fetchone()[0] != _FORMAT
            row = None if unfinished else database.execute("SELECT root, added FROM meta").fetchone()
            total = 0 if row is None else int(database.execute("SELECT total(passages) FROM files").fetchone()[0])
        except sqlite3.DatabaseError as error:
            raise BackendUnavailable(f"the index {path} can't be read ({error}); {way_out}") from error
        if row is None or not (row[1] or named_by_setting):
            yield None
        else:
            yield Shard(database, path, way_out, total, Path(os.fsdecode(row[0])))


def _update(database: sqlite3.Connection, root: Path, added: bool, progress: Progress) -> Report:
    with _transaction(database):
        database.execute("UPDATE meta SET added = max(added, ?)", [added])
    found = walk(root)
    known = {row[0]: row[1:] for row in database.execute("SELECT path, id, size, mtime_ns, hash, readers FROM files")}
    new = changed = unchanged = 0
    with DocumentReader() as reader:
        for number, file in enumerate(found.files):
            progress(number, len(found.files), display_name(file.path))
            before = known.get(file.path)
            if before and before[1:3] == (file.size, file.mtime_ns) and before[4] == _READERS:
                unchanged += 1
            elif _read(database, root, file, before[3] if before and before[4] == _READERS else "", reader):
                new, changed = new + (before is None), changed + (before is not None)
            else:
                unchanged += 1
    present = {file.path for file in found.files}
    removed = [path for path in known if path not in present and not found.unlooked(path)]
    with _transaction(database):
        for path in removed:
            _forget(database, known[path][0])
            database.execute("DELETE FROM files WHERE path = ?", [path])
        database.execute("UPDATE meta SET read_at = ?", [datetime.now(UTC).isoformat(timespec="seconds")])
    progress(len(found.files), len(found.files), "")
    rows = database.execute("SELECT path, note, passages FROM files WHERE note != '' ORDER BY path").fetchall()
    notes = [(Note(display_name(path), note), count) for path, note, count in rows]
    skipped = [note for note, count in notes if not count]
    skipped += [Note(display_name(path), reason) for path, reason in found.skipped]
    total = int(database.execute("SELECT total(passages) FROM files").fetchone()[0])
    partial = tuple(note for note, count in notes if count)
    return Report(root, new, changed, unchanged, len(removed), total, tuple(skipped), partial)


def _read(database: sqlite3.Connection, root: Path, file: Found, old_hash: str, reader: DocumentReader) -> bool:
    """Put one file into the index as it is now. False if its content was there already."""
    name = display_name(file.path)
    rows: list[tuple[str, str, str, str, str]] = []  # title, what it is known by, text, url, source
    size, mtime_ns, digest, note = file.size, file.mtime_ns, "", ""
    try:
        data = read_file(root, file)
        digest = hashlib.sha256(data).hexdigest()
        if digest == old_hash:
            with _transaction(database):
                change = "UPDATE files SET size = ?, mtime_ns = ? WHERE path = ?"
                database.execute(change, [file.size, file.mtime_ns, file.path])
            return False
        reading = reader.read(data, MEDIA_TYPES[Path(name).suffix.lower()])
        note = reading.cut
        title = reading.title or Path(name).stem.replace("_", " ")
        url = quote(f"{root.name}/{name}")
        for passage in passages(reading):
            known_by = passage.heading or title
            shown = title if known_by == title else f"{title}: {known_by}"
            page = passage.anchor.removeprefix("page=") if passage.anchor.startswith("page=") else ""
            source = f"{name}, page {page}" if page else name  # a chat shows this and, of such a url, nothing
            place = f"{url}#{passage.anchor}" if passage.anchor else url
            rows.append((shown, known_by, passage.text, place, source))
    except Unreadable as error:
        note = str(error)
    except OSError as error:
        note = f"can't be read ({error.strerror or error})"
        size = -1  # rights may come back without the file changing
    with _transaction(database):
        values = (file.path, size, mtime_ns, digest, _READERS, len(rows), note)
        ((id,),) = database.execute(
            "INSERT INTO files (path, size, mtime_ns, hash, readers, passages, note) VALUES (?, ?, ?, ?, ?, ?, ?) "
            "ON CONFLICT (path) DO UPDATE SET size = excluded.size, mtime_ns = excluded.mtime_ns, hash = excluded.hash,"
            " readers = excluded.readers, passages = excluded.passages, note = excluded.note RETURNING id",
            values,
        ).fetchall()
        _forget(database, id)
        for shown, known_by, text, place, source in rows:
            insert = "INSERT INTO documents (title, body, id, source) VALUES (?, ?, ?, ?)"
            document = database.execute(insert, (shown, text, place, source)).lastrowid
            database.execute("INSERT INTO titles VALUES (?, ?, ?)", (" ".join(words(known_by)), document, id))
    return True


def _forget(database: sqlite3.Connection, file: int) -> None:
    database.execute("DELETE FROM documents WHERE rowid IN (SELECT document FROM titles WHERE file = ?)", [file])
    database.execute("DELETE FROM titles WHERE file = ?", [file])


def _opened_for_writing(path: Path, root: Path) -> sqlite3.Connection:
    """An index with its schema, made anew where there is none, or one that is damaged or of another format."""
    for last in (False, True):
        database = sqlite3.connect(path, timeout=30.0, isolation_level=None)
        try:
            database.execute("PRAGMA journal_mode = WAL")  # searches go on while it is written
            database.execute("PRAGMA synchronous = NORMAL")
            with _transaction(database):
                version = database.execute("PRAGMA user_version").fetchone()[0]
                if version == 0:
                    for statement in filter(str.strip, _SCHEMA.split(";")):
                        database.execute(statement)
                    database.execute("INSERT INTO meta VALUES (?, 0, ?)", [os.fsencode(root), "1970-01-01T00:00:00Z"])
                    database.execute(f"PRAGMA user_version = {_FORMAT}")
            if version in (0, _FORMAT) and _whole(database):
                return database
            database.close()
        except sqlite3.OperationalError:
            database.close()
            raise
        except sqlite3.DatabaseError:
            database.close()
            if last:
                raise
        _delete(path)
    raise OSError(f"The index {path} can't be made anew.")


def _whole(database: sqlite3.Connection) -> bool:
    try:
        return bool(database.execute("PRAGMA quick_check").fetchone()[0] == "ok")
    except sqlite3.DatabaseError:
        return False


def _opened_for_reading(path: Path) -> sqlite3.Connection:
    # mode=rw: a search may have to finish what a killed build had written to the log
    database = sqlite3.connect(f"{path.resolve().as_uri()}?mode=rw", uri=True, timeout=5.0)
    database.execute("PRAGMA query_only = ON")
    return database


def _root_of(path: Path) -> Path | None:
    with contextlib.suppress(sqlite3.DatabaseError), closing(_opened_for_reading(path)) as database:
        return Path(os.fsdecode(database.execute("SELECT root FROM meta").fetchone()[0]))
    return None


def _delete(path: Path) -> None:
    for suffix in ("", "-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)


@contextmanager
def _transaction(database: sqlite3.Connection) -> Iterator[None]:
    database.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        database.execute("ROLLBACK")
        raise
    database.execute("COMMIT")
