"""After an erasure: what is to be removed outside the record, and what a database leaves behind in its own file."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass

from sqlalchemy import delete, select, text, update
from sqlalchemy.pool import PoolProxiedConnection

from feedback_store.database import Database
from feedback_store.errors import explained
from feedback_store.schema import erased_results, erased_uses, tombstones, versions
from feedback_store.withdrawal import chunks

_TABLES = (
    "turns, steps, tool_results, outcomes, tasks, task_origins, questions, quarantines, audit, consents, "
    "conversations, search_texts, runs, run_stages, erased_results"
)
_WAIT_MS = 2000  # for readers of the log; writers wait meanwhile


@dataclass(frozen=True)
class RunCopies:
    """A run's folder holds the text of these tasks. Without a version of its own it may go as a whole."""

    run_id: str
    task_ids: list[str]
    has_version: bool


@dataclass(frozen=True)
class Unswept:
    """`results`: hashes of tools' results, of which any run's folder may hold a copy."""

    conversations: list[str]
    runs: list[RunCopies]
    results: list[str]

    def __bool__(self) -> bool:
        return bool(self.conversations or self.runs or self.results)


class Sweep(Database):
    def unswept(self) -> Unswept:
        """What was erased may still have this outside of the record."""
        with self._read() as connection:
            left = select(tombstones.c.conversation_id).where(tombstones.c.swept_at.is_(None))
            by_run: dict[str, list[str]] = {}
            its = erased_uses.c.swept_at.is_(None)
            uses = (
                select(erased_uses.c.run_id, erased_uses.c.task_id).where(its).distinct().order_by(erased_uses.c.run_id)
            )
            for run_id, task_id in connection.execute(uses):
                by_run.setdefault(run_id, []).append(task_id)
            made = set(
                connection.execute(select(versions.c.run_id).where(versions.c.run_id.in_(list(by_run)))).scalars()
            )
            return Unswept(
                list(connection.execute(left.order_by(tombstones.c.conversation_id)).scalars()),
                [RunCopies(run_id, tasks, run_id in made) for run_id, tasks in by_run.items()],
                list(connection.execute(select(erased_results.c.hash).order_by(erased_results.c.hash)).scalars()),
            )

    def sweep_database(self, vacuum: bool) -> bool:
        """Removes what was deleted from the database's own leftovers: the search index, and the log of SQLite.

        `vacuum` rewrites the whole file, too, which takes as much free disk and blocks writers for as long as that
        takes: pages that were moved before may hold old rows. False: a reader keeps the log in use; call again.
        On PostgreSQL `vacuum` rewrites the tables; its own log and its replicas keep what they keep.
        """
        self._check_usable()
        if self._engine.dialect.name != "sqlite":
            with explained(self._where), self._engine.execution_options(isolation_level="AUTOCOMMIT").connect() as it:
                it.execute(text("SET statement_timeout = 0"))  # a large table takes as long as it takes
                try:
                    it.execute(text(f"VACUUM {'FULL ' if vacuum else ''}{_TABLES}"))
                finally:
                    it.execute(text("RESET statement_timeout"))
            return True
        with self._in_turn(), explained(self._where), closing(self._engine.raw_connection()) as connection:
            return _sweep_sqlite(connection, vacuum, round(self._busy_seconds * 1000))

    def mark_swept(self, done: Unswept) -> None:
        """`done`, as `unswept` gave it, is gone outside of the record, too."""
        now = self._now()
        with self._write() as connection:
            for some in chunks(done.conversations):
                its = tombstones.c.conversation_id.in_(some)
                connection.execute(update(tombstones).where(its).values(swept_at=now))
            for run in done.runs:
                for some in chunks(run.task_ids):
                    used = (erased_uses.c.run_id == run.run_id, erased_uses.c.task_id.in_(some))
                    connection.execute(update(erased_uses).where(*used).values(swept_at=now))
            for some in chunks(done.results):
                connection.execute(delete(erased_results).where(erased_results.c.hash.in_(some)))


def _sweep_sqlite(pooled: PoolProxiedConnection, vacuum: bool, wait_ms: int) -> bool:
    cursor = pooled.cursor()
    try:
        cursor.execute("PRAGMA secure_delete = ON")
        cursor.execute("INSERT INTO search_index (search_index) VALUES ('optimize')")  # drops what deleted rows left
        if vacuum:
            cursor.execute("VACUUM")
        cursor.execute(f"PRAGMA busy_timeout = {_WAIT_MS}")
        cursor.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        row = cursor.fetchone()
        assert row is not None, "SQLite answers this pragma with one row"
        busy: int = row[0]
        cursor.execute(f"PRAGMA busy_timeout = {wait_ms}")
        return not busy
    finally:
        cursor.close()
