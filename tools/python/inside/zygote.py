"""The first process of the sandbox: imports the libraries once, then forks an interpreter for each request.

Each interpreter has user, process, mount, IPC, UTS and network namespaces of its own, folders of its own, no
capability, a system call filter and limits, all before it sees a program. The zygote itself never runs one. Forking
costs milliseconds where starting Python and importing the libraries costs seconds.
"""

import base64
import contextlib
import ctypes
import gc
import importlib
import json
import os
import resource
import select
import signal
import socket
import sys
from typing import Any

from . import interpreter

_NAMESPACES = 0x10000000 | 0x20000000 | 0x00020000 | 0x08000000 | 0x04000000 | 0x40000000  # user pid mnt ipc uts net
_NOSUID, _NODEV, _NOEXEC, _RDONLY, _REMOUNT, _BIND = 2, 4, 8, 1, 32, 4096
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS = 1, 4, 22, 24, 38
_SECCOMP_MODE_FILTER = 2
_LINUX_CAPABILITY_VERSION_3 = 0x20080522
_CLONE = {"x86_64": 56, "aarch64": 220}
_CLONE_PIDFD = 0x00001000
_MADV_COLLAPSE, _HUGE = 25, 2 << 20
_STOP_MS, _STOP_TRIES = 20, 50
_raw = ctypes.PyDLL(None, use_errno=True)  # keeps the interpreter's lock: a clone has none of the threads that wait


def main() -> None:
    """Arguments: the mode ("fork" or "single"), the control descriptor, and the settings as JSON."""
    mode, descriptor, settings = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
    control = socket.socket(fileno=descriptor)
    sys.path += settings["path"]
    if mode == "single":
        _raw.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        _limit(settings, settings["memory"])
        _open_output(settings["output"])
        control.sendall(b"r")
        _serve(control, settings)
    if settings["drop_to"]:
        _drop(settings["drop_to"])
    _import(settings["packages"])
    gc.collect()
    gc.freeze()  # what is shared stays shared: no fork writes to its reference counts
    settings |= {"user": os.getuid(), "group": os.getgid()}  # within the namespaces to come they are unknown
    settings["opened"] = _open_files()
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # a machine out of memory ends programs before the server
    with open("/proc/self/statm") as file:
        settings["base"] = int(file.read().split()[0]) * resource.getpagesize()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for supervisors: they tell the server themselves
    _collapse()
    control.sendall(b"r")
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, 1, 3)
        if not message:
            os._exit(0)
        child, handle = _clone(_NAMESPACES)
        if child == 0:
            control.close()
            _supervise(settings, *descriptors)
        with socket.socket(fileno=descriptors.pop()) as said, contextlib.suppress(OSError):  # the server gave it up
            if child > 0:
                socket.send_fds(said, [b"p"], [handle])
            else:
                said.sendall(f"!new namespaces: {os.strerror(handle)}".encode())
        if child > 0:
            os.close(handle)
        for opened in descriptors:
            os.close(opened)


def _clone(flags: int) -> tuple[int, int]:
    """A fork into new namespaces: (0, 0) in the child, else its process id and descriptor, or (-1, errno).

    One fork fewer than `unshare` would take, and it is forks of so large a process that cost. No Python lock is
    taken: there is no other thread.
    """
    handle = ctypes.c_int(-1)
    call = _CLONE[os.uname().machine]
    child = _raw.syscall(call, _CLONE_PIDFD | flags | signal.SIGCHLD, None, ctypes.byref(handle), None, None)
    if child < 0:
        return -1, ctypes.get_errno()
    return child, handle.value if child else 0


def _supervise(settings: dict[str, Any], control: int, output: int, status: int) -> None:
    """As process 1, whose end is the end of all in its namespace: fork the interpreter, tell how it ended.

    The interpreter isn't process 1 itself because the kernel spares that one most signals. On `status` the server
    says when to stop it ("s") and when to let it go on ("c"); it goes when the server hangs up.
    """
    said = socket.socket(fileno=status)
    try:
        os.setsid()  # else a signal to its process group would reach the zygote and all other interpreters
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        _settle(settings)
        _drop_capabilities()
        child = os.fork()
        if child == 0:
            said.close()
            _interpret(settings, control, output)
        os.close(control)
        os.close(output)
        _watch(child, said)
        said.sendall(b"%d\n" % os.waitpid(child, 0)[1])
    except BaseException as error:
        with contextlib.suppress(OSError):
            said.sendall(f"!{type(error).__name__}: {error}".encode())
    os._exit(0)


def _watch(child: int, said: socket.socket) -> None:
    """Until the interpreter ends, do what the server says.

    Threads that keep telling one another to go on can break a stop off before it has reached all of them. One that
    the kernel calls complete is: nobody is left who could. An interpreter that can't be stopped is ended.
    """
    ended = os.pidfd_open(child)
    poll = select.poll()
    poll.register(ended, select.POLLIN)
    poll.register(said, select.POLLIN)
    tries = 0
    while True:
        ready = dict(poll.poll(_STOP_MS if tries else None))
        if ended in ready:
            return
        if ready:
            commands = said.recv(64)
            if not commands:
                os._exit(0)
            for command in commands:
                tries = _STOP_TRIES if command == ord("s") else 0
                os.kill(child, signal.SIGSTOP if tries else signal.SIGCONT)
        elif os.waitid(os.P_PID, child, os.WSTOPPED | os.WNOHANG) is not None:
            tries = 0
        else:
            tries -= 1
            os.kill(child, signal.SIGSTOP if tries else signal.SIGKILL)


def _interpret(settings: dict[str, Any], control: int, output: int) -> None:
    """As the interpreter: give up what is left, then serve."""
    try:
        _open_output(output)
        os.close(0)
        os.open("/dev/null", os.O_RDONLY)
        for descriptor, path in settings["opened"]:
            _open_anew(descriptor, path)
        _limit(settings, settings["base"] + settings["memory"])
        if (numpy := sys.modules.get("numpy")) is not None:
            numpy.random.seed()  # else every interpreter would draw the same numbers
        if (sympy := sys.modules.get("sympy.core.random")) is not None:
            sympy.rng.seed()
        _load_filter(base64.b64decode(settings["filter"]))
        with socket.socket(fileno=control) as channel:
            channel.sendall(b"r")
            _serve(channel, settings)
    except BaseException as error:
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
    os._exit(70)


def _serve(control: socket.socket, settings: dict[str, Any]) -> None:
    interpreter.serve(
        control, settings["folder"], settings["cpu"], settings["files"], settings["files_bytes"], settings["images"]
    )


def _drop(user: int) -> None:
    """From root to an unprivileged user, outside of any user namespace."""
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)
    _check(_raw.prctl(_PR_SET_DUMPABLE, 1), "prctl")  # else /proc/self would stay root's


def _import(packages: list[str]) -> None:
    """Import what programs may want, and use it once: the first figure costs what the next hundred do."""
    for name in packages:
        importlib.import_module(name)
    if "matplotlib" in packages:
        import io

        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        pyplot.plot([0, 1], [0, 1])
        pyplot.title("$x$")
        pyplot.savefig(io.BytesIO(), format="png")
        pyplot.close("all")
        pyplot.show = lambda *_, **__: None  # what is open at a program's end is shown
    if "pandas" in packages:
        import pandas

        repr(pandas.DataFrame({"a": [1.5, 2.5], "b": ["x", "y"]}).describe())
    if "sympy" in packages:
        import sympy

        str(sympy.solve(sympy.Symbol("x") ** 2 - 2))


def _collapse() -> None:
    """Ask for huge pages: a fork copies one entry for each of them, where it would copy 512. Older Linux says no."""
    with open("/proc/self/maps") as file:
        lines = file.read().splitlines()
    for line in lines:
        place, rights, _, _, inode, *name = line.split()
        begin, end = (int(number, 16) for number in place.split("-"))
        if rights.startswith("rw") and inode == "0" and name != ["[stack]"] and end - begin >= _HUGE:
            _raw.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _MADV_COLLAPSE)


def _open_files() -> list[tuple[int, str]]:
    """The files that libraries keep open (fonts, for one), to be opened anew: forks would share their positions."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the listing's own
            path = os.readlink(f"/proc/self/fd/{name}")
            if int(name) > 2 and path.startswith("/") and os.path.isfile(path):
                found.append((int(name), path))
    return found


def _open_anew(descriptor: int, path: str) -> None:
    try:
        position = os.lseek(descriptor, 0, os.SEEK_CUR)
    except OSError:  # closed by what its library does after a fork
        return
    opened = os.open(path, os.O_RDONLY)
    os.lseek(opened, position, os.SEEK_SET)
    os.dup2(opened, descriptor)
    os.close(opened)


def _settle(settings: dict[str, Any]) -> None:
    """Keep the user's number in the new user namespace, and mount folders of its own."""
    for name, id_ in (("setgroups", None), ("uid_map", settings["user"]), ("gid_map", settings["group"])):
        with open(f"/proc/self/{name}", "w") as file:
            file.write("deny" if id_ is None else f"{id_} {id_} 1")
    for device in settings["devices"]:  # they are the machine's own, and their modes could be changed by their owner
        flags = _REMOUNT | _BIND | _NOSUID | _RDONLY
        _check(_raw.mount(None, device.encode(), None, flags, None), f"protect {device}")
    _mount("/tmp", settings["tmp_bytes"], 0o700)
    _mount("/dev/shm", settings["tmp_bytes"], 0o700)
    _mount(settings["folder"], settings["files_bytes"], 0o700)
    _mount("/proc", 4096, 0o555, _RDONLY)  # the zygote's own, whose mount can't be undone from here, is covered


def _mount(path: str, size: int, mode: int, flags: int = 0) -> None:
    options = f"size={size},nr_inodes={1024 + size // 16384},mode={mode:o}"
    flags |= _NOSUID | _NODEV | _NOEXEC
    _check(_raw.mount(b"tmpfs", path.encode(), b"tmpfs", flags, options.encode()), f"mount {path}")


def _open_output(descriptor: int) -> None:
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


def _limit(settings: dict[str, Any], memory: int) -> None:
    """Hard limits for good. `threads` 0 leaves the host's: outside a user namespace the count is the whole user's."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_FSIZE, (settings["file_bytes"], settings["file_bytes"]))
    resource.setrlimit(resource.RLIMIT_NOFILE, (settings["open_files"], settings["open_files"]))
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, 0))
    resource.setrlimit(resource.RLIMIT_MSGQUEUE, (0, 0))
    resource.setrlimit(resource.RLIMIT_SIGPENDING, (256, 256))
    if settings["threads"]:
        resource.setrlimit(resource.RLIMIT_NPROC, (settings["threads"], settings["threads"]))


def _drop_capabilities() -> None:
    """All of them, and the way to new ones."""
    prctl = _raw.prctl
    _check(prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl")
    capability = 0
    while prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0) == 0:  # fails past the last one
        capability += 1
    header = (ctypes.c_uint32 * 2)(_LINUX_CAPABILITY_VERSION_3, 0)
    _check(_raw.capset(header, (ctypes.c_uint32 * 6)()), "capset")


def _load_filter(code: bytes) -> None:
    program = ctypes.create_string_buffer(code, len(code))

    class Program(ctypes.Structure):  # struct sock_fprog
        _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))

    found = Program(len(code) // 8, ctypes.addressof(program))
    _check(_raw.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(found), 0, 0), "seccomp")


def _check(result: int, what: str) -> None:
    if result != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{what}: {os.strerror(error)}")
