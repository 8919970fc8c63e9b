"""Runs of the online loop: their stages as a journal, the tasks they used, and which versions came of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from typing import Any, get_args

from sqlalchemy import Connection, Row, insert, select, update

from feedback_store.database import Database
from feedback_store.errors import InvalidRecord, NotFound, RunUnderWay, explained
from feedback_store.ids import new_id
from feedback_store.postgres import Lock, try_hold_session
from feedback_store.presence import lives
from feedback_store.processes import Process, this_process
from feedback_store.queue import give_up_claims
from feedback_store.records import FinalRunStatus, Lineage, Run, RunStage, RunTask
from feedback_store.schema import run_stages, run_tasks, runs, task_origins, tasks, turns, versions
from feedback_store.uses import trained_on
from feedback_store.withdrawal import chunks


def _run(connection: Connection, row: Row[Any], stages: list[RunStage], now: datetime) -> Run:
    running = row.status == "running"
    return Run(
        id=row.id,
        recipe=row.recipe,
        status=row.status,
        stage=row.stage,
        detail=row.detail,
        report=row.report,
        alive=lives(connection, Process(row.host, row.pid, row.process_started), now) if running else None,
        started_at=row.started_at,
        finished_at=row.finished_at,
        stages=stages,
    )


def _check_running(connection: Connection, run_id: str) -> None:
    status = connection.execute(select(runs.c.status).where(runs.c.id == run_id).with_for_update()).scalar()
    if status is None:
        raise NotFound("run", run_id)
    if status != "running":
        raise InvalidRecord(f"Run {run_id} is finished ({status}); start a new run.")


class Runs(Database):
    def start_run(self, recipe: str, detail: Mapping[str, Any]) -> str:
        run_id, now, me = new_id("run"), self._now(), this_process()
        with self._write() as connection:
            connection.execute(
                insert(runs).values(
                    id=run_id,
                    recipe=recipe,
                    status="running",
                    stage="",
                    detail=dict(detail),
                    report={},
                    host=me.host,
                    pid=me.pid,
                    process_started=me.started,
                    started_at=now,
                )
            )
        return run_id

    def set_stage(self, run_id: str, stage: str, detail: Mapping[str, Any]) -> None:
        """Adds to the run's journal. The process that does so is from then on the run's: a resumed run is alive."""
        now, me = self._now(), this_process()
        with self._write() as connection:
            _check_running(connection, run_id)
            connection.execute(insert(run_stages).values(run_id=run_id, stage=stage, detail=dict(detail), at=now))
            connection.execute(
                update(runs)
                .where(runs.c.id == run_id)
                .values(stage=stage, host=me.host, pid=me.pid, process_started=me.started)
            )

    def add_note(self, run_id: str, stage: str, detail: Mapping[str, Any]) -> None:
        """Adds to the journal of a run, a finished one too, what became of its version."""
        with self._write() as connection:
            if connection.execute(select(runs.c.id).where(runs.c.id == run_id)).first() is None:
                raise NotFound("run", run_id)
            connection.execute(
                insert(run_stages).values(run_id=run_id, stage=stage, detail=dict(detail), at=self._now())
            )

    def finish_run(self, run_id: str, status: FinalRunStatus, report: Mapping[str, Any]) -> None:
        """Ends the run and puts the tasks that it still holds back; a failed run counts as a failed attempt of each."""
        if status not in get_args(FinalRunStatus):
            raise InvalidRecord(f"A run can't end as {status!r}; give one of {', '.join(get_args(FinalRunStatus))}.")
        now = self._now()
        with self._write() as connection:
            _check_running(connection, run_id)
            held = tasks.c.run_id == run_id
            give_up_claims(connection, held, failed=status == "failed", claim_state="released", now=now)
            connection.execute(
                update(runs).where(runs.c.id == run_id).values(status=status, report=dict(report), finished_at=now)
            )

    def run(self, run_id: str) -> Run:
        """The run with its journal."""
        with self._read() as connection:
            row = connection.execute(select(runs).where(runs.c.id == run_id)).first()
            if row is None:
                raise NotFound("run", run_id)
            journal = connection.execute(
                select(run_stages).where(run_stages.c.run_id == run_id).order_by(run_stages.c.id)
            )
            stages = [RunStage(entry.stage, entry.detail, entry.at) for entry in journal]
            return _run(connection, row, stages, self._now())

    def runs(self, limit: int = 50) -> list[Run]:
        """Without their journals, the newest first."""
        with self._read() as connection:
            rows = connection.execute(select(runs).order_by(runs.c.id.desc()).limit(limit)).all()
            return [_run(connection, row, [], self._now()) for row in rows]

    @contextmanager
    def only_run(self) -> Iterator[None]:
        """The right to train on this store, which one process has at a time, whatever machine it is on.

        Raises RunUnderWay. On PostgreSQL a lock of a session of its own says so, which ends with the process; where
        that session was lost and the run goes on, its process's word that it lives does.
        """
        self._check_usable()
        if self._engine.dialect.name == "sqlite":  # its file has one home, where a run locks a file
            self._refuse_beside_another()
            yield
            return
        with explained(self._where):
            connection = self._engine.connect().execution_options(isolation_level="AUTOCOMMIT")
        try:
            with explained(self._where):
                mine = try_hold_session(connection, Lock.TRAINING)
            if not mine:
                raise RunUnderWay(f"Another process trains on the store {self._where}. `whetstone runs` shows its run.")
            self._refuse_beside_another()
            yield
        finally:
            connection.invalidate()  # ends the session, and the lock with it, even where the server is gone
            connection.close()

    def _refuse_beside_another(self) -> None:
        me = this_process()
        with self._read() as connection:
            for row in connection.execute(select(runs).where(runs.c.status == "running")).all():
                its = Process(row.host, row.pid, row.process_started)
                if its != me and lives(connection, its, self._now()):
                    host = row.host.partition("/")[0]
                    raise RunUnderWay(f"Run {row.id} is under way in process {row.pid} on {host}.")

    def run_tasks(self, run_id: str) -> list[RunTask]:
        """Every claim that the run made and what became of it, in order."""
        with self._read() as connection:
            if connection.execute(select(runs.c.id).where(runs.c.id == run_id)).first() is None:
                raise NotFound("run", run_id)
            rows = connection.execute(select(run_tasks).where(run_tasks.c.run_id == run_id).order_by(run_tasks.c.id))
            return [RunTask(row.task_id, row.state, row.claimed_at, row.ended_at) for row in rows]

    def lineage(self, version_id: str) -> Lineage:
        """The run that made a version, the tasks that it was trained on, and the conversations they came from."""
        with self._read() as connection:
            row = connection.execute(
                select(versions.c.parent, versions.c.run_id).where(versions.c.id == version_id)
            ).first()
            if row is None:
                raise NotFound("version", version_id)
            used = trained_on(connection, row.run_id) if row.run_id else []
            found: set[str] = set()
            for some in chunks(used):
                its = select(turns.c.conversation_id).join(task_origins, task_origins.c.turn_id == turns.c.id)
                found.update(connection.execute(its.where(task_origins.c.task_id.in_(some))).scalars())
            return Lineage(
                version=version_id,
                parent=row.parent,
                run=row.run_id,
                task_ids=used,
                conversation_ids=sorted(found),
            )
