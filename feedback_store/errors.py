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


class RunUnderWay(StoreError):
    """Another process trains on this store."""


class Conflict(StoreError):
    """The database undid the transaction because it and another one were in each other's way; it may be begun anew."""


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


_SAFE = "what was acknowledged before is safe"
_LOST = (
    "the connection to the server was lost",
    f"check that PostgreSQL runs and try again, which connects anew; {_SAFE}, and what was under way may be missing",
)
# By PostgreSQL's SQLSTATE, or the start of one: the cause in words, and the way out.
_POSTGRES: dict[str, tuple[str, str]] = {
    "08": _LOST,
    "57P": _LOST,
    "55P03": (
        "another transaction kept a lock for longer than the waiting time",
        "see which (SELECT * FROM pg_stat_activity), end it, and try again",
    ),
    "57014": ("a statement took longer than it may", "try again when the server is less busy, or ask for less"),
    "25006": (
        "the server only lets itself be read (a standby, or default_transaction_read_only)",
        "give the URL of the primary",
    ),
    "53100": ("the server's disk is full", f"free some space there; {_SAFE}"),
    "53200": ("the server is out of memory", "give it more, or lower its max_connections"),
    "53300": (
        "the server has no connection left",
        "raise its max_connections, lower Whetstone's store_connections, or stop processes that hold some",
    ),
    "42501": (
        "the user lacks a right",
        "as the database's owner: GRANT ALL ON SCHEMA public TO the user, or make it the owner: ALTER DATABASE … OWNER",
    ),
    "28": ("the server refused the user", "check the user and the password in the URL, and the server's pg_hba.conf"),
    "3D000": ("there is no such database", "make it: createdb NAME"),
    "58": ("the server failed to read or write its disk", "see its log"),
    "XX": ("the server found its data damaged, or failed inside", "see its log; restore a backup if it is damaged"),
}
# What a server says before there is a session, when the driver passes no SQLSTATE on.
_CONNECTING: dict[str, str] = {  # the first that fits
    "too many": "53300",
    "remaining connection slots": "53300",
    "password authentication failed": "28",
    "no password supplied": "28",
    "no pg_hba.conf entry": "28",
    "role ": "28",
    "does not exist": "3D000",
    "permission denied for database": "42501",
}
# A row that was there at the look, or wasn't, was deleted or added by another transaction since (23…): a second look
# finds that, and says so.
_CONFLICTS = ("40001", "40P01", "23503", "23505")


def explain(error: BaseException, where: str) -> StoreError:
    """A StoreError for a database error raised at the store `where` (a path, or a URL without its password)."""
    cause = error.orig if isinstance(error, exc.StatementError) and error.orig is not None else error
    if isinstance(error, exc.TimeoutError):
        return StoreError(
            f"The store {where}: every connection was in use for too long. Too many threads use it at once; try again, "
            "or raise store_connections."
        )
    name = getattr(cause, "sqlite_errorname", "")
    for start, (why, way_out) in _SQLITE.items():
        if name.startswith(start):
            return StoreError(f"The store {where}: {why} ({cause}). To go on: {way_out}.")
    said = " ".join(str(cause).split())
    state = _sqlstate(error, cause)
    if state in _CONFLICTS:
        return Conflict(f"The store {where}: other transactions were in the way too often ({said}). Try again.")
    for start, (why, way_out) in _POSTGRES.items():
        if state.startswith(start):
            return StoreError(f"The store {where}: {why} ({said}). To go on: {way_out}.")
    return StoreError(f"The store {where}: the database refused: {said}")


def _sqlstate(error: BaseException, cause: BaseException) -> str:
    """PostgreSQL's code for it, or the one that it would have; empty for another database's error."""
    if state := getattr(cause, "sqlstate", None):
        return str(state)
    if not hasattr(cause, "sqlstate"):  # no error of psycopg
        return ""
    said = str(cause)
    if "FATAL" in said:
        return next((state for text, state in _CONNECTING.items() if text in said), "08")
    lost = isinstance(error, exc.DBAPIError) and error.connection_invalidated
    return "08" if lost or isinstance(error, exc.OperationalError) else ""


@contextmanager
def explained(where: str) -> Iterator[None]:
    """Turns every database error inside into a StoreError; the store's own errors pass."""
    try:
        yield
    except (exc.SQLAlchemyError, sqlite3.Error, UnicodeEncodeError, OverflowError) as error:  # the last two: bad values
        raise explain(error, where) from error
