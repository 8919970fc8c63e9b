"""Asks the math-verify process, from any thread, and waits only so long."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

START_SECONDS = 60.0
ANSWER_SECONDS = 12.0  # above the worker's own three alarms: this one means that it hangs

_lock = threading.Lock()
_process: subprocess.Popen[bytes] | None = None
_owner = 0  # the process id that started it: a fork must not share the pipes


def compare(gold: str, answer: str) -> dict[str, Any]:
    """`{"equal", "gold_read", "answer_read"}` or `{"error"}`, within `ANSWER_SECONDS` of a started process."""
    global _process, _owner
    request = json.dumps({"gold": gold, "answer": answer}).encode() + b"\n"
    with _lock:
        if _process is None or _process.poll() is not None or _owner != os.getpid():
            _process, _owner = _start(), os.getpid()
            if "error" in (ready := _read(_process, START_SECONDS)):
                _stop()
                return ready
        assert _process.stdin is not None
        try:
            _process.stdin.write(request)
            _process.stdin.flush()
        except OSError as error:
            _stop()
            return {"error": f"the math process is gone: {error}"}
        reply = _read(_process, ANSWER_SECONDS)
        if reply.get("lost"):
            _stop()
        return reply


def _start() -> subprocess.Popen[bytes]:
    # -P: the worker's own folder must not come first on the path, where its modules could shadow the library's.
    command = [sys.executable, "-P", str(Path(__file__).with_name("math_worker.py"))]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)


def _stop() -> None:
    global _process
    if _process is not None and _owner == os.getpid():
        _process.kill()
        _process.wait()
    _process = None


def _read(process: subprocess.Popen[bytes], seconds: float) -> dict[str, Any]:
    """One line from the process as JSON."""
    assert process.stdout is not None
    deadline, data = time.monotonic() + seconds, b""
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while not data.endswith(b"\n"):
            if not selector.select(max(0.0, deadline - time.monotonic())):
                return {"error": f"no verdict in {seconds:g} seconds", "lost": True}
            chunk = os.read(process.stdout.fileno(), 65_536)
            if not chunk:
                return {"error": "the math process ended before it answered", "lost": True}
            data += chunk
    reply: dict[str, Any] = json.loads(data)
    return reply
