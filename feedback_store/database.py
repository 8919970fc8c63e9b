"""Connections and transactions: the pragmas, who may write when, and errors in words."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, make_url
from sqlalchemy.engine import URL
from sqlalchemy.exc import ArgumentError, NoSuchModuleError

from feedback_store.codec import to_json
from feedback_store.errors import StoreError, explained

Clock = Callable[[], datetime]


def utc_now() -> datetime:
    return datetime.now(UTC)


def sqlite_url(path: str) -> URL:
    return URL.create("sqlite", database=path)


def connect_to(url: URL, busy_seconds: float, *, foreign_keys: bool = True, **options: Any) -> Engine:
    """An engine for `url`. On SQLite a transaction begins when it is asked to, and one that will write
    (execution option `will_write`) takes the write lock at its start: no later step of it can then fail for a lock.
    """
    sqlite = url.get_backend_name() == "sqlite"
    try:
        engine = create_engine(
            url, json_serializer=to_json, connect_args={"timeout": busy_seconds} if sqlite else {}, **options
        )
    except (NoSuchModuleError, ImportError) as error:
        raise StoreError(
            f"The store {url}: the driver for {url.drivername!r} is missing ({error}). "
            "Install it (for PostgreSQL: pip install 'psycopg[binary]', URL postgresql+psycopg://…), or give a path."
        ) from error
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


class Database:
    """The base of the store's parts. Thread-safe; a process that forks must open the store again in the child."""

    def __init__(self, engine: Engine, *, max_pending: int, busy_seconds: float, now: Clock) -> None:
        self._engine = engine
        self._writer = engine.execution_options(will_write=True)
        self._where = engine.url.database or "" if engine.dialect.name == "sqlite" else str(engine.url)
        self._pid = os.getpid()
        self._closed = False
        self._max_pending = max_pending
        self._now = now
        # SQLite has one writer at a time. Threads that queue here in order don't poll against each other there.
        self._turnstile = threading.Lock() if engine.dialect.name == "sqlite" else None
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
        with explained(self._where), self._engine.begin() as connection:
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
    """A URL for a URL, and SQLite's for anything else."""
    text = os.fspath(path_or_url)
    try:
        url = make_url(text) if "://" in text else sqlite_url(os.path.abspath(os.path.expanduser(text)))
    except ArgumentError as error:
        raise StoreError(
            f"{text!r} is no database URL. Give a file path, sqlite:///… or postgresql+psycopg://…"
        ) from error
    if url.get_backend_name() == "sqlite" and (not url.database or ":memory:" in text):
        raise StoreError(f"The store can't live in memory ({text!r}): server and trainer share it. Give a file path.")
    return url
