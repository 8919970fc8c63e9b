"""The backend "container": each program in a container of a Docker Engine or of Podman, by choice under gVisor.

What it adds to bubblewrap: the engine's limits on memory, processes and processor for all that a program starts; a
user, an image and a system of its own; with `runtime="runsc"` (gVisor) or a virtual machine's ("kata") a kernel of its
own, so that a hole in the host's isn't in reach.

Covered, by the engine: no network, a read-only root, /tmp and /mnt/data in memory with sizes, no capability, no new
privileges, uid 65534, none of the server's environment, nothing of the host mounted, memory with swap, processes and
CPU by cgroup, open files and file size, no log of the output on the host's disk. Covered by the server's end: wall
time, output, and the count and size of all that comes back. In the container the interpreter loads the same system
call filter as under bubblewrap (x86-64, aarch64): no processes of its own, no sockets, no namespaces.
Not covered:
- who can use the engine's socket owns the host, so the server does. A rootless engine makes less of that
- with the plain runtime (runc, crun) the host's kernel is in reach, behind the engine's system call filter
- where the engine has no cgroups (rootless without delegation) it refuses the limits, and no program is run
- threads that a program of a kept session left are stopped, not ended, between its programs
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor

from tools.python.backend import File, Limits, PythonResult, SandboxUnavailable
from tools.python.container_engine import Engine, Shape
from tools.python.container_interpreter import Interpreter, NotStarted

_log = logging.getLogger(__name__)
_DEFAULT = Limits()
_REST_S = 10.0  # after a failure to start one ahead of time; programs try for themselves meanwhile
_STARTING = 2  # containers that are started at once, off the request path


class _Job:
    """One call. `stop` may come from any thread, before, while or after it runs."""

    def __init__(self, code: bytes, files: Sequence[File], session: str | None) -> None:
        self.code, self.files, self.session = code, files, session
        self.answer: Future[PythonResult] = Future()
        self._lock = threading.Lock()
        self._interpreter: Interpreter | None = None
        self.stopped = False

    def runs_on(self, interpreter: Interpreter | None) -> None:
        with self._lock:
            self._interpreter = interpreter
            if self.stopped and interpreter is not None:
                interpreter.hang_up()

    def stop(self) -> None:
        """End its program; whoever still waits for it is told so."""
        with self._lock:
            self.stopped = True
            if self._interpreter is not None:
                self._interpreter.hang_up()
        with contextlib.suppress(InvalidStateError):  # it has its answer already, or nobody waits for one
            self.answer.set_exception(SandboxUnavailable("The sandbox was closed before the program's end."))


class ContainerBackend:
    """Runs programs in containers, a few of which wait started.

    `pool` containers wait for the next program; `running` bounds programs under way and kept sessions together, more
    wait their turn, which isn't on their clock. A session is kept for `idle_s` after its last program, or until
    another needs its place. `packages` are imported beforehand where the image has them.
    """

    name = "container"

    def __init__(
        self,
        limits: Limits = _DEFAULT,
        *,
        image: str = "python:3.11",
        runtime: str | None = None,
        packages: Sequence[str] = (),
        pool: int = 4,
        running: int = 16,
        idle_s: float = 600.0,
        cpus: float = 1.0,
        url: str | None = None,
    ) -> None:
        self.limits, self._packages = limits, tuple(packages)
        self._pool, self._running, self._idle_s = pool, running, idle_s
        self._engine = Engine(Shape(image=image, runtime=runtime, cpus=cpus, url=url), limits)
        self._lock = threading.Lock()
        self._workers: ThreadPoolExecutor | None = None  # as many threads as programs may run
        self._starters: ThreadPoolExecutor | None = None
        self._ended = threading.Event()
        self._warm: deque[Interpreter] = deque()
        self._starting = 0
        self._rest_until = 0.0
        self._kept: OrderedDict[str, Interpreter] = OrderedDict()  # the longest idle first
        self._busy: dict[str, deque[_Job]] = {}  # sessions at work, and who waits for each
        self._jobs: set[_Job] = set()
        self._active = 0

    @property
    def state(self) -> str:
        shape = self._engine.shape
        return f"containers of {shape.image}, runtime {shape.runtime or 'the default of the engine'}."

    async def run(self, code: str, files: Sequence[File] = (), session: str | None = None) -> PythonResult:
        """As `PythonBackend.run`."""
        source = code.encode("utf-8", "replace")
        if len(source) > self.limits.code_bytes:
            text = f"The program is {len(source)} bytes long; at most {self.limits.code_bytes} are run."
            return PythonResult(text, exit_code=1, timed_out=False, truncated=False, seconds=0.0)
        job = _Job(source, files, session)
        self._submit(job)
        try:
            return await asyncio.wrap_future(job.answer)
        except asyncio.CancelledError:
            job.stop()
            raise

    async def check(self) -> None:
        """Run a trivial program. Raises SandboxUnavailable."""
        result = await self.run("print('ready')")
        if result.text != "ready\n":
            raise SandboxUnavailable(
                f"A container started, but its Python fails: {result.text.strip() or f'exit code {result.exit_code}'}."
            )

    def close(self) -> None:
        """End every container, also those at work. Blocks until the engine has removed them."""
        with self._lock:
            workers, starters, ended = self._workers, self._starters, self._ended
            self._workers = self._starters = None
            self._ended = threading.Event()
            jobs = list(self._jobs)
            self._jobs.clear()
            self._busy.clear()
            ended.set()
        for job in jobs:
            job.stop()
        for threads in (workers, starters):
            if threads is not None:
                threads.shutdown(wait=True, cancel_futures=True)
        with self._lock:
            idle = [*self._warm, *self._kept.values()]
            self._warm.clear()
            self._kept.clear()
        if idle:
            with ThreadPoolExecutor(min(len(idle), 8)) as threads:
                list(threads.map(Interpreter.end, idle))
        self._engine.close()

    # -- who runs when

    def _submit(self, job: _Job) -> None:
        with self._lock:
            self._open()
            self._jobs.add(job)
            if job.session is not None:
                if job.session in self._busy:  # one program at a time, and no thread waits for it meanwhile
                    self._busy[job.session].append(job)
                    return
                self._busy[job.session] = deque()
            assert self._workers is not None
            self._workers.submit(self._work, job)

    def _open(self) -> None:
        if self._workers is None:
            self._workers = ThreadPoolExecutor(self._running, "container")
            self._starters = ThreadPoolExecutor(_STARTING, "container-start")
            threading.Thread(target=self._expire, args=(self._ended,), name="container-idle", daemon=True).start()
            self._starters.submit(self._sweep)
            self._refill()

    def _work(self, job: _Job) -> None:
        with self._lock:
            self._active += 1
        ends: list[Callable[[], None]] = []
        try:
            if not job.stopped:
                with contextlib.suppress(InvalidStateError):  # stopped meanwhile
                    try:
                        job.answer.set_result(self._serve(job, ends))
                    except Exception as error:
                        job.answer.set_exception(error)
        finally:
            with self._lock:
                self._active -= 1
                self._jobs.discard(job)
                self._next(job.session)
            for end in ends:  # the caller has its answer, and the thread its place until the container is gone
                end()

    def _next(self, session: str | None) -> None:
        if session is None or session not in self._busy:
            return
        if self._busy[session] and self._workers is not None:
            self._workers.submit(self._work, self._busy[session].popleft())
        else:
            del self._busy[session]

    def _serve(self, job: _Job, ends: list[Callable[[], None]]) -> PythonResult:
        """Run the job's program, on another container if the first has gone while it waited."""
        ended = self._ended
        last = job.session is None
        for attempt in (1, 2):
            interpreter = self._take(job.session, ends, fresh=attempt == 2)
            job.runs_on(interpreter)
            try:
                result = interpreter.run(job.code, job.files, last=last)
            except NotStarted as error:
                interpreter.alive = False
                if job.stopped or attempt == 2:
                    raise SandboxUnavailable(
                        "The container engine ends containers before their program begins: see its log, and whether "
                        "the machine has memory left."
                    ) from error
                continue
            finally:
                job.runs_on(None)
                keep = interpreter.alive and job.session is not None and not (job.stopped or ended.is_set())
                if not keep:
                    ends.append(interpreter.end)
            if keep and job.session is not None:
                with self._lock:
                    self._kept[job.session] = interpreter
            return result
        raise AssertionError("the second attempt returns or raises")

    def _take(self, session: str | None, ends: list[Callable[[], None]], *, fresh: bool) -> Interpreter:
        """The session's own interpreter, a warm one, or a new one."""
        with self._lock:
            if session is not None and (own := self._kept.pop(session, None)) is not None:
                return own
            while self._kept and len(self._kept) + self._active > self._running:
                ends.append(self._kept.popitem(last=False)[1].end)
            warm = self._warm.popleft() if self._warm and not fresh else None
            self._refill()
        return warm or Interpreter(self._engine, self.limits, self._packages)

    # -- containers that wait

    def _refill(self) -> None:
        if time.monotonic() < self._rest_until:
            return
        while self._starters is not None and len(self._warm) + self._starting < self._pool:
            self._starting += 1
            self._starters.submit(self._start, self._ended)

    def _start(self, ended: threading.Event) -> None:
        interpreter = None
        try:
            if not ended.is_set() and time.monotonic() >= self._rest_until:
                interpreter = Interpreter(self._engine, self.limits, self._packages)
        except SandboxUnavailable as error:
            self._rest_until = time.monotonic() + _REST_S
            _log.warning("No container could be started ahead of time: %s", error)
        finally:
            with self._lock:
                self._starting -= 1
                if interpreter is not None and not ended.is_set():
                    self._warm.append(interpreter)
                    interpreter = None
            if interpreter is not None:
                interpreter.end()

    def _sweep(self) -> None:
        with contextlib.suppress(SandboxUnavailable):  # the first program will say the same, aloud
            if removed := self._engine.sweep():
                _log.info("Removed %d containers that an earlier server left", removed)

    def _expire(self, ended: threading.Event) -> None:
        """End sessions that nobody has used for a while."""
        while not ended.wait(min(self._idle_s / 2, 30.0)):
            with self._lock:
                limit = time.monotonic() - self._idle_s
                old = [session for session, kept in self._kept.items() if kept.used_at < limit]
                gone = [self._kept.pop(session) for session in old]
            for interpreter in gone:
                interpreter.end()
