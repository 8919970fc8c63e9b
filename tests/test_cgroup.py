"""The bound on all sandboxes together, on this machine's own control groups where there are any, else on a copy."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tools.python import cgroup
from tools.python.cgroup import LEAF, Group, limit_group

MEMORY = 128 << 20
REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture
def group() -> Iterator[Group]:
    made, said = limit_group(MEMORY, 24, 0.5)
    if made is None:
        pytest.skip(said)
    with made:
        yield made


def start(group: Group, code: str) -> subprocess.Popen[str]:
    """A Python that begins `code` once it belongs to the group."""
    program = subprocess.Popen(
        [sys.executable, "-S", "-c", f"import sys; sys.stdin.readline()\n{code}"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    group.add(program.pid)
    return program


def said_by(program: subprocess.Popen[str]) -> str:
    return program.communicate("go\n", timeout=30)[0]


def test_all_programs_together_have_the_memory_of_one_bound(group: Group) -> None:
    code = "held = []\nfor n in range(80): held.append(bytearray(b'x' * (1 << 20)))\nprint('holds', flush=True)\n"
    first = start(group, code + "import time; time.sleep(60)")
    assert first.stdin is not None
    assert first.stdout is not None
    first.stdin.write("go\n")
    first.stdin.flush()
    assert first.stdout.readline() == "holds\n"
    second = start(group, code)
    output = said_by(second)
    assert "holds" not in output or first.wait(timeout=5) == -9
    group.close()
    assert first.wait(timeout=5) == -9


def test_a_fork_bomb_stops_at_the_bound(group: Group) -> None:
    bomb = """
import os, time
made = 0
try:
    while made < 500:
        if os.fork() == 0:
            time.sleep(60)
            os._exit(0)
        made += 1
except OSError as error:
    print(made, error.strerror)
"""
    program = start(group, bomb)
    assert program.stdin is not None
    assert program.stdout is not None
    program.stdin.write("go\n")
    program.stdin.flush()
    made, _, reason = program.stdout.readline().partition(" ")
    assert int(made) < 24
    assert reason == "Resource temporarily unavailable\n"
    assert len(group.processes()) >= int(made)
    group.close()
    assert group.processes() == set()
    assert not any(folder.exists() for folder in group.folders)


def test_the_bound_on_cores_holds_for_all_processes(group: Group) -> None:
    burn = """
import os, time
for _ in range(3):
    if os.fork() == 0:
        end = time.monotonic() + 2
        while time.monotonic() < end: pass
        os._exit(0)
for _ in range(3): os.wait()
used = os.times()
print(used.children_user + used.children_system)
"""
    assert float(said_by(start(group, burn))) < 1.6  # half a core for two seconds, and a tenth of a second's credit


def test_a_process_that_has_ended_is_named(group: Group) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    with pytest.raises(ProcessLookupError):
        group.add(ended.pid)


def test_one_process_may_have_several_groups_and_close_twice(group: Group) -> None:
    other, said = limit_group(MEMORY, 24, 0.5)
    assert other is not None
    assert "128 MB of memory, 24 processes and threads, 0.5 cores" in said
    assert not set(other.folders) & set(group.folders)
    other.close()
    other.close()
    assert all(folder.exists() for folder in group.folders)


def test_what_a_killed_server_left_is_swept(group: Group) -> None:
    server = """
import subprocess, sys
from tools.python.cgroup import limit_group
group, said = limit_group(64 << 20, 10, 1)
program = subprocess.Popen(["sleep", "600"])
group.add(program.pid)
print(program.pid, *group.folders, flush=True)
sys.stdin.read()
"""
    dead = subprocess.Popen(
        [sys.executable, "-c", server], cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert dead.stdout is not None
    pid, *folders = dead.stdout.readline().split()
    with open(f"/proc/{pid}/comm") as file:
        assert file.read() == "sleep\n"
    dead.kill()
    dead.wait()
    assert all(Path(folder).exists() for folder in folders)
    other, _ = limit_group(MEMORY, 24, 0.5)
    assert other is not None
    other.close()
    assert not any(Path(folder).exists() for folder in folders)
    deadline = time.monotonic() + 5
    while _is_running(int(pid)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not _is_running(int(pid))
    assert all(folder.exists() for folder in group.folders)  # of a server that runs


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to become somebody else")
def test_a_user_who_may_not_make_groups_is_told_the_way_out() -> None:
    code = """
import os
os.setgroups([]); os.setgid(65534); os.setuid(65534)
print(*limit_group(1 << 30, 10, 1), sep="|")
"""
    ran = subprocess.run(
        [sys.executable, "-c", f"from tools.python.cgroup import limit_group\n{code}"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    nothing, _, said = ran.stdout.partition("|")
    assert nothing == "None"
    assert "this user may not change" in said or "managed by systemd" in said
    assert "Delegate=yes" in said


def test_a_real_group_of_version_2_is_emptied_and_removed() -> None:
    mounts = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines() if " cgroup2 " in line]
    if not mounts or not os.access(mounts[0], os.W_OK) or os.getuid() != 0:
        pytest.skip("needs root and a cgroup2 mount that can be written")
    folder = Path(mounts[0]) / f"whetstone-test-{os.getpid()}"
    (folder / "below").mkdir(parents=True)
    group = Group((folder,))
    program = subprocess.Popen(["sleep", "60"])
    group.add(program.pid)
    (folder / "below" / "cgroup.procs").write_text(str(program.pid))
    assert group.processes() == {program.pid}
    group.close()
    assert program.wait(timeout=5) == -9
    assert not folder.exists()


# -- version 2, on a copy of its files


class Tree:
    """What `/proc/self` and the mount of cgroup2 look like to a process in the group `own`."""

    def __init__(self, folder: Path, own: str, root: str = "/") -> None:
        self.mount = folder / "cgroup"
        self.proc = folder / "proc"
        self.proc.mkdir()
        self.own = self.mount / os.path.relpath(own, root)
        self.own.mkdir(parents=True)
        (self.proc / "cgroup").write_text(f"0::{own}\n")
        (self.proc / "mountinfo").write_text(f"30 24 0:26 {root} {self.mount} rw shared:4 - cgroup2 cgroup2 rw\n")
        for place in (self.mount, *[p for p in self.own.parents if self.mount in p.parents], self.own):
            (place / "cgroup.controllers").write_text("cpuset cpu io memory pids\n")
            (place / "cgroup.subtree_control").write_text("")
            (place / "cgroup.procs").write_text("")
            if place != self.mount or root != "/":
                (place / "cgroup.type").write_text("domain\n")

    def limit(self) -> tuple[Group | None, str]:
        return limit_group(1 << 30, 100, 1.5, proc=self.proc)


@pytest.fixture(autouse=True)
def _plain_files_go_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The kernel's own files vanish with a group; a copy's must be removed."""
    rmdir = os.rmdir

    def remove(path: Path) -> None:
        if tmp_path in Path(path).parents:
            for file in Path(path).iterdir():
                file.unlink()
        rmdir(path)

    monkeypatch.setattr(cgroup.os, "rmdir", remove)


@pytest.fixture
def systemd(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.exists
    monkeypatch.setattr(Path, "exists", lambda path, **how: str(path) == "/run/systemd/system" or real(path, **how))


def delegate(monkeypatch: pytest.MonkeyPatch, *groups: Path) -> None:
    def marked(path: Path, name: str) -> bytes:
        if Path(path) in groups and name == "user.delegate":
            return b"1"
        raise OSError(61, "No data available")

    monkeypatch.setattr(cgroup.os, "getxattr", marked)


@pytest.mark.usefixtures("systemd")
def test_v2_delegated_subgroup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = Tree(tmp_path, "/system.slice/whetstone.service/server")
    service = tree.own.parent
    delegate(monkeypatch, service)
    group, said = tree.limit()
    assert group is not None, said
    (folder,) = group.folders
    assert folder.parent == service
    assert (folder / "memory.max").read_text() == str(1 << 30)
    assert (folder / "pids.max").read_text() == "100"
    assert (folder / "cpu.max").read_text() == "150000 100000"
    assert said == "All sandboxes together have 1024 MB of memory, 100 processes and threads, 1.5 cores (cgroup v2)."
    group.close()
    assert not folder.exists()
    assert tree.own.exists()


@pytest.mark.usefixtures("systemd")
def test_v2_own_delegated_group_is_left_for_a_leaf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = Tree(tmp_path, "/user.slice/run-1.scope")
    delegate(monkeypatch, tree.own)
    (tree.own / "cgroup.procs").write_text(f"{os.getpid()}\n")
    moved: list[tuple[Path, str]] = []
    write = cgroup._write

    def kernel(file: Path, text: str) -> None:
        if file.name == "cgroup.procs":
            moved.append((file.parent, text))
            (tree.own / "cgroup.procs").write_text("")
        else:
            write(file, text)

    monkeypatch.setattr(cgroup, "_write", kernel)
    group, said = tree.limit()
    assert group is not None, said
    assert moved == [(tree.own / LEAF, str(os.getpid()))]
    assert group.folders[0].parent == tree.own


@pytest.mark.usefixtures("systemd")
def test_v2_group_of_systemd_is_not_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = Tree(tmp_path, "/user.slice/user-1000.slice/session-3.scope")
    delegate(monkeypatch)
    before = sorted(tmp_path.rglob("*"))
    group, said = tree.limit()
    assert group is None
    assert "managed by systemd and not delegated" in said
    assert "Delegate=yes" in said
    assert sorted(tmp_path.rglob("*")) == before


def test_v2_group_with_others_in_it_is_not_touched(tmp_path: Path) -> None:
    tree = Tree(tmp_path, "/docker/abc", root="/docker/abc")
    (tree.own / "cgroup.procs").write_text(f"{os.getpid()}\n{os.getppid()}\n")
    group, said = tree.limit()
    assert group is None
    assert "1 processes that aren't the server's" in said
    assert (tree.own / "cgroup.procs").read_text() == f"{os.getpid()}\n{os.getppid()}\n"


def test_v2_root_of_the_machine(tmp_path: Path) -> None:
    tree = Tree(tmp_path, "/")
    (tree.own / "cgroup.procs").write_text("1\n2\n")
    group, said = tree.limit()
    assert group is not None, said
    assert group.folders[0].parent == tree.mount


def test_v2_mount_with_a_space_in_its_path(tmp_path: Path) -> None:
    (tmp_path / "a b").mkdir()
    tree = Tree(tmp_path / "a b", "/")
    mountinfo = tree.proc / "mountinfo"
    mountinfo.write_text(mountinfo.read_text().replace("a b", r"a\040b"))
    group, said = tree.limit()
    assert group is not None, said


def test_v2_missing_controllers_are_told(tmp_path: Path) -> None:
    tree = Tree(tmp_path, "/")
    (tree.own / "cgroup.controllers").write_text("pids\n")
    group, said = tree.limit()
    assert group is not None
    assert "100 processes and threads (cgroup v2); this machine has no controller for memory and cpu" in said
    (tree.own / "cgroup.controllers").write_text("hugetlb\n")
    group, said = tree.limit()
    assert group is None
    assert "none of the controllers memory, pids and cpu" in said


@pytest.mark.parametrize(
    ("cgroups", "mountinfo"),
    [
        ("", ""),
        ("0::/\n", "nonsense - \n\n - -"),
        ("4:memory:/elsewhere\n", "30 24 0:26 /here /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"),
        ("0::/../../outside\n", "30 24 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"),
    ],
)
def test_a_system_without_a_group_in_view_says_so(tmp_path: Path, cgroups: str, mountinfo: str) -> None:
    (tmp_path / "cgroup").write_text(cgroups)
    (tmp_path / "mountinfo").write_text(mountinfo)
    group, said = limit_group(1 << 30, 100, 1, proc=tmp_path)
    assert group is None
    assert said.startswith("All sandboxes together have no bound: ")


def test_a_system_without_proc_says_so(tmp_path: Path) -> None:
    group, said = limit_group(1 << 30, 100, 1, proc=tmp_path / "none")
    assert group is None
    assert "this system has no control groups" in said
