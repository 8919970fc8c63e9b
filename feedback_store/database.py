"""Connections and transactions: the pragmas, who may write when, and errors in words."""

from __future__ import annotations

import functools
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, TypeVar

from sqlalchemy import Connection, Engine, create_engine, event, make_url
from sqlalchemy.engine import URL
from sqlalchemy.exc import ArgumentError, NoSuchModuleError

from feedback_store import postgres
from feedback_store.codec import to_json
from feedback_store.errors import Conflict, StoreError, explained

Clock = Callable[[], datetime]
CONNECTIONS = 16  # that one store keeps to a server at most; threads wait for one
_ATTEMPTS = 8  # of a transaction that the database undoes in favour of another one

_Method = TypeVar("_Method", bound=Callable[..., Any])


def utc_now() -> datetime:
    return datetime.now(UTC)


def sqlite_url(path: str) -> URL:
    return URL.create("sqlite", database=path)


def connect_to(
    url: URL, busy_seconds: float, *, foreign_keys: bool = True, connections: int = CONNECTIONS, **options: Any
) -> Engine:
    """An engine for `url`. On SQLite a transaction begins when it is asked to, and one that will write
    (execution option `will_write`) takes the write lock at its start: no later step of it can then fail for a lock.
    """
    sqlite = url.get_backend_name() == "sqlite"
    if sqlite:
        usual: dict[str, Any] = {"connect_args": {"timeout": busy_seconds}}
    else:
        usual = postgres.engine_options(url, busy_seconds, connections)
        if "poolclass" in options:  # one that keeps nothing
            usual = {name: value for name, value in usual.items() if not name.startswith(("pool_", "max_"))}
        url = url.difference_update_query(["options"])
    try:
        engine = create_engine(url, json_serializer=to_json, **usual, **options)
    except (NoSuchModuleError, ImportError) as error:
        raise StoreError(
            f"The store {postgres.shown(url)}: the driver for {url.drivername!r} is missing ({error}). "
            "Install it (for PostgreSQL: pip install 'whetstone[postgres]', URL postgresql://…), or give a path."
        ) from error
    if not sqlite:

        @event.listens_for(engine, "connect")
        def prepare_text(connection: Any, record: Any) -> None:
            postgres.prepare(connection)

    if sqlite:

        @event.listens_for(engine, "connect")
        def prepare(connection: Any, record: Any) -> None:
            connection.isolation_level = None  # sqlite3 must not begin transactions by itself
            connection.execute(f"PRAGMA foreign_keys = {'ON' if foreign_keys else 'OFF'}")
            # FULL syncs the log at each commit: an acknowledged step survives a power cut as well as a crash. It
            # costs milliseconds and a step takes a second to generate; NORMAL would lose the last commits.
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("PRAGMA journal_size_limit = 67108864")

        @event.listens_for(engine, "begin")
        def begin(connection: Connection) -> None:
            immediate = connection.get_execution_options().get("will_write")
            connection.exec_driver_sql("BEGIN IMMEDIATE" if immediate else "BEGIN")

    return engine


def again_after_conflicts(method: _Method) -> _Method:
    """`method`, which is one transaction, called again when the database undid it for another one's sake."""

    @functools.wraps(method)
    def call(*arguments: Any, **named: Any) -> Any:
        for attempt in range(1, _ATTEMPTS):
            try:
                return method(*arguments, **named)
            except Conflict:
                time.sleep(random.uniform(0, 0.01 * 2**attempt))
        return method(*arguments, **named)

    return call  # type: ignore[return-value]


def in_several_transactions(method: _Method) -> _Method:
    """Marks one whose parts, each a transaction, are called again by themselves: again as a whole, it would lose what
    the first of them did."""
    method._in_several_transactions = True  # type: ignore[attr-defined]
    return method


class Database:
    """The base of the store's parts. Thread-safe; a process that forks must open the store again in the child.

    Each public method of a part is one transaction. One that PostgreSQL undoes, because it and another wait for each
    other, is begun anew, so a method must read all that it decides by inside of it.
    """

    def __init_subclass__(cls) -> None:
        for name, member in list(vars(cls).items()):
            whole = not (hasattr(member, "__wrapped__") or hasattr(member, "_in_several_transactions"))
            if callable(member) and not name.startswith("_") and whole:
                setattr(cls, name, again_after_conflicts(member))

    def __init__(self, engine: Engine, *, max_pending: int, busy_seconds: float, now: Clock) -> None:
        self._engine = engine
        self._writer = engine.execution_options(will_write=True)
        # One look at the record shows one moment of it: SQLite's transactions do, PostgreSQL's when they are told to.
        sqlite = engine.dialect.name == "sqlite"
        self._reader = engine if sqlite else engine.execution_options(isolation_level="REPEATABLE READ")
        self._where = engine.url.database or "" if sqlite else postgres.shown(engine.url)
        self._pid = os.getpid()
        self._closed = False
        self._max_pending = max_pending
        self._now = now
        # SQLite has one writer at a time. Threads that queue here in order don't poll against each other there.
        self._turnstile = threading.Lock() if sqlite else None
        self._busy_seconds = busy_seconds

    @property
    def where(self) -> str:
        """The file's path, or the URL without its password."""
        return self._where

    def close(self) -> None:
        """Closes every connection; on SQLite the last one to close folds the log into the file. May be repeated."""
        self._closed = True
        self._engine.dispose()

    def _check_usable(self) -> None:
        if self._closed:
            raise StoreError(f"The store {self._where} is closed. Open it again with Store.open.")
        if os.getpid() != self._pid:
            raise StoreError(
                f"The store {self._where} was opened by process {self._pid}; connections can't cross a fork. "
                "Call Store.open in this process."
            )

    @contextmanager
    def _read(self) -> Iterator[Connection]:
        self._check_usable()
        with explained(self._where), self._reader.begin() as connection:
            yield connection

    @contextmanager
    def _write(self) -> Iterator[Connection]:
        self._check_usable()
        with self._in_turn(), explained(self._where), self._writer.begin() as connection:
            yield connection

    @contextmanager
    def _in_turn(self) -> Iterator[None]:
        if self._turnstile is None:
            yield
            return
        if not self._turnstile.acquire(timeout=2 * self._busy_seconds):  # whoever is in front may wait once itself
            raise StoreError(f"The store {self._where}: other threads kept it locked for too long. Try again.")
        try:
            yield
        finally:
            self._turnstile.release()


def parse_location(path_or_url: str | os.PathLike[str]) -> URL:
    """A URL for a URL, and SQLite's for anything else. What isn't understood isn't repeated: it may hold a password."""
    text = os.fspath(path_or_url)
    if "://" not in text:
        if text == ":memory:":
            raise StoreError(f"The store can't live in memory ({text!r}): server and trainer share it. Give a path.")
        return sqlite_url(os.path.abspath(os.path.expanduser(text)))
    scheme = text.partition("://")[0]
    try:
        url = postgres.with_driver(make_url(text))
    except (ArgumentError, ValueError) as error:  # a port that is no number
        raise StoreError(
            f"{scheme}://… is no database URL. Give a file path, sqlite:///… or "
            "postgresql://USER:PASSWORD@HOST:PORT/DATABASE."
        ) from error
    if "@" in (url.host or ""):
        raise StoreError(
            f"{scheme}://…: the user or the password holds an @, a / or a :. Write these as %40, %2F and %3A."
        )
    if url.get_backend_name() == "sqlite" and (not url.database or ":memory:" in text):
        raise StoreError(f"The store can't live in memory ({text!r}): server and trainer share it. Give a file path.")
    if url.get_backend_name() == "postgresql" and not url.database:
        raise StoreError(f"{postgres.shown(url)} names no database. End it with /NAME.")
    return url
