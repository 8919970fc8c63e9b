"""The seam between the tool "code" and whatever isolates a program: a new backend is one file that fills this in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


class SandboxUnavailable(RuntimeError):
    """This backend can't run programs here. The message says why and the way out."""


@dataclass(frozen=True)
class Limits:
    """What one program may use. Sizes in bytes, times in seconds; `threads` counts the main one.

    `memory_bytes` is what the program adds to an interpreter with its libraries imported. `tmp_bytes` bounds each
    of the private /tmp and /dev/shm, `files_bytes` the working folder, `file_bytes` one file in either. Of what it
    prints the beginning and the end are kept, `output_bytes` together; past `flood_bytes` it is stopped.
    """

    wall_s: float = 8.0
    cpu_s: int = 5
    memory_bytes: int = 512 << 20
    tmp_bytes: int = 32 << 20
    files_bytes: int = 64 << 20
    file_bytes: int = 32 << 20
    open_files: int = 64
    threads: int = 16
    output_bytes: int = 16 << 10
    flood_bytes: int = 1 << 20
    code_bytes: int = 100_000
    files: int = 100
    images: int = 10


@dataclass(frozen=True)
class File:
    """A file of the working folder. `name` is a plain name: no folder, no leading dot."""

    name: str
    data: bytes


@dataclass(frozen=True)
class PythonResult:
    """`text` is stdout and stderr in the order written. `exit_code` is 128 + n after signal n, as in a shell.

    `truncated` says that parts of it were left out. `files` are those that the program made or changed, `images` the
    figures that it drew (PNG). `fresh` is whether the program began without the state of an earlier one.
    """

    text: str
    exit_code: int
    timed_out: bool
    truncated: bool
    seconds: float
    files: tuple[File, ...] = ()
    images: tuple[bytes, ...] = ()
    fresh: bool = True


class PythonBackend(Protocol):
    """One per process. Safe to use from several event loops."""

    limits: Limits

    @property
    def name(self) -> str: ...

    @property
    def state(self) -> str:
        """A line for people: how programs are isolated here, and what bounds them all together."""
        ...

    async def run(self, code: str, files: Sequence[File] = (), session: str | None = None) -> PythonResult:
        """Run `code` with `files` in its working folder, /mnt/data. Cancelling the call ends the program.

        Without a `session` the interpreter serves this program alone. With one, programs of the same session share
        an interpreter and its variables as long as the backend keeps it. Raises SandboxUnavailable; all that the
        program does wrong is in the result.
        """
        ...

    async def check(self) -> None:
        """Run a trivial program. Raises SandboxUnavailable."""
        ...

    def close(self) -> None:
        """End every interpreter. A later `run` starts anew."""
        ...
