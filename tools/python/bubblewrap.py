"""The command that opens the outer sandbox: what it may see of the machine, and that nothing else is reachable."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from tools.python.backend import Limits

NOBODY = 65534
FOLDER = "/mnt/data"  # where a program's files lie, and where it starts
PACKAGES = "/python/packages"
DEVICES = ("null", "zero", "random", "urandom")
_INSIDE = Path(__file__).parent / "inside"
_PYTHON = Path(os.path.realpath(sys.executable))


def wrap(
    bwrap: str, packages: Mapping[str, Path], *, user_namespace: bool, proc: bool, limits: Limits, filter_fd: int | None
) -> list[str]:
    """The command up to and including the interpreter.

    The interpreter lies under /python inside, wherever it is outside: its path may name a person's home. Without
    `user_namespace` the process inside is root until it drops to nobody, which takes a server that is root.
    `filter_fd`: a system call filter that is loaded before the interpreter starts. `proc` is for the zygote, which
    write-protects the devices; without it there are only those that aren't the server's to change the mode of.
    """
    base = Path(sys.base_prefix)
    library = f"lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
    command = [bwrap, "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]
    command += ["--die-with-parent", "--new-session", "--hostname", "sandbox", "--cap-drop", "ALL"]
    if user_namespace:
        command += ["--unshare-user", "--uid", str(NOBODY), "--gid", str(NOBODY)]
    else:
        command += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    if filter_fd is not None:
        command += ["--seccomp", str(filter_fd)]
    command += ["--clearenv", "--setenv", "HOME", "/tmp", "--setenv", "LANG", "C.UTF-8"]
    command += ["--setenv", "LD_LIBRARY_PATH", "/python/lib", "--setenv", "MPLBACKEND", "Agg"]
    command += ["--setenv", "MALLOC_ARENA_MAX", "1"]  # else each thread would claim 64 MiB of the address space
    for threads in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        command += ["--setenv", threads, "1"]  # a program has one core, and what has threads can't be forked
    for name in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE"):  # set by an operator whose processor needs them
        if name in os.environ:
            command += ["--setenv", name, os.environ[name]]
    for folder in ("/dev", "/mnt", "/python", PACKAGES, "/python/whetstone", "/usr", "/usr/share"):
        command += ["--perms", "0755", "--dir", folder]  # what bubblewrap makes on the way to a mount is for root only
    for folder in ("lib", "lib64", "lib32"):
        command += ["--ro-bind-try", f"/usr/{folder}", f"/usr/{folder}"]
        if os.path.islink(f"/{folder}"):
            command += ["--symlink", f"usr/{folder}", f"/{folder}"]
        else:
            command += ["--ro-bind-try", f"/{folder}", f"/{folder}"]
    command += ["--ro-bind-try", "/usr/share/zoneinfo", "/usr/share/zoneinfo"]
    command += ["--ro-bind", str(base / "lib"), "/python/lib"]
    command += ["--ro-bind-try", str(base / "lib64"), "/python/lib64"]
    command += ["--ro-bind", str(_PYTHON), "/python/bin/python"]
    if (base / library).is_dir():
        command += ["--tmpfs", f"/python/{library}", "--remount-ro", f"/python/{library}"]
    command += ["--ro-bind", str(_INSIDE), "/python/whetstone/inside"]
    for name, path in packages.items():
        command += ["--ro-bind", str(path), f"{PACKAGES}/{name}"]
    for device in DEVICES:
        if proc or os.stat(f"/dev/{device}").st_uid != os.getuid():
            command += ["--dev-bind", f"/dev/{device}", f"/dev/{device}"]
    if proc:
        command += ["--proc", "/proc"]
    for folder, size in (("/dev/shm", limits.tmp_bytes), ("/tmp", limits.tmp_bytes), (FOLDER, limits.files_bytes)):
        command += ["--perms", "1777", "--size", str(size), "--tmpfs", folder]
    return [*command, "--remount-ro", "/", "--chdir", "/tmp", "--", "/python/bin/python"]


def start(path: str) -> list[str]:
    """The interpreter's own arguments: run the zygote that lies in the package `inside` under `path`."""
    code = f"import sys; sys.path.insert(0, {path!r}); from inside import zygote; del sys.path[0]; zygote.main()"
    return ["-I", "-S", "-B", "-u", "-X", "utf8", "-c", code]


def unwrapped() -> tuple[list[str], str]:
    """The interpreter without a sandbox, and the path of `inside` for it."""
    return [str(_PYTHON)], str(_INSIDE.parent)
