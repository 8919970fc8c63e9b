"""Brings a store to this release's schema when it is opened, after copying an older file beside itself."""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from contextlib import closing
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, inspect, text
from sqlalchemy.engine import URL
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import NullPool

from feedback_store import postgres
from feedback_store.database import connect_to, utc_now
from feedback_store.errors import StoreError, explain, explained

# Alembic runs its environment through module globals: one migration at a time in a process.
_alembic = threading.Lock()


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", "feedback_store:migrations")
    return config


def revisions() -> list[str]:
    """Every revision that a store may have, the oldest first."""
    scripts = ScriptDirectory.from_config(_config())
    return [script.revision for script in scripts.walk_revisions()][::-1]


def bring_up_to_date(url: URL, busy_seconds: float, revision: str = "head") -> None:
    """Creates or upgrades the store at `url`, all or nothing, however many processes open it at once.

    A file is copied first. On PostgreSQL the transaction is what protects the record; to be able to go back to an
    earlier release, dump the database before (pg_dump).
    Raises StoreError for a file that is read-only, damaged, of another program, or of a later release.
    """
    sqlite = url.get_backend_name() == "sqlite"
    where = str(url.database) if sqlite else postgres.shown(url)
    if sqlite:
        _check_writable(Path(where))
    # Foreign keys rest during a migration: a table that is rebuilt is dropped for a moment.
    engine = connect_to(url, busy_seconds, foreign_keys=False, poolclass=NullPool)
    with explained(where), _alembic:
        scripts = ScriptDirectory.from_config(_config())
        target = scripts.get_current_head() if revision == "head" else revision
        with engine.connect() as looking:
            if not sqlite:
                postgres.check_server(looking, where)
            found = _revision(looking, scripts, where)
        if sqlite:  # only now: a file of another program is left as it is
            _use_write_ahead_log(Path(where), busy_seconds)
        if found == target:
            return
        with engine.execution_options(will_write=True).begin() as connection:
            if not sqlite:
                # Another process's migration, and this one's own statements on a large record, take their time.
                connection.execute(text("SET LOCAL lock_timeout = '10min'"))
                connection.execute(text("SET LOCAL statement_timeout = 0"))
                postgres.hold(connection, postgres.Lock.MIGRATION)
            found = _revision(connection, scripts, where)  # another process may have been first
            if found == target:
                return
            backup = _back_up(Path(where), found) if sqlite and found else None
            _upgrade(connection, revision, where, found, backup)


def _upgrade(connection: Connection, revision: str, where: str, found: str | None, backup: Path | None) -> None:
    config = _config()
    config.attributes["connection"] = connection
    try:
        command.upgrade(config, revision)
        if connection.dialect.name == "sqlite":
            broken = connection.execute(text("PRAGMA foreign_key_check")).first()
            if broken is not None:
                raise StoreError(f"The store {where}: rows of table {broken[0]!r} point to rows that don't exist.")
    except (SQLAlchemyError, StoreError) as error:
        reason = error if isinstance(error, StoreError) else explain(error, where)
        kept = f" A copy from before is {backup}." if backup else ""
        raise StoreError(f"{reason} The migration from {found or 'an empty store'} was undone.{kept}") from error


def _revision(connection: Connection, scripts: ScriptDirectory, where: str) -> str | None:
    """The store's revision, None for an empty one."""
    found = MigrationContext.configure(connection).get_current_revision()
    if found is None:
        tables = [name for name in inspect(connection).get_table_names() if name != "alembic_version"]
        if tables:
            raise StoreError(
                f"The store {where} belongs to another program: it has the tables {', '.join(sorted(tables)[:5])} "
                "and no revision of Whetstone's. Choose another path."
            )
        return None
    known = [script.revision for script in scripts.walk_revisions()]
    if found not in known:
        raise StoreError(
            f"The store {where} was written by a later release of Whetstone: it has revision {found!r}, and this one "
            f"knows up to {known[0]!r}. Upgrade Whetstone, or {_way_back(connection)}."
        )
    return found


def _way_back(connection: Connection) -> str:
    if connection.dialect.name == "sqlite":
        return "open the copy that the later release left beside it (its name ends in .bak) under another name"
    return "restore the dump that you made before that release into another database (pg_restore) and name that one"


def _check_writable(path: Path) -> None:
    folder = path.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"The store's folder {folder} can't be made ({error}). Choose another path.") from error
    if path.is_dir():
        raise StoreError(f"The store {path} is a folder. Give the path of a file.")
    for place in (path, folder) if path.exists() else (folder,):  # the log and its index lie in the folder
        if not os.access(place, os.W_OK):
            raise StoreError(
                f"The store {path}: {place} is read-only for this user. Give it write permission on the file and its "
                "folder, or choose another path."
            )


def _use_write_ahead_log(path: Path, busy_seconds: float) -> None:
    """WAL lets readers read while one writes. The file remembers it; the switch itself doesn't wait for others."""
    deadline = time.monotonic() + busy_seconds
    with closing(sqlite3.connect(path, timeout=busy_seconds)) as connection:
        while True:
            try:
                mode = connection.execute("PRAGMA journal_mode = WAL").fetchone()[0]
                break
            except sqlite3.OperationalError as error:
                if error.sqlite_errorname not in ("SQLITE_BUSY", "SQLITE_LOCKED") or time.monotonic() > deadline:
                    raise
                time.sleep(0.02)
    if mode != "wal":
        raise StoreError(
            f"The store {path}: its file system can't keep a write-ahead log (SQLite says {mode!r}). "
            "Put it on a local disk, or use PostgreSQL."
        )


def _back_up(path: Path, revision: str) -> Path:
    """A consistent copy beside the file, as it is before the migration; the caller holds the write lock."""
    target = path.with_name(f"{path.name}.revision-{revision}.{utc_now():%Y%m%dT%H%M%S%f}.bak")
    try:
        with closing(sqlite3.connect(path)) as source, closing(sqlite3.connect(target)) as copy:
            state = source.execute("PRAGMA quick_check(1)").fetchone()[0]
            if state != "ok":
                raise StoreError(
                    f"The store {path} is damaged ({state}), so it wasn't migrated. Restore a backup, or save what is "
                    "readable with: sqlite3 FILE .recover"
                )
            source.backup(copy)
    except (sqlite3.Error, StoreError) as error:
        target.unlink(missing_ok=True)
        if isinstance(error, StoreError):
            raise
        raise StoreError(f"The backup {target} before the migration failed: {error}. Free some space there.") from error
    return target
