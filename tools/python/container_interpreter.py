"""The server's end of one container: wait until it is ready, give it a program, read what comes back, end it.

The program may have all of the container in its hand, so every count and size that comes from there is checked.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import signal
import time
from collections.abc import Sequence
from pathlib import Path

from tools.python import seccomp
from tools.python.backend import File, Limits, PythonResult, SandboxUnavailable
from tools.python.container_engine import Container, Engine, Gone, Late
from tools.python.container_runner import HEAD
from tools.python.output import Output

_HERE = Path(__file__).parent
_RUNNER = (_HERE / "container_runner.py").read_text(encoding="utf-8")
_CELL = (_HERE / "inside" / "cell.py").read_text(encoding="utf-8")
_START_S = 60.0  # importing the libraries, on a machine that is busy with training
_SEND_S = 30.0
_FILES_S = 10.0
_MAX_SMALL = 64 << 10
_IMAGE_BYTES = 4 << 20
_PNG = b"\x89PNG\r\n\x1a\n"
_KILLED = 128 + signal.SIGKILL
BROKEN = "The program broke the channel that its result comes by."


class NotStarted(Exception):
    """The container was gone before the program began: another one may run it."""


class Interpreter:
    """Serves programs one after the other, until one goes wrong: then `alive` is False and it must be ended."""

    def __init__(self, engine: Engine, limits: Limits, packages: Sequence[str]) -> None:
        """Start a container and wait for its interpreter. Raises SandboxUnavailable."""
        self._limits = limits
        self._container: Container = engine.start(_RUNNER)
        self._buffer = bytearray()
        self._known: dict[str, bytes] = {}  # files that lie there, by the digest of their content
        self.programs = 0
        self.alive = True
        self.used_at = time.monotonic()
        settings = {
            "cell": _CELL,
            "packages": list(packages),
            "filters": {machine: base64.b64encode(_filter(machine)).decode() for machine in ("x86_64", "aarch64")},
            "memory": limits.memory_bytes,
            "cpu": limits.cpu_s,
            "images": limits.images,
            "image_bytes": limits.images * _IMAGE_BYTES,
            "files": limits.files,
            "files_bytes": limits.files_bytes,
        }
        deadline = time.monotonic() + _START_S
        try:
            self._send(b"J", json.dumps(settings).encode(), deadline)
            kind, content = self._receive(deadline, _MAX_SMALL)
            if kind != b"R":
                raise ValueError(kind)
            self.packages: list[str] = json.loads(bytes(content))
        except (Gone, Late, ValueError) as error:
            self.end()
            said = self._container.complaint.decode("utf-8", "replace").strip()
            why = said or f"its Python didn't answer within {_START_S:g} s"
            raise SandboxUnavailable(
                f"The container started, but {why}. The image needs Python 3.11 or newer as `python3`, and no /tmp or "
                "/mnt/data that others can't write; set another one in container_image."
            ) from error

    def run(self, code: bytes, files: Sequence[File], *, last: bool) -> PythonResult:
        """Run a program; `last` says that no other will follow. Raises NotStarted; after `hang_up`, Gone."""
        fresh = self.programs == 0
        self.programs += 1
        try:
            notes = self._begin(code, files, last)
        except (Gone, Late, ValueError) as error:
            self.alive = False
            raise NotStarted from error
        began = time.monotonic()
        answer = _Answer(self._limits)
        answer.output.add(notes)
        exit_code = _KILLED
        timed_out = False
        try:
            answer.read_program(self, began + self._limits.wall_s)
            if answer.exit_code is not None:
                exit_code = answer.exit_code
                seconds = time.monotonic() - began
                self._send(b"L", b"", time.monotonic() + _SEND_S)
                answer.read_files(self, time.monotonic() + _FILES_S)
            else:  # it printed too much
                seconds, self.alive = time.monotonic() - began, False
        except Late:
            seconds, self.alive = time.monotonic() - began, False
            timed_out = answer.exit_code is None
        except Gone:  # the whole container was killed, by its memory's limit or by the program
            seconds, self.alive = time.monotonic() - began, False
        except ValueError:
            seconds, self.alive = time.monotonic() - began, False
            answer.output.add(f"\n{BROKEN}\n".encode())
            exit_code = exit_code if answer.exit_code is None else (answer.exit_code or 1)
        self.alive = self.alive and not answer.output.flooded and not answer.died
        timed_out = timed_out or exit_code == 128 + signal.SIGXCPU
        self._known.update({file.name: _digest(file.data) for file in answer.files})
        self.used_at = time.monotonic()
        return PythonResult(
            answer.output.text,
            exit_code,
            timed_out and not answer.output.flooded,
            answer.output.truncated,
            seconds,
            tuple(answer.files),
            tuple(answer.images),
            fresh,
        )

    def hang_up(self) -> None:
        """Break off what goes on, from any thread."""
        self._container.hang_up()

    def end(self) -> None:
        self.alive = False
        self._container.end()

    def _begin(self, code: bytes, files: Sequence[File], last: bool) -> bytes:
        """Hand the program over; returns what is to be said of files that couldn't be."""
        notes = b""
        deadline = time.monotonic() + _SEND_S
        for file in files:
            digest = _digest(file.data)
            if self._known.get(file.name) != digest:
                self._send(b"F", file.name.encode() + b"\0" + file.data, deadline)
                self._known[file.name] = digest
        self._send(b"X", (b"1" if last else b"0") + code, deadline)
        while True:
            kind, content = self._receive(deadline, self._limits.files_bytes + _MAX_SMALL)
            if kind == b"S":
                return notes
            if kind == b"W":
                notes += content[: _MAX_SMALL - len(notes)]
            elif kind not in (b"T", b"C"):  # those are late words of threads that an earlier program left
                raise ValueError(kind)

    def _send(self, kind: bytes, content: bytes, deadline: float) -> None:
        self._container.send(HEAD.pack(kind, len(content)), deadline)
        if content:
            self._container.send(content, deadline)

    def _receive(self, deadline: float, most: int) -> tuple[bytes, bytearray]:
        """The next message of the first process; ValueError if it is longer than `most` bytes."""
        while True:
            message = _take(self._buffer, most)
            if message is not None:
                return message
            self._buffer += self._container.receive(deadline)


class _Answer:
    """What one program has sent so far. ValueError from any reading means that it doesn't keep to the protocol."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._inner = bytearray()
        self._image_bytes = limits.images * _IMAGE_BYTES
        self.output = Output(limits.output_bytes, limits.flood_bytes)
        self.exit_code: int | None = None
        self.died = False
        self.files: list[File] = []
        self.images: list[bytes] = []

    def read_program(self, source: Interpreter, deadline: float) -> None:
        """Until the program has ended, or has printed too much."""
        while self.exit_code is None and not self.output.flooded:
            kind, content = source._receive(deadline, _MAX_SMALL)
            self._take(kind, content)

    def read_files(self, source: Interpreter, deadline: float) -> None:
        """What it printed last, and the files; an interpreter that died after its last word is noticed."""
        left = self._limits.files_bytes
        while True:
            kind, content = source._receive(deadline, left + _MAX_SMALL)
            if kind == b"E":
                return
            if kind == b"F":
                name, _, data = bytes(content).partition(b"\0")
                left -= len(data)
                if left < 0 or len(self.files) >= self._limits.files:
                    raise ValueError("too many files")
                self.files.append(File(_plain(name.decode()), data))
            else:
                self._take(kind, content)

    def _take(self, kind: bytes, content: bytearray) -> None:
        if kind == b"T":
            self.output.add(content)
        elif kind == b"X":
            self.died = True
            if self.exit_code is None:
                self.exit_code = _code(content)
        elif kind == b"C":
            self._inner += content
            while (message := _take(self._inner, self._image_bytes + _MAX_SMALL)) is not None:
                self._take_inner(*message)
        else:
            raise ValueError(kind)

    def _take_inner(self, kind: bytes, content: bytearray) -> None:
        if self.exit_code is not None:
            raise ValueError("more after the end")
        if kind == b"D":
            self.exit_code = _code(content)
        elif kind == b"I" and content.startswith(_PNG) and len(self.images) < self._limits.images:
            self.images.append(bytes(content))
            self._image_bytes -= len(content)
        else:
            raise ValueError(kind)


def _take(buffer: bytearray, most: int) -> tuple[bytes, bytearray] | None:
    """Remove a whole message from the beginning of the buffer; None if it isn't all there yet."""
    if len(buffer) < HEAD.size:
        return None
    kind, size = HEAD.unpack_from(buffer)
    if size > most:
        raise ValueError(f"a message of {size} bytes")
    if len(buffer) < HEAD.size + size:
        return None
    content = buffer[HEAD.size : HEAD.size + size]
    del buffer[: HEAD.size + size]
    return kind, content


def _code(content: bytearray) -> int:
    return int(bytes(content).decode()) & 0xFF


def _plain(name: str) -> str:
    if not name.isprintable() or "/" in name or name[:1] in ("", ".") or len(name) > 255:
        raise ValueError("not a file's name")
    return name


@functools.cache
def _filter(machine: str) -> bytes:
    """Of system calls; the machine is the engine's, which may not be the server's."""
    return seccomp.program(machine, allow_exec=False)


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()
