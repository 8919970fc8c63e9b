"""Who wrote a row, and whether that process still lives: how turns and runs left by a crash are found."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Process:
    """`host` includes the PID namespace, `started` the boot, so that a number used again isn't taken for the same."""

    host: str
    pid: int
    started: str


def _proc(path: str) -> str:
    try:
        return Path("/proc", path).read_text()
    except OSError:  # no such process, or no /proc on this system
        return ""


def _started(pid: int) -> str:
    """Boot id and start time in clock ticks since boot; empty when the process is gone (a zombie is gone too)."""
    # The name in parentheses may itself contain spaces and parentheses; state is field 3, start time field 22.
    fields = _proc(f"{pid}/stat").rpartition(")")[2].split()
    if len(fields) < 20 or fields[0] in "ZX":
        return ""
    return f"{_proc('sys/kernel/random/boot_id').strip()}:{fields[19]}"


def _host() -> str:
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        namespace = ""
    return f"{socket.gethostname()}/{namespace}"


def this_process() -> Process:
    return Process(_host(), os.getpid(), _started(os.getpid()))


def is_alive(process: Process) -> bool | None:
    """Whether it still runs; None when that can't be told from here: another host or container, or no /proc."""
    me = this_process()
    if process == me:
        return True
    if process.host != me.host or not me.started or not process.started:
        return None
    return _started(process.pid) == process.started
