"""What can go wrong with the record, said so that the reader knows what to do next."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy import exc


class StoreError(Exception):
    """The store could not do what was asked; the message names the file, the cause and the way out."""


class NotFound(StoreError):
    """No row has this id."""

    def __init__(self, thing: str, id: str) -> None:
        super().__init__(f"There is no {thing} {id!r} in the store.")
        self.thing = thing
        self.id = id


class InvalidRecord(StoreError, ValueError):
    """What the caller handed over can't be recorded as it is."""


class DamagedRecord(StoreError):
    """A row that another one needs is gone or isn't what was written."""


class QueueFull(StoreError):
    """The queue holds as many waiting tasks as it may."""


# By the start of SQLite's own error name: the cause in words, and the way out.
_SQLITE: dict[str, tuple[str, str]] = {
    "SQLITE_BUSY": (
        "another process kept it locked for longer than the waiting time",
        "see which process writes to it (a backup tool, a database browser?), end it, and try again",
    ),
    "SQLITE_LOCKED": ("it is locked by another connection", "close other programs that have it open and try again"),
    "SQLITE_FULL": ("the disk is full", "free some space; what was acknowledged before is safe"),
    "SQLITE_READONLY": (
        "it may not be written",
        "give the user that runs Whetstone write permission on the file and on its folder, or choose another path",
    ),
    "SQLITE_CORRUPT": (
        "its content is damaged",
        "move it away and restore a backup, or save what is readable with: sqlite3 FILE .recover",
    ),
    "SQLITE_NOTADB": (
        "it is not an SQLite database",
        "choose another path, or move the file away so that a new store can be made there",
    ),
    "SQLITE_CANTOPEN": (
        "it can't be opened",
        "check that the folder exists and that the user that runs Whetstone may write in it",
    ),
    "SQLITE_IOERR": ("reading or writing the disk failed", "check the disk and the free space, then try again"),
    "SQLITE_TOOBIG": ("a text or a list of tokens is larger than SQLite allows", "record a shorter one"),
}


def explain(error: BaseException, where: str) -> StoreError:
    """A StoreError for a database error raised at the store `where` (a path, or a URL without its password)."""
    cause = error.orig if isinstance(error, exc.StatementError) and error.orig is not None else error
    if isinstance(error, exc.TimeoutError):
        return StoreError(
            f"The store {where}: every connection was in use for too long. Too many threads write at once; try again."
        )
    name = getattr(cause, "sqlite_errorname", "")
    for start, (why, way_out) in _SQLITE.items():
        if name.startswith(start):
            return StoreError(f"The store {where}: {why} ({cause}). To go on: {way_out}.")
    return StoreError(f"The store {where}: the database refused: {cause}")


@contextmanager
def explained(where: str) -> Iterator[None]:
    """Turns every database error inside into a StoreError; the store's own errors pass."""
    try:
        yield
    except (exc.SQLAlchemyError, sqlite3.Error, UnicodeEncodeError, OverflowError) as error:  # the last two: bad values
        raise explain(error, where) from error
