"""The server's end of one interpreter: send it a program, read what comes back within its limits, end it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from tools.python.backend import File, Limits, PythonResult
from tools.python.inside.cell import IMAGE_BYTES
from tools.python.inside.frames import LENGTH, MAX_HEADER, pack
from tools.python.output import Output

_STATUS_S = 5.0
_NAME_BYTES = 255  # the longest name that Linux knows
_PIPE_BYTES = 1 << 16  # what a pipe holds; the filter denies programs to make it larger
BROKEN = "The program broke the channel that its result comes by."


class Cancelled(Exception):
    """The caller went away; the interpreter has been ended."""


class Job:
    """One program under way. `cancel` may be called from any thread, at any time, and more than once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._end: Callable[[], None] | None = None
        self.cancelled = False

    def ends_by(self, end: Callable[[], None] | None) -> None:
        """What to call to end the program; None when it is over. Raises Cancelled if it is too late to begin."""
        with self._lock:
            self._end = end
            if self.cancelled and end is not None:
                raise Cancelled

    def cancel(self) -> None:
        with self._lock:
            self.cancelled = True
            if self._end is not None:
                self._end()


class Interpreter:
    """`kill` ends all its processes at once; `wait` gives the status that the last of them ended with, as a shell's.

    `hold` stops them between the programs of a session, and lets them go on. Only `kill` and `close` may be called
    from a thread other than the one that runs a program; both may be called again, and `kill` after `close`.
    """

    def __init__(
        self,
        control: socket.socket,
        output: int,
        kill: Callable[[], None],
        wait: Callable[[float], int],
        close: Callable[[], None],
        hold: Callable[[bool], None] = lambda stopped: None,
    ) -> None:
        self._control, self._output = control, output
        self._kill, self._wait, self._close, self._hold = kill, wait, close, hold
        self._ending = threading.Lock()
        self._closed = False
        self._has: dict[str, bytes] = {}  # the files in its folder, as far as we know, by name: their hashes
        self._given: set[str] = set()  # the names of the files that it was last given
        self.programs = 0
        self.alive = True
        self.used_at = time.monotonic()
        control.setblocking(False)
        os.set_blocking(output, False)

    def run(self, code: bytes, files: Sequence[File], limits: Limits, job: Job, *, last: bool) -> PythonResult:
        """Run a program; `last` says that no other will follow. Whatever goes wrong ends the interpreter.

        Raises Cancelled.
        """
        job.ends_by(self.kill)
        try:
            return self._run(code, files, limits, last)
        finally:
            job.ends_by(None)
            if job.cancelled:
                raise Cancelled

    def _run(self, code: bytes, files: Sequence[File], limits: Limits, last: bool) -> PythonResult:
        began = time.monotonic()
        fresh = self.programs == 0
        self.programs += 1
        wanted = {} if last else {file.name: hashlib.sha256(file.data).digest() for file in files}
        changed = [file for file in files if last or self._has.get(file.name) != wanted[file.name]]
        removed = sorted(self._given - wanted.keys())  # by a person, since the last program
        self._given = set(wanted)
        header = {"number": self.programs, "files": [file.name for file in changed], "remove": removed, "last": last}
        outgoing = [memoryview(part) for part in pack(header, [code, *(file.data for file in changed)])]
        output, reply = Output(limits.output_bytes, limits.flood_bytes), _Reply(limits, self.programs)
        timed_out = False
        if not fresh:
            self._discard()
            self._hold(False)
        deadline = began + limits.wall_s
        poll = select.poll()
        poll.register(self._control, select.POLLIN | select.POLLOUT)
        poll.register(self._output, select.POLLIN)
        ended = False
        while not (reply.done or ended):
            left = deadline - time.monotonic()
            if left <= 0:
                timed_out = True
                break
            for descriptor, events in poll.poll(left * 1000):
                if descriptor == self._output:
                    if not self._read_output(output):
                        poll.unregister(self._output)
                    continue
                if events & select.POLLOUT and outgoing:
                    _send(self._control, outgoing)
                    if not outgoing:
                        poll.modify(self._control, select.POLLIN)
                if events & (select.POLLIN | select.POLLHUP | select.POLLERR):
                    ended = not reply.read(self._control)
            if output.flooded:
                break
        if not timed_out:  # what was printed before the end of the program is in the pipe by now
            while not output.flooded and _readable(self._output):
                if not self._read_output(output):
                    break
        exit_code = reply.exit_code
        if not reply.done or output.flooded:
            if timed_out or output.flooded or reply.broken:
                self.kill()
            exit_code = self._wait(min(_STATUS_S, max(1.0, deadline - time.monotonic())))
            self.kill()
            if reply.broken:
                output.add(f"\n{BROKEN}\n".encode())
                exit_code = exit_code or 1
        if not last and self.alive:
            self._hold(True)
        timed_out = timed_out or (exit_code == 128 + signal.SIGXCPU and not output.flooded)
        self.used_at = time.monotonic()
        files_made = tuple(File(name, data) for name, data in reply.files)
        if not last:
            self._has = wanted | {file.name: hashlib.sha256(file.data).digest() for file in files_made}
            for name in reply.gone:
                self._has.pop(name, None)
        return PythonResult(
            output.text,
            exit_code,
            timed_out,
            output.truncated,
            self.used_at - began,
            files_made,
            tuple(reply.images),
            fresh,
        )

    def fit(self) -> bool:
        """Is it waiting for a program? Not if it died, or says something that nobody asked for."""
        return self.alive and not _readable(self._control.fileno())

    def kill(self) -> None:
        with self._ending:
            self.alive = False
            if not self._closed:
                self._kill()

    def close(self) -> None:
        """Kill it and give its descriptors back."""
        self.kill()
        with self._ending:
            if not self._closed:
                self._closed = True
                self._control.close()
                os.close(self._output)
                self._close()

    def _read_output(self, output: Output) -> bool:
        """False at the end of the output."""
        try:
            chunk = os.read(self._output, 1 << 16)
        except BlockingIOError:
            return True
        output.add(chunk)
        return bool(chunk)

    def _discard(self) -> None:
        """What threads of an earlier program printed before they were stopped."""
        with contextlib.suppress(BlockingIOError):
            os.read(self._output, _PIPE_BYTES)


def _readable(descriptor: int) -> bool:
    """Also when the other end is closed. Not by `select`, which takes no descriptor past 1023."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(0))


def _send(control: socket.socket, outgoing: list[memoryview]) -> None:
    try:
        while outgoing:
            sent = control.send(outgoing[0])
            outgoing[0] = outgoing[0][sent:]
            if not outgoing[0]:
                del outgoing[0]
    except BlockingIOError:
        return
    except OSError:  # it died: reading the control socket will tell
        outgoing.clear()


class _Reply:
    """A message from a process that a hostile program may have in its hand: nothing in it is believed unchecked."""

    def __init__(self, limits: Limits, number: int) -> None:
        self._limits, self._number = limits, number
        self._data = bytearray()
        self._most = LENGTH.size + MAX_HEADER + limits.files_bytes + limits.images * IMAGE_BYTES
        self._header: dict[str, Any] | None = None
        self._sizes: list[int] = []
        self._needed = LENGTH.size
        self.exit_code = 1
        self.done = self.broken = False
        self.files: list[tuple[str, bytes]] = []
        self.gone: list[str] = []
        self.images: list[bytes] = []

    def read(self, control: socket.socket) -> bool:
        """Take what has come; False when the peer hung up or talks nonsense."""
        try:
            chunk = control.recv(1 << 18)
        except BlockingIOError:
            return True
        except OSError:
            return False
        self._data += chunk
        try:
            self._parse()
        except (ValueError, KeyError, TypeError, RecursionError):
            self.broken = True
            return False
        return bool(chunk)

    def _parse(self) -> None:
        if self._header is None:
            if len(self._data) < LENGTH.size:
                return
            (length,) = LENGTH.unpack_from(self._data)
            if length > MAX_HEADER:
                raise ValueError("too long")
            if len(self._data) < LENGTH.size + length:
                return
            header = json.loads(bytes(self._data[LENGTH.size : LENGTH.size + length]))
            if header["number"] != self._number:
                raise ValueError("the answer to another program")
            self._sizes = [_natural(size) for size in header["blobs"]]
            self._needed = LENGTH.size + length + sum(self._sizes)
            if self._needed > self._most or not isinstance(header["files"], list):
                raise ValueError("too much")
            if len(header["files"]) > self._limits.files or _natural(header["images"]) > self._limits.images:
                raise ValueError("too many")
            if len(header["files"]) + header["images"] != len(self._sizes):
                raise ValueError("doesn't add up")
            self._header = header
        if len(self._data) < self._needed:
            return
        if len(self._data) > self._needed:
            raise ValueError("more than was announced")
        header, at = self._header, self._needed - sum(self._sizes)
        blobs = []
        for size in self._sizes:
            blobs.append(bytes(self._data[at : at + size]))
            at += size
        names = [_plain(name) for name in header["files"]]
        self.exit_code = _natural(header["exit_code"]) & 0xFF
        self.files = list(zip(names, blobs, strict=False))
        self.images = blobs[len(names) :]
        self.gone = [_plain(name) for name in header["gone"]]
        self.done = True


def _plain(name: object) -> str:
    if not isinstance(name, str) or not name.isprintable() or "/" in name or name[:1] in ("", "."):
        raise ValueError("not a file's name")
    if len(name.encode()) > _NAME_BYTES:
        raise ValueError("too long a name")
    return name


def _natural(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError("not a natural number")
    return value


def exit_code(status: int) -> int:
    """A wait status as a shell's exit code: 128 + n after signal n."""
    code = os.waitstatus_to_exitcode(status)
    return 128 - code if code < 0 else code
