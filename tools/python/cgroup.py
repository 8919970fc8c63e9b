"""One bound for all sandboxes together: a control group with a share of the machine's memory, processes and cores.

    group, said = limit_group(memory_bytes=4 << 30, max_processes=500, cpu_cores=2)

The first process of the sandboxes is added right after its start, and all that it starts belongs to the group too.
A limit for each program stays with the program (rlimits): this is what keeps all of them together from taking the
machine. When memory runs out the kernel kills the group's largest process, and nobody else's.

Where the group lies: below this process's own, so that whatever bounds the server bounds it too.
- cgroup v1: a folder in each controller's tree, where this user may make one (as a rule: root).
- cgroup v2: only a group without processes may hand controllers to its children. So it takes a group that was
  delegated to us and is empty (systemd: `Delegate=yes` with `DelegateSubgroup=`), the machine's root group, or our own
  group if it was delegated to us and holds nobody but this process and its descendants: they move into a leaf of it,
  where they stay. In a group that systemd manages for others, or that we share, nothing is touched.
Where there's no such place the bound is missing, and `said` tells why.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from tools.python import process

CONTROLLERS = ("memory", "pids", "cpu")
LEAF = "whetstone-server"  # where the server's own processes move to, if they must
_PREFIX = "whetstone-sandboxes-"
_PERIOD_US = 100_000
_KILL_S = 5.0
_ESCAPED = re.compile(r"\\([0-7]{3})")  # a space in a path is written \040
_DELEGATE = (
    "Run the server as a systemd service with Delegate=yes and DelegateSubgroup=server, or by "
    "`systemd-run --user --scope -p Delegate=yes`, or in a container of its own with writable cgroups"
)


class _NoPlace(Exception):
    """No group can be made. The message says why."""


@dataclass(frozen=True)
class Group:
    """Folders of one group: one, or one a controller in cgroup v1. A context manager: leaving it closes the group."""

    folders: tuple[Path, ...]

    def add(self, pid: int) -> None:
        """Put a process into the group; its later children are born there.

        Raises ProcessLookupError if it has ended, PermissionError if it isn't ours to move.
        """
        for folder in self.folders:
            _write(folder / "cgroup.procs", str(pid))

    def processes(self) -> set[int]:
        """Ids of all that is in the group, also in groups below it."""
        found: set[int] = set()
        for folder in self.folders:
            for below in _tree(folder):
                found |= _processes(below)
        return found

    def close(self) -> None:
        """Kill whoever is left in the group, and remove it. A second call does nothing."""
        deadline = time.monotonic() + _KILL_S
        for folder in self.folders:
            _empty(folder, deadline)
            for below in _tree(folder):
                with contextlib.suppress(OSError):  # a process that the kernel can't end yet: the next start sweeps
                    os.rmdir(below)

    def __enter__(self) -> Group:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def limit_group(
    memory_bytes: int, max_processes: int, cpu_cores: float, *, proc: Path = Path("/proc/self")
) -> tuple[Group | None, str]:
    """A new group with these limits and a sentence on what it bounds, or None and the reason with the way out.

    `max_processes` counts threads. Groups of servers that no longer run are removed first.
    """
    wanted = {
        "memory": f"{memory_bytes >> 20} MB of memory",
        "pids": f"{max_processes} processes and threads",
        "cpu": f"{cpu_cores:g} cores",
    }
    made: list[Path] = []
    try:
        places, version = _places(proc)
        for parent in dict.fromkeys(places.values()):
            _sweep(parent)
            folder = parent / f"{_PREFIX}{process.namespace()}-{os.getpid()}-{process.started(os.getpid())}"
            suffix = 0
            while (chosen := folder.with_name(f"{folder.name}-{suffix}")).exists():  # one process, several groups
                suffix += 1
            chosen.mkdir()
            made.append(chosen)
            for controller in [name for name, place in places.items() if place == parent]:
                _limit(chosen, controller, version, memory_bytes, max_processes, cpu_cores)
    except (_NoPlace, OSError) as error:
        Group(tuple(made)).close()
        return None, f"All sandboxes together have no bound: {_reason(error)}."
    bounded = ", ".join(wanted[name] for name in CONTROLLERS if name in places)
    missing = [name for name in CONTROLLERS if name not in places]
    without = f"; this machine has no controller for {' and '.join(missing)}" if missing else ""
    return Group(tuple(made)), f"All sandboxes together have {bounded} (cgroup v{version}){without}."


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"this user may not change {error.filename or 'the control groups'}. {_DELEGATE}"
    return str(error)


def _limit(folder: Path, controller: str, version: int, memory: int, processes: int, cores: float) -> None:
    quota = int(cores * _PERIOD_US)
    if controller == "pids":
        _write(folder / "pids.max", str(processes))
    elif controller == "memory" and version == 2:
        _write(folder / "memory.max", str(memory))
        if (folder / "memory.swap.max").exists():  # a kernel without swap has none
            _write(folder / "memory.swap.max", "0")
    elif controller == "memory":
        _write(folder / "memory.limit_in_bytes", str(memory))
        if (folder / "memory.memsw.limit_in_bytes").exists():  # memory and swap together
            _write(folder / "memory.memsw.limit_in_bytes", str(memory))
    elif version == 2:
        _write(folder / "cpu.max", f"{quota} {_PERIOD_US}")
    else:
        _write(folder / "cpu.cfs_period_us", str(_PERIOD_US))
        _write(folder / "cpu.cfs_quota_us", str(quota))


# -- where a group may lie


def _places(proc: Path) -> tuple[dict[str, Path], int]:
    """For each controller the group that ours is made in, and the version of cgroups. Raises _NoPlace."""
    try:
        mounts = list(_mounts((proc / "mountinfo").read_text()))
        own = (proc / "cgroup").read_text()
    except OSError as error:
        raise _NoPlace(f"this system has no control groups ({error.strerror})") from error
    memberships = [line.split(":", 2)[1:] for line in own.splitlines() if line.count(":") >= 2]
    first: dict[str, Path] = {}
    for controllers, path in memberships:
        for controller in set(controllers.split(",")) & set(CONTROLLERS):
            for kind, root, mount, options in mounts:
                if kind == "cgroup" and controller in options and (place := _below(mount, root, path)):
                    first[controller] = place
                    break
    if first:  # a controller is either in a v1 tree or in v2's; those of v2's are rare beside v1's, and left alone
        return first, 1
    for controllers, path in memberships:
        for kind, root, mount, _ in mounts:
            if controllers == "" and kind == "cgroup2" and (place := _below(mount, root, path)):
                return _second(place, is_top=place == mount), 2
    raise _NoPlace("no control group file system is mounted where this process could see its own group")


def _second(own: Path, *, is_top: bool) -> dict[str, Path]:
    """The parent for our group in cgroup v2, with its controllers handed on. Raises _NoPlace or OSError."""
    available = [name for name in CONTROLLERS if name in (own / "cgroup.controllers").read_text().split()]
    if not available:
        raise _NoPlace(f"the group {own} was given none of the controllers memory, pids and cpu. {_DELEGATE}")
    above = own.parent
    if not is_top and (own.name == LEAF or _is_delegated(above)) and not _processes(above):
        parent = above
    elif not (own / "cgroup.type").exists():  # the machine's root: the only one that may have processes of its own
        parent = own
    elif _is_delegated(own) or is_top or not Path("/run/systemd/system").exists():
        parent = own
        _retreat(own)
    else:
        raise _NoPlace(f"the group {own} is managed by systemd and not delegated. {_DELEGATE}")
    given = (parent / "cgroup.subtree_control").read_text().split()
    for name in available:
        if name not in given:
            _write(parent / "cgroup.subtree_control", f"+{name}")
    return dict.fromkeys(available, parent)


def _retreat(own: Path) -> None:
    """Move this process and its descendants from its group into a leaf of it. Raises _NoPlace if others are there."""
    for _ in range(5):  # a process that is forked meanwhile is found the next time
        there = _processes(own)
        if not there:
            return
        if others := {pid for pid in there if not _descends(pid)}:
            raise _NoPlace(f"the group {own} has {len(others)} processes that aren't the server's. {_DELEGATE}")
        (own / LEAF).mkdir(exist_ok=True)
        for pid in there:
            with contextlib.suppress(ProcessLookupError):
                _write(own / LEAF / "cgroup.procs", str(pid))
    raise _NoPlace(f"the processes of the group {own} can't be moved to {own / LEAF}")


def _descends(pid: int) -> bool:
    """Whether it is this process or a descendant of it, or has ended."""
    while pid > 1:
        if pid == os.getpid():
            return True
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            return True
    return pid == os.getpid()


def _is_delegated(group: Path) -> bool:
    """Whether systemd marked the group as left to its owner."""
    for name in ("user.delegate", "trusted.delegate"):
        with contextlib.suppress(OSError, AttributeError):
            if os.getxattr(group, name) == b"1":
                return True
    return False


def _mounts(text: str) -> Iterator[tuple[str, str, Path, list[str]]]:
    """File system, root within it, mount point and options of each line of a mountinfo."""
    for line in text.splitlines():
        left, _, right = line.partition(" - ")
        fields, kinds = left.split(), right.split()
        if len(fields) >= 5 and len(kinds) >= 3:
            root, mount = (_ESCAPED.sub(lambda found: chr(int(found[1], 8)), field) for field in fields[3:5])
            yield kinds[0], root, Path(mount), kinds[2].split(",")


def _below(mount: Path, root: str, path: str) -> Path | None:
    """Where the group `path` lies under a mount that shows the tree from `root` on; None if it isn't in view."""
    relative = os.path.relpath(path, root)
    if relative.startswith(".."):
        return None
    found = mount / relative
    return found if found.is_dir() else None


# -- the group's files


def _write(file: Path, text: str) -> None:
    with open(file, "r+" if file.exists() else "w", encoding="utf-8") as target:
        target.write(text)


def _processes(folder: Path) -> set[int]:
    """Ids of the processes of this very group; those outside of our view read as 0 and are left out."""
    try:
        return {int(line) for line in (folder / "cgroup.procs").read_text().split()} - {0}
    except OSError:
        return set()


def _tree(folder: Path) -> list[Path]:
    """The folder and those below it, the deepest first."""
    return [Path(path) for path, _, _ in os.walk(folder, topdown=False)]


def _empty(folder: Path, deadline: float) -> None:
    """Kill all processes of the group and of those below, and wait for their end."""
    while any(_processes(below) for below in _tree(folder)) and time.monotonic() < deadline:
        with contextlib.suppress(OSError):  # since Linux 5.14: at once, whatever they fork
            _write_existing(folder / "cgroup.kill", "1")
        for below in _tree(folder):
            for pid in _processes(below):
                _kill(pid, below)
        time.sleep(0.01)


def _write_existing(file: Path, text: str) -> None:
    if file.exists():
        _write(file, text)


def _kill(pid: int, folder: Path) -> None:
    with contextlib.suppress(OSError):
        held = os.pidfd_open(pid)
        try:
            if pid in _processes(folder):  # still: so the id that we hold isn't a new process's
                signal.pidfd_send_signal(held, signal.SIGKILL)
        finally:
            os.close(held)


def _sweep(parent: Path) -> None:
    """Remove the groups of dead servers."""
    for folder in parent.glob(f"{_PREFIX}*"):
        place, _, rest = folder.name.removeprefix(_PREFIX).partition("-")
        pid, _, rest = rest.partition("-")
        start = rest.partition("-")[0]
        if place == process.namespace() and pid.isdecimal() and not process.runs(int(pid), start):
            Group((folder,)).close()
