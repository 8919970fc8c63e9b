"""Reads documents in a child process, so that a hostile one costs a moment and no more.

Covered: a document that hangs its parser, eats memory or crashes a C library. Not covered: one that takes over the
parser; the child has this user's rights, though no descriptor of ours but its two pipes.
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
import subprocess
import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import Any

from tools.documents.reading import Reading, Section, Unreadable

_ROOT = Path(__file__).parents[2]
_LENGTH = struct.Struct("!I")


class DocumentReader:
    """Reads one document after another in one child, which is started when needed and replaced when it dies.

    For one thread at a time; `close` may come from another, and ends a reading under way.
    """

    def __init__(self, timeout_s: float = 60.0) -> None:
        self.timeout_s = timeout_s
        self._child: subprocess.Popen[bytes] | None = None
        self._closed = False

    def start(self) -> None:
        """Start the child, so that it is ready when the document is. Raises OSError where no process can be."""
        if self._closed:
            raise Unreadable("wasn't read: the reader is closed")
        if self._child is None:
            environment = {name: os.environ[name] for name in ("PATH", "LANG", "LC_ALL") if name in os.environ}
            self._child = subprocess.Popen(
                [sys.executable, "-m", "tools.documents.child"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                cwd="/",
                env=environment | {"PYTHONPATH": str(_ROOT), "PYTHONDONTWRITEBYTECODE": "1"},
                start_new_session=True,  # Ctrl-C ends the command, which ends the child
            )

    def read(self, data: bytes, media_type: str, charset: str = "") -> Reading:
        """The document's text. Raises Unreadable, also after `timeout_s`."""
        self.start()
        child = self._child
        assert child is not None
        late = threading.Event()

        def end() -> None:
            late.set()
            child.kill()

        timer = threading.Timer(self.timeout_s, end)
        timer.daemon = True
        timer.start()
        header = {"media_type": media_type, "charset": charset, "bytes": len(data), "seconds": self.timeout_s}
        try:
            answer = _ask(child, data, header)
        except (OSError, EOFError, ValueError):  # its pipes are closed
            self._stop()
            if late.is_set():
                reason = f"takes more than {self.timeout_s:g} s to read"
            elif self._closed:
                reason = "wasn't read: the reader is closed"
            else:
                reason = f"crashes its reader (status {child.returncode})"
            raise Unreadable(reason) from None
        finally:
            timer.cancel()
        if "error" in answer:
            if answer.get("fatal"):
                self._stop()
            raise Unreadable(answer["error"])
        return Reading(answer["title"], tuple(Section(*section) for section in answer["sections"]), answer["cut"])

    def close(self) -> None:
        self._closed = True
        self._stop()

    def _stop(self) -> None:
        child, self._child = self._child, None
        if child is None:
            return
        child.kill()
        child.wait()
        for pipe in (child.stdin, child.stdout):
            with contextlib.suppress(OSError):  # what was still to be written has no reader
                if pipe:
                    pipe.close()

    def __enter__(self) -> DocumentReader:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()


def _ask(child: subprocess.Popen[bytes], data: bytes, header: dict[str, Any]) -> dict[str, Any]:
    assert child.stdin is not None
    assert child.stdout is not None
    packed = json.dumps(header).encode()
    child.stdin.write(_LENGTH.pack(len(packed)) + packed)
    child.stdin.write(data)
    child.stdin.flush()
    (length,) = _LENGTH.unpack(_exactly(child.stdout, _LENGTH.size))
    answer: dict[str, Any] = json.loads(_exactly(child.stdout, length))
    return answer


def _exactly(pipe: Any, count: int) -> bytes:
    data: bytes = pipe.read(count)
    if len(data) < count:
        raise EOFError("the child ended in the middle of its answer")
    return data
