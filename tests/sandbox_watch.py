"""What a sandbox costs the server: its processes, descriptors and memory, seen from outside; and other users' eyes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
NOBODY = 65534
_SETTLE_S = 20.0


def descendants(pid: int, without: int = 0) -> set[int]:
    """All that a process has started and that is left, zombies as well; but for `without` and what that has started."""
    found: set[int] = set()
    waiting = [pid]
    while waiting:
        try:
            parent = waiting.pop()
            for thread in os.listdir(f"/proc/{parent}/task"):
                more = {int(child) for child in Path(f"/proc/{parent}/task/{thread}/children").read_text().split()}
                found |= more - {without}
                waiting += more - {without}
        except (FileNotFoundError, ProcessLookupError):  # it ended meanwhile
            continue
    return found


def status_of(pid: int) -> dict[str, str]:
    """As this process, outside of all namespaces, sees it."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def statuses(pids: Iterable[int]) -> dict[int, dict[str, str]]:
    """Of those that haven't ended meanwhile."""
    found = {}
    for pid in pids:
        with contextlib.suppress(OSError):
            found[pid] = status_of(pid)
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def memory() -> int:
    """Bytes that this process has resident."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def peak() -> int:
    """The most bytes that this process had resident since `forget_peak`."""
    return int(status_of(os.getpid())["VmHWM"].split()[0]) << 10


@dataclass
class Rest:
    """What a process has when nothing is under way: what it must come back to."""

    processes: int
    descriptors: int
    without: int = 0  # a process that isn't counted, as `descendants` has it

    @classmethod
    async def of_now(cls, without: int = 0) -> Rest:
        """Once it has stood still for a while."""
        seen, since = None, time.monotonic()
        while time.monotonic() < since + 0.3:
            await asyncio.sleep(0.02)
            now = (len(descendants(os.getpid(), without)), open_descriptors())
            if now != seen:
                seen, since = now, time.monotonic()
        assert seen is not None
        return cls(*seen, without)

    async def comes_back(self, before: set[int] | None = None, gone: int = 0) -> None:
        """Waits for it. Of the processes `before`, at least `gone` must have made room for others."""
        before = before or set()
        until = time.monotonic() + _SETTLE_S
        while True:
            there = descendants(os.getpid(), self.without)
            now = Rest(len(there), open_descriptors(), self.without)
            if now == self and len(before - there) >= gone:
                return
            assert time.monotonic() < until, (
                f"at rest there was {self}, and now there is {now}; {len(before - there)} of {gone} processes are gone"
            )
            await asyncio.sleep(0.005)


def as_ordinary_user(command: list[str]) -> tuple[list[str], str]:
    """`command` as nobody, for a process that is root, and why it can't be had.

    Python, its environment and the repository may lie where only root may enter: then bubblewrap shows them in a
    folder that all may enter. Nothing else is kept from the command.
    """
    if os.getuid() != 0:
        return [], "changes the user, which root alone may"
    bwrap, setpriv = shutil.which("bwrap"), shutil.which("setpriv")
    if bwrap is None or setpriv is None:
        return [], "needs bubblewrap and setpriv"
    needed = [Path(os.path.realpath(path)) for path in (sys.base_prefix, sys.prefix, REPOSITORY)]
    closed: list[Path] = []
    for path in needed:
        ways = [way for way in reversed(path.parents) if not way.stat().st_mode & 0o001]
        closed += [way for way in ways[:1] if way not in closed]
    wrapped = [bwrap, "--dev-bind", "/", "/"]
    for way in closed:
        wrapped += ["--perms", "0755", "--tmpfs", str(way)]
    for path in needed:
        above = [way for way in closed if way in path.parents]
        for way in reversed(path.parents):
            if above and above[0] in way.parents:
                wrapped += ["--perms", "0755", "--dir", str(way)]
        if above:
            wrapped += ["--ro-bind", str(path), str(path)]
    wrapped += ["--die-with-parent", setpriv, f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    trial = [*wrapped, sys.executable, "-c", "import pytest"]
    tried = subprocess.run(trial, capture_output=True, text=True, check=False)
    if tried.returncode != 0:
        return [], f"nobody can't run {sys.executable}: {tried.stderr.strip()[-300:]}"
    return [*wrapped, *command], ""
