"""Interpreters that wait, started, for the next program; the refilling and the clearing away happen in a thread."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from tools.python.backend import SandboxUnavailable
from tools.python.interpreter import Cancelled, Interpreter, Job
from tools.python.spawn import Spawner, SpawnFailed, SpawnRefused

log = logging.getLogger(__name__)
_REST_S = 1.0  # after a failure, before the next try
_POLL_S = 0.05
_AT_ONCE = 4  # interpreters in the making
WAY_OUT = (
    "Install bubblewrap 0.8 or newer (apt install bubblewrap, dnf install bubblewrap) and allow user namespaces, "
    "or accept the risk with the option unsafe_without_sandbox."
)


class WarmPool:
    """`take` an interpreter, `discard` it when it has served. Both may be called from any thread.

    At most `idle` interpreters wait. The first of `spawners` that can start one is used from then on; a spawner that
    worked and fails is started anew. `chore` is called in the pool's thread, about every `chore_s` seconds.
    """

    def __init__(
        self,
        spawners: Sequence[Spawner],
        idle: int,
        why_not: str = "",
        on_start: Callable[[int], None] | None = None,
        chore: Callable[[], None] = lambda: None,
        chore_s: float = 60.0,
    ) -> None:
        self._spawners = list(spawners)
        self._target = idle
        self._why_not = why_not
        self._on_start = on_start
        self._chore, self._chore_s = chore, chore_s
        self._changed = threading.Condition()
        self._idle: deque[Interpreter] = deque()
        self._dead: list[Interpreter] = []
        self._waiting = 0
        self._failure: str | None = None
        self._failed_at = 0.0
        self._chosen: Spawner | None = None
        self._closed = False
        self._thread: threading.Thread | None = None

    @property
    def mode(self) -> str | None:
        """How interpreters are started, or None before the first."""
        chosen = self._chosen
        return chosen.mode if chosen else None

    @property
    def idle(self) -> int:
        return len(self._idle)

    def warm(self) -> None:
        """Begin to fill the pool, without waiting for it."""
        with self._changed:
            self._ensure_thread()

    def take(self, job: Job) -> Interpreter:
        """An interpreter that has run nothing yet. Raises SandboxUnavailable, and Cancelled when the job is."""
        began = time.monotonic()
        with self._changed:
            self._ensure_thread()
            self._waiting += 1
            self._changed.notify_all()
            try:
                while True:
                    while self._idle:
                        interpreter = self._idle.popleft()
                        if interpreter.fit():
                            return interpreter
                        self._dead.append(interpreter)  # the zygote was killed, and all its children with it
                    if self._failure is not None and self._failed_at >= began:
                        raise SandboxUnavailable(self._failure)
                    if self._closed:
                        raise SandboxUnavailable("The Python sandbox has been closed.")
                    if job.cancelled:
                        raise Cancelled
                    self._changed.notify_all()
                    self._changed.wait(_POLL_S)
            finally:
                self._waiting -= 1
                self._trim()
                self._changed.notify_all()

    def discard(self, interpreter: Interpreter) -> None:
        interpreter.kill()
        with self._changed:
            self._dead.append(interpreter)
            self._changed.notify_all()
            if self._thread is None:  # closed meanwhile
                self._bury()

    def close(self) -> None:
        """End all that wait. What is taken is ended by who took it; a later `take` starts anew."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            thread = self._thread
        if thread is not None:
            thread.join(30)

    def _ensure_thread(self) -> None:
        if self._thread is None:
            self._closed = False
            self._thread = threading.Thread(target=self._keep, name="sandbox pool", daemon=True)
            self._thread.start()

    def _keep(self) -> None:
        tidied = time.monotonic()
        while True:
            with self._changed:
                while not (self._closed or self._dead or self._missing() > 0):
                    left = tidied + self._chore_s - time.monotonic()
                    if left <= 0:
                        break
                    self._changed.wait(left if self._failure is None else min(left, _REST_S))
                if self._closed:
                    break
                dead, self._dead = self._dead, []
                more = min(self._missing(), _AT_ONCE)
            if more > 0:
                self._add(more)
            for interpreter in dead:  # after what somebody may be waiting for
                interpreter.close()
            if time.monotonic() >= tidied + self._chore_s:
                self._chore()
                tidied = time.monotonic()
        with self._changed:
            self._dead += self._idle
            self._idle.clear()
            self._bury()
            if self._chosen is not None:
                self._chosen.stop()
            self._chosen = None
            self._thread = None
            self._changed.notify_all()

    def _missing(self) -> int:
        """How many interpreters are to be started now."""
        if self._failure is not None and time.monotonic() < self._failed_at + _REST_S:
            return 0
        if self._failure is not None and not self._waiting:
            return 0  # it's tried again when somebody asks
        return self._target + self._waiting - len(self._idle)

    def _trim(self) -> None:
        """Let those go that were made for somebody who has left."""
        while self._idle and self._missing() < 0:
            self._dead.append(self._idle.pop())

    def _bury(self) -> None:
        while self._dead:
            self._dead.pop().close()

    def _add(self, count: int) -> None:
        try:
            made = self._spawn(count)
        except (SpawnFailed, OSError) as error:  # an OSError is our own: no descriptors left, no room for a file
            log.warning("%s", error)
            with self._changed:
                self._failure = f"The Python sandbox doesn't work here: {error}. {WAY_OUT}"
                self._failed_at = time.monotonic()
                self._changed.notify_all()
            return
        with self._changed:
            self._failure = None
            self._idle += made
            self._trim()
            self._changed.notify_all()

    def _spawn(self, count: int) -> list[Interpreter]:
        if self._chosen is not None:
            try:
                return self._chosen.spawn(count)
            except SpawnRefused:
                raise
            except SpawnFailed as error:
                log.warning("the sandbox is started again: %s", error)
            try:
                return self._start(self._chosen)
            except SpawnRefused:
                raise
            except SpawnFailed as error:  # it may have been killed while it started, by a machine out of memory
                log.warning("the sandbox is started again: %s", error)
                return self._start(self._chosen)
        said = [self._why_not] if self._why_not else []
        for spawner in self._spawners:
            try:
                made = self._start(spawner)
            except SpawnFailed as error:
                said.append(str(error))
                spawner.stop()
                continue
            if said:
                log.warning("the sandbox is in the mode %r: %s", spawner.mode, "; ".join(said))
            self._chosen = spawner
            return made
        raise SpawnFailed("; ".join(said))

    def _start(self, spawner: Spawner) -> list[Interpreter]:
        process = spawner.start()
        if process is not None and self._on_start is not None:
            self._on_start(process)
        return spawner.spawn(1)
