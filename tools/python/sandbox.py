"""Run one Python program in a sandbox of its own: `await run_python("2 + 2")`.

Covered, by bubblewrap's namespaces, a system call filter and limits:
- files: a view of its own with the interpreter's library and the system's shared libraries, read-only, and a small
  private /tmp; no /etc, no home, no /proc, no repository, no environment, no inherited file descriptor
- network: a network namespace without interfaces, and no sockets at all
- other processes: process, IPC and user namespaces; no fork, so the limits of one process are the program's
- time, CPU, address space, threads, open files, file size, /tmp size and output; past one, the program is stopped
- state: a fresh process for every call, gone with its parent
Not covered:
- a hole in the kernel: this isn't a virtual machine. The filter closes the doors that such holes are found behind
- a share of the machine: there is no cgroup. A program may use its memory, its /tmp, the kernel's memory for as many
  files as it can make in its seconds, and one core, at the same time as others up to the bound on concurrent calls
- timing and other side channels
- started by root, the uid inside is unprivileged and has no capability, yet outside it is root's: prefer a service user
- `unsafe_without_sandbox`: only the limits, an empty environment and a folder of its own; it reads what you can read
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from weakref import WeakKeyDictionary

from tools.python import seccomp

_RUNNER = (Path(__file__).parent / "runner.py").read_text(encoding="utf-8")
_PYTHON = os.path.realpath(sys.executable)
_PYTHON_FLAGS = ("-I", "-S", "-B", "-u", "-X", "utf8")
_MAX_CONCURRENT = (os.cpu_count() or 1) * 2
_NOBODY = "65534"
_WAY_OUT = (
    "Install bubblewrap 0.8 or newer (apt install bubblewrap, dnf install bubblewrap) and allow user namespaces, "
    "or accept the risk with the option unsafe_without_sandbox."
)

_REAP_S = 5.0


class SandboxUnavailable(RuntimeError):
    """There is no working bubblewrap here. The message says why and the way out."""


@dataclass(frozen=True)
class Limits:
    """What one program may use. Sizes in bytes, times in seconds; `threads` counts the main one."""

    wall_s: float = 8.0
    cpu_s: int = 5
    memory_bytes: int = 512 << 20
    tmp_bytes: int = 32 << 20
    file_bytes: int = 16 << 20
    open_files: int = 64
    threads: int = 16
    output_bytes: int = 16 << 10
    code_bytes: int = 100_000


@dataclass(frozen=True)
class PythonResult:
    """`text` is stdout and stderr in the order written. `exit_code` is 128 + n after signal n, as in a shell."""

    text: str
    exit_code: int
    timed_out: bool
    truncated: bool
    seconds: float


async def run_python(code: str, limits: Limits = Limits(), *, unsafe_without_sandbox: bool = False) -> PythonResult:
    """Run `code` in a fresh interpreter. Raises SandboxUnavailable; all that the code does wrong is in the result.

    Cancelling the call kills the program. At most twice the CPU count run at once; the others wait their turn,
    which isn't on their clock.
    """
    source = code.encode("utf-8", "replace")
    if len(source) > limits.code_bytes:
        text = f"The program is {len(source)} bytes long; at most {limits.code_bytes} are run."
        return PythonResult(text, exit_code=1, timed_out=False, truncated=False, seconds=0.0)
    bwrap = shutil.which("bwrap")
    if not unsafe_without_sandbox:
        await _require(bwrap)
    async with _turn():
        if bwrap is None or not await _works(bwrap):
            with tempfile.TemporaryDirectory(prefix="whetstone-", ignore_cleanup_errors=True) as folder:
                command = [_PYTHON, *_runner(limits, sandboxed=False)]
                return await _run(command, source, limits, cwd=folder)
        with _filter() as filter_fd:
            command = [*_wrap(bwrap, limits.tmp_bytes, filter_fd), *_runner(limits, sandboxed=True)]
            return await _run(command, source, limits, cwd="/", pass_fds=(filter_fd,))


_turns: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore] = WeakKeyDictionary()


def _turn() -> asyncio.Semaphore:
    """A semaphore serves one event loop only, so each loop has one."""
    return _turns.setdefault(asyncio.get_running_loop(), asyncio.Semaphore(_MAX_CONCURRENT))


_working: set[str] = set()  # bubblewraps that ran a program; failures are tried again, they may have been mended
_failures: dict[str, str] = {}


async def _works(bwrap: str) -> bool:
    """Can this bubblewrap start Python here? Containers and some distributions forbid user namespaces."""
    if bwrap in _working:
        return True
    if not seccomp.supported():
        _failures[bwrap] = f"there is no system call filter for the machine {os.uname().machine}"
        return False
    limits = Limits(wall_s=60.0)  # a machine busy with training starts slowly, and that is no fault
    with _filter() as filter_fd:
        command = [*_wrap(bwrap, limits.tmp_bytes, filter_fd), *_runner(limits, sandboxed=True)]
        result = await _run(command, b"print('ready')", limits, cwd="/", pass_fds=(filter_fd,))
    if result.text == "ready\n":
        _working.add(bwrap)
        return True
    _failures[bwrap] = f"{bwrap} failed to start Python: {result.text.strip() or f'exit code {result.exit_code}'}"
    return False


async def _require(bwrap: str | None) -> None:
    if bwrap is None:
        raise SandboxUnavailable(f"The Python sandbox needs the program bwrap, which isn't installed. {_WAY_OUT}")
    if not await _works(bwrap):
        raise SandboxUnavailable(f"The Python sandbox doesn't work here: {_failures[bwrap]}. {_WAY_OUT}")


def _runner(limits: Limits, *, sandboxed: bool) -> list[str]:
    threads = limits.threads + 1 if sandboxed else 0  # bubblewrap's own first process counts too
    numbers = (limits.cpu_s, limits.memory_bytes, threads, limits.file_bytes, limits.open_files)
    return [*_PYTHON_FLAGS, "-c", _RUNNER, *map(str, numbers)]


def _wrap(bwrap: str, tmp_bytes: int, filter_fd: int) -> list[str]:
    """The command that opens the sandbox, up to and including the interpreter.

    The interpreter lies under /python inside, wherever it is outside: its path may name a person's home.
    """
    base = Path(sys.base_prefix)
    library = f"lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
    command = [bwrap, "--unshare-user", "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts"]
    command += ["--unshare-cgroup-try", "--die-with-parent", "--new-session", "--hostname", "sandbox"]
    command += ["--uid", _NOBODY, "--gid", _NOBODY, "--cap-drop", "ALL", "--seccomp", str(filter_fd)]
    command += ["--clearenv", "--setenv", "HOME", "/tmp", "--setenv", "LANG", "C.UTF-8"]
    command += ["--setenv", "LD_LIBRARY_PATH", "/python/lib"]
    for folder in ("lib", "lib64", "lib32"):
        command += ["--ro-bind-try", f"/usr/{folder}", f"/usr/{folder}"]
        if os.path.islink(f"/{folder}"):
            command += ["--symlink", f"usr/{folder}", f"/{folder}"]
        else:
            command += ["--ro-bind-try", f"/{folder}", f"/{folder}"]
    command += ["--ro-bind-try", "/usr/share/zoneinfo", "/usr/share/zoneinfo"]
    command += ["--ro-bind", str(base / "lib"), "/python/lib"]
    command += ["--ro-bind-try", str(base / "lib64"), "/python/lib64"]
    command += ["--ro-bind", _PYTHON, "/python/bin/python"]
    if (base / library).is_dir():
        command += ["--tmpfs", f"/python/{library}", "--remount-ro", f"/python/{library}"]
    for device in ("null", "zero", "random", "urandom"):
        command += ["--dev-bind", f"/dev/{device}", f"/dev/{device}"]
    command += ["--size", str(tmp_bytes), "--tmpfs", "/dev/shm"]
    command += ["--size", str(tmp_bytes), "--tmpfs", "/tmp", "--remount-ro", "/", "--chdir", "/tmp"]
    return [*command, "--", "/python/bin/python"]


@contextlib.contextmanager
def _filter() -> Iterator[int]:
    """A descriptor that bubblewrap reads the system call filter from; one a call, as reading moves its position."""
    fd = os.memfd_create("seccomp")
    try:
        os.write(fd, seccomp.program())
        os.lseek(fd, 0, os.SEEK_SET)
        yield fd
    finally:
        os.close(fd)


async def _run(
    command: list[str], source: bytes, limits: Limits, *, cwd: str, pass_fds: tuple[int, ...] = ()
) -> PythonResult:
    """Feed `source` to the command and read its output, until it ends or passes a limit."""
    began = time.monotonic()
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        cwd=cwd,
        env={},
        start_new_session=True,
        pass_fds=pass_fds,
    )
    output = bytearray()
    timed_out = truncated = False
    try:
        async with asyncio.timeout(limits.wall_s):
            truncated = await _converse(process, source, output, limits.output_bytes)
            if not truncated:
                await process.wait()
    except TimeoutError:
        timed_out = True
    finally:
        _kill(process)
        await asyncio.shield(_reap(process))
    status = process.returncode or 0
    exit_code = 128 - status if status < 0 else status
    timed_out = timed_out or (exit_code == 128 + signal.SIGXCPU and not truncated)
    text = output.decode("utf-8", "replace")
    return PythonResult(text, exit_code, timed_out, truncated, time.monotonic() - began)


async def _converse(process: asyncio.subprocess.Process, source: bytes, output: bytearray, cap: int) -> bool:
    """Write the program, read what it prints into `output`, at most `cap` bytes. True if there was more."""
    assert process.stdin is not None
    assert process.stdout is not None
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # died before it read: the exit code tells
        process.stdin.write(source)
        await process.stdin.drain()
        process.stdin.close()
    while chunk := await process.stdout.read(1 << 16):
        output += chunk[: cap - len(output) + 1]
        if len(output) > cap:
            del output[cap:]
            return True
    return False


async def _reap(process: asyncio.subprocess.Process) -> None:
    """Wait for the end of a process that has ended or been killed.

    asyncio tells of it only once the output is read to its end, and it stops reading while much is unread. Without a
    sandbox a program's child may hold the output open: it isn't waited for.
    """
    assert process.stdout is not None
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_REAP_S):
            while await process.stdout.read(1 << 16):
                pass
            await process.wait()


def _kill(process: asyncio.subprocess.Process) -> None:
    """Kill the process and its group; bubblewrap's children die with it, whatever group they chose."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
