"""What /proc tells of processes: whether a server still runs, and what a process has started."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def started(pid: int) -> str:
    """When a process started, in the kernel's ticks; empty if it doesn't run or the system doesn't tell."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    return ""


def runs(pid: int, start: str) -> bool:
    """Whether the process that had this id and `started` then still runs; its id may have another owner by now."""
    if start:
        return started(pid) == start
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def descendants(pid: int) -> list[int]:
    """The children of a process and theirs, parents first; those that end meanwhile may be missing."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            for child in Path(f"/proc/{pid}/task/{thread}/children").read_text().split():
                found += [int(child), *descendants(int(child))]
    return found


def namespace() -> str:
    """Names this process's view of process ids: an id means nothing in another one. Empty if there are no views."""
    with contextlib.suppress(OSError):
        return os.readlink("/proc/self/ns/pid").strip("pid:[]")
    return ""
