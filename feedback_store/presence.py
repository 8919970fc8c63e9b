"""Which processes live, as far as other machines can tell: each that serves or trains says so every few seconds."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta

from sqlalchemy import ColumnElement, Connection, and_, delete, insert, select, update

from feedback_store.database import Database
from feedback_store.errors import StoreError
from feedback_store.processes import Process, is_alive, this_process
from feedback_store.schema import processes

log = logging.getLogger(__name__)

BEAT_S = 15.0
SILENT_S = 60.0  # after which a process of another machine counts as gone; more than clocks may differ
_FORGOTTEN = timedelta(days=7)


def lives(connection: Connection, process: Process, now: datetime) -> bool | None:
    """Whether a process still runs: by the process table on its own machine, elsewhere by what it last said.

    None when it can't be told: it never said anything, or another release wrote its row.
    """
    here = is_alive(process)
    if here is not None:
        return here
    until = connection.execute(select(processes.c.alive_until).where(_is(process))).scalar()
    return None if until is None else until > now


def _is(process: Process) -> ColumnElement[bool]:
    c = processes.c
    return and_(c.host == process.host, c.pid == process.pid, c.process_started == process.started)


class Presence(Database):
    def beat(self, seconds: float = SILENT_S) -> None:
        """Says that this process lives, and will for some seconds."""
        me, now = this_process(), self._now()
        until = now + timedelta(seconds=seconds)
        with self._write() as connection:
            if not connection.execute(update(processes).where(_is(me)).values(alive_until=until)).rowcount:
                row = {"host": me.host, "pid": me.pid, "process_started": me.started, "alive_until": until}
                connection.execute(insert(processes).values(row))
                connection.execute(delete(processes).where(processes.c.alive_until < now - _FORGOTTEN))

    def leave(self) -> None:
        """Says that this process is done: what it left open can be closed at once."""
        with self._write() as connection:
            connection.execute(update(processes).where(_is(this_process())).values(alive_until=self._now()))

    @contextmanager
    def present(self, each_time: Callable[[], object] = lambda: None, every: float = BEAT_S) -> Iterator[None]:
        """Beats until the block ends, in a thread, and calls `each_time` with it. A store that can't be reached is
        logged and tried again: the process goes on, and others may think meanwhile that it is gone.
        """
        ended = threading.Event()

        def beat() -> None:
            while not ended.wait(every):
                try:
                    self.beat(max(SILENT_S, 4 * every))
                    each_time()
                except StoreError as error:
                    log.warning("can't tell the store that this process lives: %s", error)

        self.beat(max(SILENT_S, 4 * every))
        thread = threading.Thread(target=beat, name="presence", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            try:
                self.leave()
            except StoreError as error:
                log.warning("can't tell the store that this process ends: %s", error)
