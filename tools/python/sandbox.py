"""The backend "bubblewrap": `await Bubblewrap().run("2 + 2")`.

Covered, by bubblewrap and by namespaces, a system call filter and limits of each interpreter's own:
- files: a view with the interpreter's library, the chosen packages and the system's shared libraries, read-only; a
  private /tmp and a private working folder /mnt/data, both in memory and of limited size; no /etc, no home, no /proc,
  no repository, no environment of the server's, none of its file descriptors
- network: a network namespace without interfaces, and no sockets at all
- other processes: user, process, mount, IPC and UTS namespaces of an interpreter's own; no fork and no exec, so the
  limits of one process are the program's
- rights: no capability, no way to a new one; nobody inside, and outside too when the server is root
- time, CPU, address space, threads, open files, file size, folder size, output and results; past one, the program is
  stopped. Where the machine has cgroups that the server may use, all programs together have a bound as well
- state: an interpreter serves one program, or the programs of one conversation, and is then ended; all are gone with
  the server. Between the programs of a conversation its interpreter is stopped, with all its threads; one whose threads
  won't stop is ended after a second
Not covered:
- a hole in the kernel: this isn't a virtual machine. The filter closes the doors that such holes are found behind;
  docs/sandbox.md names backends that put more between
- without a cgroup, a share of the machine: a program may use its memory, its folders, the kernel's memory for as many
  files as they hold, and one core, at the same time as others up to `running`
- what forked processes share: interpreters of one server have the same memory layout and the same string hashes, so
  what one program learns of them holds for the next
- timing and other side channels, and locks on the files that all may read
- in a conversation that keeps its state, the CPU limit of one program: it can raise it up to the wall clock's
- in the mode "cold" (bubblewrap without nested user namespaces) interpreters share no zygote: a call starts Python and
  imports what it needs; it may execute another program, just as confined
- in a user namespace (modes "warm" and "cold"), a server that is root stays root outside, whose threads the kernel
  doesn't count: `doctor` names the mode
- `unsafe_without_sandbox` where bubblewrap doesn't work: only limits and an empty environment; it reads what you can
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from tools.python import process
from tools.python.backend import File, Limits, PythonResult, SandboxUnavailable
from tools.python.cgroup import Group, limit_group
from tools.python.interpreter import Cancelled, Interpreter, Job
from tools.python.packages import modules, top_levels
from tools.python.pool import WarmPool
from tools.python.spawn import spawners

DEFAULT_PACKAGES = ("numpy", "scipy", "sympy", "pandas", "matplotlib")
_POLL_S = 0.05


@dataclass
class _Session:
    """An interpreter that is kept for one conversation, one program at a time."""

    turn: threading.Lock = field(default_factory=threading.Lock)
    interpreter: Interpreter | None = None
    used_at: float = field(default_factory=time.monotonic)


class Bubblewrap:
    """See `PythonBackend`. At most `running` programs at once, of which the others wait, not on their clock.

    `idle`: interpreters that wait, started. `sessions`: interpreters that are kept with a conversation's state; the
    longest unused is ended for a new one, and each after `session_idle_s` seconds. `total_memory` bounds all programs
    together, in bytes, where the machine has cgroups.
    """

    name = "bubblewrap"

    def __init__(
        self,
        limits: Limits | None = None,
        packages: Sequence[str] = DEFAULT_PACKAGES,
        *,
        idle: int = 4,
        running: int = 16,
        sessions: int = 16,
        session_idle_s: float = 900.0,
        total_memory: int = 4 << 30,
        unsafe_without_sandbox: bool = False,
    ) -> None:
        self.limits = limits or Limits()
        found, why_not = spawners(self.limits, top_levels(packages), modules(packages), unsafe=unsafe_without_sandbox)
        self._pool = WarmPool(
            found, idle, why_not, on_start=self._bound, chore=self._expire, chore_s=min(session_idle_s / 2, 30.0)
        )
        self._threads = ThreadPoolExecutor(running, "python")
        self._most_sessions, self._session_idle_s = sessions, session_idle_s
        self._sessions: OrderedDict[str, _Session] = OrderedDict()
        self._lock = threading.Lock()
        self._total_memory = total_memory
        self._processes = (running + idle + sessions) * (self.limits.threads + 2)
        self._group: Group | None = None
        self._group_said = ""

    @property
    def state(self) -> str:
        return f"{self.name}, {self._pool.mode or 'not started'}. {self._group_said}".strip()

    @property
    def mode(self) -> str | None:
        """How interpreters are started here: "warm, as nobody", "warm", "cold", "without a sandbox"; None: none yet."""
        return self._pool.mode

    def warm(self) -> None:
        """Begin to start interpreters, so that the first program needn't wait."""
        self._pool.warm()

    async def run(self, code: str, files: Sequence[File] = (), session: str | None = None) -> PythonResult:
        source = code.encode("utf-8", "replace")
        if len(source) > self.limits.code_bytes:
            text = f"The program is {len(source)} bytes long; at most {self.limits.code_bytes} are run."
            return PythonResult(text, exit_code=1, timed_out=False, truncated=False, seconds=0.0)
        job = Job()
        running = self._threads.submit(self._run, source, files, session, job)
        outcome = asyncio.wrap_future(running)
        try:
            return await asyncio.shield(outcome)
        except asyncio.CancelledError:
            job.cancel()
            if not running.cancel():  # it had begun
                with contextlib.suppress(Cancelled, SandboxUnavailable):
                    await outcome
            raise

    async def check(self) -> None:
        result = await self.run("print('ready')")
        if result.text != "ready\n":
            raise SandboxUnavailable(f"The Python sandbox answers {result.text[:300]!r} to a trivial program.")

    def close(self) -> None:
        with self._lock:
            sessions = list(self._sessions.values())
            self._sessions.clear()
        for kept in sessions:
            if kept.turn.acquire(blocking=False):
                self._end(kept)
                kept.turn.release()
            elif (interpreter := kept.interpreter) is not None:
                interpreter.kill()  # who runs a program in it clears it away
        self._pool.close()
        if self._group is not None:
            self._group.close()
            self._group = None

    def _bound(self, first: int) -> None:
        """Put the processes of a zygote that has just started into one control group, where there can be one."""
        if self._group is None:
            cores = os.cpu_count() or 1
            self._group, self._group_said = limit_group(self._total_memory, self._processes, cores)
        if self._group is None:
            return
        try:
            for pid in (first, *process.descendants(first)):
                with contextlib.suppress(ProcessLookupError):
                    self._group.add(pid)
        except OSError as error:  # somebody else has removed it
            self._group, self._group_said = None, f"All sandboxes together have no bound: {error}."

    def _run(self, source: bytes, files: Sequence[File], session: str | None, job: Job) -> PythonResult:
        if job.cancelled:
            raise Cancelled
        if session is None:
            interpreter = self._pool.take(job)
            try:
                return interpreter.run(source, files, self.limits, job, last=True)
            finally:
                self._pool.discard(interpreter)
        with self._turn(session, job) as kept:
            if kept.interpreter is not None and not kept.interpreter.fit():
                self._end(kept)
            if kept.interpreter is None:
                kept.interpreter = self._pool.take(job)
            return kept.interpreter.run(source, files, self.limits, job, last=False)

    @contextlib.contextmanager
    def _turn(self, name: str, job: Job) -> Iterator[_Session]:
        while True:
            with self._lock:
                kept = self._sessions.setdefault(name, _Session())
                self._sessions.move_to_end(name)
            if kept.turn.acquire(timeout=_POLL_S):
                if self._sessions.get(name) is kept:  # it hasn't expired meanwhile
                    break
                kept.turn.release()
            if job.cancelled:
                raise Cancelled
        try:
            self._expire()
            yield kept
        finally:
            with self._lock:
                kept.used_at = time.monotonic()
                if kept.interpreter is not None and not (kept.interpreter.alive and self._sessions.get(name) is kept):
                    self._end(kept)
                kept.turn.release()

    def _expire(self) -> None:
        """End what was kept too long, and the longest unused of what is too many."""
        limit = time.monotonic() - self._session_idle_s
        with self._lock:
            excess = len(self._sessions) - self._most_sessions
            for name, kept in list(self._sessions.items()):
                if (kept.used_at < limit or excess > 0) and kept.turn.acquire(blocking=False):
                    excess -= 1
                    del self._sessions[name]
                    self._end(kept)
                    kept.turn.release()

    def _end(self, kept: _Session) -> None:
        """End a session's interpreter. For who has its turn."""
        if kept.interpreter is not None:
            self._pool.discard(kept.interpreter)
            kept.interpreter = None
