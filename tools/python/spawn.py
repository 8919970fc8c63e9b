"""Ways to start an interpreter: forked by a zygote in bubblewrap, alone in bubblewrap, or without a sandbox.

A spawner's `start` and `spawn` are called from one thread, which outlives the spawner's processes: bubblewrap ends
with the thread that started it.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

from tools.python import bubblewrap, seccomp
from tools.python.backend import Limits
from tools.python.interpreter import Interpreter, exit_code

_START_S = 60.0  # importing the libraries, on a machine that is busy training
_SPAWN_S = 20.0
_ALONE_BYTES = 768 << 20  # of address space that an interpreter which imports its libraries itself may need for them


class SpawnFailed(RuntimeError):
    """An interpreter couldn't be started. The message is what the system said."""


class SpawnRefused(SpawnFailed):
    """The same, for a reason that starting the spawner anew wouldn't mend, and would end its interpreters for."""


class Spawner(Protocol):
    @property
    def mode(self) -> str: ...

    def start(self) -> int | None:
        """Get ready, and give the process id of what outlives the interpreters, if any. Raises SpawnFailed."""
        ...

    def spawn(self, count: int) -> list[Interpreter]:
        """As many interpreters, or none. Raises SpawnFailed."""
        ...

    def stop(self) -> None: ...


class ForkServer:
    """A zygote in bubblewrap that forks each interpreter, milliseconds for one. `as_nobody` takes a root server.

    Then the sandbox is opened with root's rights and given up for nobody's before the libraries are imported;
    otherwise all happens in a user namespace, and what is nobody inside is the server's user outside.
    """

    def __init__(
        self, bwrap: str, limits: Limits, packages: Mapping[str, Path], modules: Sequence[str], *, as_nobody: bool
    ) -> None:
        self.mode = "warm, as nobody" if as_nobody else "warm"
        self._bwrap, self._limits, self._packages, self._as_nobody = bwrap, limits, packages, as_nobody
        self._settings = _settings(limits) | {
            "packages": list(modules),
            "path": [bubblewrap.PACKAGES],
            "drop_to": bubblewrap.NOBODY if as_nobody else 0,
            "devices": [f"/dev/{name}" for name in bubblewrap.DEVICES],
            "filter": base64.b64encode(seccomp.program(allow_exec=False)).decode(),
        }
        self._control: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._said: IO[bytes] | None = None

    def start(self) -> int:
        self.stop()
        ours, theirs = socket.socketpair()
        self._control, self._said = ours, tempfile.TemporaryFile()  # noqa: SIM115 (open as long as the process)
        command = bubblewrap.wrap(
            self._bwrap, self._packages, user_namespace=not self._as_nobody, proc=True,
            limits=self._limits, filter_fd=None,
        )  # fmt: skip
        command += [*bubblewrap.start("/python/whetstone"), "fork", str(theirs.fileno()), json.dumps(self._settings)]
        with theirs:
            self._process = _popen(command, (theirs.fileno(),), self._said)
        if not _ready(ours, _START_S):
            raise SpawnFailed(self._last_words("didn't start"))
        return self._process.pid

    def spawn(self, count: int) -> list[Interpreter]:
        """They are made side by side: while one settles, the zygote forks the next."""
        begun: list[tuple[socket.socket, socket.socket, int]] = []
        made: list[Interpreter] = []
        try:
            while len(begun) < count:
                begun.append(self._begin())
            while begun:
                made.append(self._finish(*begun.pop(0)))
        except BaseException:
            for control, status, output in begun:
                control.close()
                status.close()
                os.close(output)
            for interpreter in made:
                interpreter.close()
            raise
        return made

    def _begin(self) -> tuple[socket.socket, socket.socket, int]:
        """Ask for an interpreter: its channel, what tells of its end, and its output."""
        if self._control is None:
            raise SpawnFailed("the zygote isn't started")
        control, their_control = socket.socketpair()
        status, their_status = socket.socketpair()
        output, their_output = os.pipe()
        try:
            with their_control, their_status:
                socket.send_fds(self._control, [b"f"], [their_control.fileno(), their_output, their_status.fileno()])
        except OSError as error:
            control.close()
            status.close()
            os.close(output)
            raise SpawnFailed(self._last_words(f"died ({error})")) from error
        finally:
            os.close(their_output)
        return control, status, output

    def _finish(self, control: socket.socket, status: socket.socket, output: int) -> Interpreter:
        try:
            handle, rest = _handle(status, self._last_words)
            if not _ready(control, _SPAWN_S):
                os.close(handle)
                said = _tail_of_pipe(output) or (rest + _rest_of(status)).lstrip(b"!").decode("utf-8", "replace")
                if not said:  # it was killed, maybe together with the zygote
                    raise SpawnFailed("an interpreter ended at once, and said nothing")
                raise SpawnRefused(f"an interpreter ended at once: {said}")
        except BaseException:
            control.close()
            status.close()
            os.close(output)
            raise

        def kill() -> None:
            with contextlib.suppress(ProcessLookupError, OSError):
                signal.pidfd_send_signal(handle, signal.SIGKILL)

        def wait(seconds: float) -> int:
            """128 + SIGKILL when the supervisor was killed with it."""
            said = rest + _rest_of(status, seconds)
            number = said.strip().split(b"\n")[0]
            return exit_code(int(number)) if number.isdigit() else 128 + signal.SIGKILL

        def hold(stopped: bool) -> None:
            with contextlib.suppress(OSError):
                status.send(b"s" if stopped else b"c")

        def close() -> None:
            os.close(handle)
            status.close()

        return Interpreter(control, output, kill, wait, close, hold)

    def stop(self) -> None:
        if self._control is not None:
            self._control.close()
            self._control = None
        if self._process is not None:
            _end(self._process)
            self._process = None
        if self._said is not None:
            self._said.close()
            self._said = None

    def _last_words(self, what: str) -> str:
        said = b""
        if self._said is not None:
            self._said.seek(0)
            said = self._said.read()[-600:]
        return f"{self._bwrap} with the Python zygote {what}: {said.decode('utf-8', 'replace').strip() or 'no message'}"


class Alone:
    """Each interpreter is a bubblewrap of its own, or with `bwrap` None a plain process; no libraries are ready."""

    def __init__(self, bwrap: str | None, limits: Limits, packages: Mapping[str, Path]) -> None:
        self.mode = "cold" if bwrap else "without a sandbox"
        self._bwrap, self._limits, self._packages = bwrap, limits, packages

    def start(self) -> None:
        return None

    def spawn(self, count: int) -> list[Interpreter]:
        made: list[Interpreter] = []
        try:
            while len(made) < count:
                made.append(self._spawn())
        except BaseException:
            for interpreter in made:
                interpreter.close()
            raise
        return made

    def _spawn(self) -> Interpreter:
        control, theirs = socket.socketpair()
        output, their_output = os.pipe()
        settings = _settings(self._limits) | {"output": their_output}
        settings["memory"] += _ALONE_BYTES
        with contextlib.ExitStack() as failed, contextlib.ExitStack() as stack:
            failed.callback(os.close, output)
            failed.callback(control.close)
            stack.callback(os.close, their_output)
            stack.enter_context(theirs)
            descriptors = [theirs.fileno(), their_output]
            cwd, own = "/", failed.enter_context(contextlib.ExitStack())
            if self._bwrap is None:
                folder = tempfile.TemporaryDirectory(prefix="whetstone-", ignore_cleanup_errors=True)
                own.callback(folder.cleanup)
                cwd = folder.name
                command, inside = bubblewrap.unwrapped()
                parents = {str(path.parent) for path in self._packages.values()}
                settings |= {"threads": 0, "folder": cwd, "path": sorted(parents)}
            else:
                filter_fd = stack.enter_context(_descriptor(seccomp.program()))
                descriptors.append(filter_fd)
                command = bubblewrap.wrap(
                    self._bwrap, self._packages, user_namespace=True, proc=False,
                    limits=self._limits, filter_fd=filter_fd,
                )  # fmt: skip
                inside = "/python/whetstone"
                settings["path"] = [bubblewrap.PACKAGES]
            command += [*bubblewrap.start(inside), "single", str(theirs.fileno()), json.dumps(settings)]
            process = _popen(command, descriptors, their_output, cwd=cwd)
            stack.close()
            if not _ready(control, _SPAWN_S):
                _end(process)
                said = _tail_of_pipe(output) or f"exit code {process.returncode}"
                raise SpawnFailed(f"{self._bwrap or 'Python'} failed to start: {said}")
            failed.pop_all()

        def kill() -> None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

        def wait(seconds: float) -> int:
            try:
                code = process.wait(seconds)
            except subprocess.TimeoutExpired:
                return 128 + signal.SIGKILL
            return 128 - code if code < 0 else code

        def close() -> None:
            _end(process)
            own.close()

        return Interpreter(control, output, kill, wait, close)

    def stop(self) -> None:
        return None


def spawners(
    limits: Limits, packages: Mapping[str, Path], modules: Sequence[str], *, unsafe: bool
) -> tuple[list[Spawner], str]:
    """What may work here, best first, and why anything better isn't among them."""
    found: list[Spawner] = []
    bwrap = shutil.which("bwrap")
    why = ""
    if bwrap is None:
        why = "the program bwrap isn't installed"
    elif not seccomp.supported():
        why = f"there is no system call filter for the machine {os.uname().machine}"
    else:
        root = [True] if os.getuid() == 0 else []
        found += [ForkServer(bwrap, limits, packages, modules, as_nobody=nobody) for nobody in (*root, False)]
        found.append(Alone(bwrap, limits, packages))
    if unsafe:
        found.append(Alone(None, limits, packages))
    return found, why


def _settings(limits: Limits) -> dict[str, Any]:
    return {
        "folder": bubblewrap.FOLDER,
        "cpu": limits.cpu_s,
        "memory": limits.memory_bytes,
        "tmp_bytes": limits.tmp_bytes,
        "files_bytes": limits.files_bytes,
        "file_bytes": limits.file_bytes,
        "open_files": limits.open_files,
        "threads": limits.threads + 1,  # the supervisor's, or bubblewrap's own first process, counts too
        "files": limits.files,
        "images": limits.images,
    }


def _popen(
    command: Sequence[str], descriptors: Sequence[int], output: int | IO[bytes], cwd: str = "/"
) -> subprocess.Popen[bytes]:
    """Its input is at an end from the start: /dev/null would be the machine's, and through it its mode changed."""
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=output, stderr=output, cwd=cwd, env={},
            start_new_session=True, pass_fds=descriptors,
        )  # fmt: skip
    except OSError as error:
        raise SpawnFailed(f"{command[0]} can't be run: {error}") from error
    if process.stdin is not None:
        process.stdin.close()
    return process


@contextlib.contextmanager
def _descriptor(content: bytes) -> Any:
    """A descriptor that bubblewrap reads `content` from; one a call, as reading moves its position."""
    fd = os.memfd_create("filter")
    try:
        os.write(fd, content)
        os.lseek(fd, 0, os.SEEK_SET)
        yield fd
    finally:
        os.close(fd)


def _ready(control: socket.socket, seconds: float) -> bool:
    control.settimeout(seconds)
    try:
        return control.recv(1) == b"r"
    except OSError:
        return False


def _handle(status: socket.socket, last_words: Any) -> tuple[int, bytes]:
    """The descriptor to end an interpreter by, and what came after it."""
    status.settimeout(_SPAWN_S)
    try:
        message, descriptors, _, _ = socket.recv_fds(status, 64, 1)
    except OSError as error:
        raise SpawnFailed(last_words(f"doesn't answer ({error})")) from error
    if message[:1] != b"p" or not descriptors:
        for opened in descriptors:
            os.close(opened)
        said = (message + _rest_of(status))[1:].decode("utf-8", "replace")
        if said:
            raise SpawnRefused(f"an interpreter can't be isolated here: {said}")
        raise SpawnFailed(last_words("died"))
    return descriptors[0], message[1:]


def _rest_of(status: socket.socket, seconds: float = 1.0) -> bytes:
    said = b""
    deadline = time.monotonic() + seconds
    with contextlib.suppress(OSError):
        while (left := deadline - time.monotonic()) > 0:
            status.settimeout(left)
            chunk = status.recv(1024)
            if not chunk:
                break
            said += chunk
    return said


def _tail_of_pipe(output: int) -> str:
    said = b""
    poll = select.poll()
    poll.register(output, select.POLLIN)
    while len(said) < 4096 and poll.poll(200):
        chunk = os.read(output, 4096)
        if not chunk:
            break
        said += chunk
    return said.decode("utf-8", "replace").strip()


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(5)
