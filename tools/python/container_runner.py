"""What runs in a container, as its first process: it forks the interpreter, and carries messages to and from it.

`container.py` hands this file's text to `python -I -c` in the image, so it imports the standard library alone. The
first process is out of the program's reach as far as Linux keeps it so: the kernel drops signals to it, and it can't
be traced. Still no promise rests on it: the server checks and bounds all that comes from here.

A message is one letter, 4 bytes of length (big-endian) and the content.
From the server: J settings (JSON), F a file (name, zero byte, content), X a program (b"1" if it is the last, else
b"0", and the source), L end of the program: stop it and list what it made.
To the server: R ready (names of the imported packages, JSON), W a file that can't be put, S the program starts, T text
that it printed, C bytes from the interpreter, X the interpreter's exit code, F a file, E all files are sent. The
interpreter's own bytes are messages too: G ready, I a figure, D done with this exit code.
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
import stat
import struct
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, NoReturn

FOLDER = "/mnt/data"
HEAD = struct.Struct(">cI")
CHUNK = 1 << 16
PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 4, 22, 38
SECCOMP_MODE_FILTER = 2


def send(target: int, kind: bytes, content: bytes = b"") -> None:
    """Write a message whole."""
    for part in (HEAD.pack(kind, len(content)), content):
        view = memoryview(part)
        while view:
            view = view[os.write(target, view) :]


def receive(source: int) -> tuple[bytes, bytearray] | None:
    """Read a message whole; None at the end of the stream."""
    head = _read(source, HEAD.size)
    if head is None:
        return None
    kind, size = HEAD.unpack(head)
    content = _read(source, size)
    return None if content is None else (kind, content)


def _read(source: int, count: int) -> bytearray | None:
    data = bytearray(count)
    view = memoryview(data)
    while view:
        got = os.readv(source, [view])
        if not got:
            return None
        view = view[got:]
    return data


# -- the interpreter


def interpret(control: int, settings: dict[str, Any], cell: ModuleType) -> NoReturn:
    """Run programs until the first process hangs up."""
    _set_dumpable(1)  # or its own /proc/self would be closed to it
    with open("/proc/self/statm") as file:
        memory = int(file.read().split()[0]) * resource.getpagesize() + settings["memory"]
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:  # gVisor has no such file
        file.write("1000")
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed()  # else every program of this container's pool would draw what the fork inherited
    main = sys.modules["__main__"] = ModuleType("__main__")  # dataclasses and pickle look names up there
    sys.argv[:] = [""]
    sys.set_int_max_str_digits(0)  # time is limited already, and 2**20000 is a fair question
    os.chdir(FOLDER)
    if (code := settings["filters"].get(os.uname().machine)) is not None:
        _load_filter(base64.b64decode(code))
    send(control, b"G")
    while (message := receive(control)) is not None:
        last, source = message[1][:1] == b"1", bytes(message[1][1:])
        used = resource.getrusage(resource.RUSAGE_SELF)
        soft = int(used.ru_utime + used.ru_stime) + settings["cpu"]
        resource.setrlimit(resource.RLIMIT_CPU, (soft, soft + 1 if last else resource.RLIM_INFINITY))
        code = cell.run(source, main.__dict__)
        try:
            room = settings["image_bytes"]
            for figure in cell.figures(settings["images"]):
                room -= len(figure)
                if room < 0:
                    sys.stderr.write("The figures are too large to be shown: lower their size or dpi.\n")
                    break
                send(control, b"I", figure)
        except BaseException as error:  # a figure whose text can't be set, or that is too large
            cell.report(error, source)
            code = code or 1
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        except BaseException:  # the program put something else in their place
            code = code or 1
        send(control, b"D", str(code).encode())
    os._exit(0)


def prepare(packages: list[str]) -> list[str]:
    """Import what programs may want and the image has; returns their names."""
    found = []
    for name in packages:
        try:
            importlib.import_module(name)
            found.append(name)
        except Exception:  # not in the image, or broken there: a program that imports it is told what is wrong
            continue
    if "matplotlib" in found:
        from io import BytesIO

        from matplotlib import pyplot

        pyplot.plot([0, 1])
        pyplot.savefig(BytesIO(), format="png")  # the first figure costs what the next hundred do
        pyplot.close("all")
        pyplot.show = lambda *_, **__: None  # what is open at a program's end is shown
    gc.collect()
    gc.freeze()  # what is shared stays shared: no collection writes to it
    return found


# -- the first process


class Supervisor:
    """Carries messages between the server and the interpreter. Ends, and all with it, when the server hangs up."""

    def __init__(self, server_in: int, server_out: int) -> None:
        self.server_in, self.server_out = server_in, server_out
        message = receive(server_in)
        if message is None:
            os._exit(0)
        for folder in (FOLDER, "/tmp"):
            if not os.access(folder, os.W_OK):  # older runtimes give a tmpfs the mode that the image's folder has
                sys.exit(f"its {folder} can't be written: give that folder of the image the mode 1777")
        self.settings: dict[str, Any] = json.loads(message[1])
        cell = ModuleType("cell")
        exec(compile(self.settings["cell"], "cell.py", "exec"), cell.__dict__)
        packages = prepare(self.settings["packages"])
        self.before: dict[str, tuple[int, int, int]] = {}
        self.code: int | None = None
        self.woken, wake = os.pipe()
        for end in (self.woken, wake):
            os.set_blocking(end, False)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        self.text, self.control = self._fork(cell)
        if receive(self.control) is None:
            os.set_blocking(self.text, True)
            sys.exit(f"its interpreter can't be confined: {os.read(self.text, CHUNK).decode('utf-8', 'replace')}")
        send(server_out, b"R", json.dumps(packages).encode())

    def _fork(self, cell: ModuleType) -> tuple[int, int]:
        text, text_end = os.pipe()
        control, control_end = socket.socketpair()
        self.child = os.fork()
        if self.child == 0:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.setsid()
            for end in (1, 2):
                os.dup2(text_end, end)
            os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
            mine = os.dup2(control_end.detach(), 3, inheritable=False)
            os.closerange(4, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
            interpret(mine, self.settings, cell)
        os.close(text_end)
        control_end.close()
        os.set_blocking(text, False)
        return text, control.detach()

    def serve(self) -> NoReturn:
        poll = select.poll()
        handlers: dict[int, Callable[[], bool]] = {
            self.server_in: self._command,
            self.text: self._text,
            self.control: self._control,
            self.woken: self._reap,
        }
        for end in handlers:
            poll.register(end, select.POLLIN)
        while True:
            for end, _ in poll.poll():
                if not handlers[end]():
                    poll.unregister(end)

    def _command(self) -> bool:
        message = receive(self.server_in)
        if message is None:
            os._exit(0)  # and the kernel ends whoever is left in here
        kind, content = message
        if kind == b"F":
            self._put(content)
        elif kind == b"X":
            signal_others(signal.SIGCONT)
            self.before = self._state()
            send(self.server_out, b"S")
            with contextlib.suppress(OSError):  # it died: its exit code is on its way
                send(self.control, kind, bytes(content))
        elif kind == b"L":
            signal_others(signal.SIGSTOP)  # nothing is left running between the programs of a session
            self._drain()
            self._list()
        return True

    def _text(self) -> bool:
        """Carry on a piece of what was printed; False at the end of it, when nobody can print any more."""
        try:
            chunk = os.read(self.text, CHUNK)
        except BlockingIOError:
            return True
        if chunk:
            send(self.server_out, b"T", chunk)
        return bool(chunk)

    def _drain(self) -> None:
        while select.select([self.text], [], [], 0)[0] and self._text():
            pass

    def _control(self) -> bool:
        try:
            chunk = os.read(self.control, CHUNK)
        except OSError:
            return False
        if chunk:
            send(self.server_out, b"C", chunk)
        return bool(chunk)

    def _reap(self) -> bool:
        with contextlib.suppress(BlockingIOError):
            while os.read(self.woken, 64):
                pass
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    break
                if pid == self.child:
                    self._drain()  # all that it printed, and then how it ended
                    code = os.waitstatus_to_exitcode(status)
                    send(self.server_out, b"X", str(128 - code if code < 0 else code).encode())
        return True

    def _put(self, content: bytearray) -> None:
        name, _, data = content.partition(b"\0")
        path = os.path.join(FOLDER, name.decode())
        try:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)  # a program may have left a link or a pipe in its place
            with open(path, "xb") as file:
                file.write(data)
            os.utime(path, (1, 1))  # so that any change shows, however soon it comes
        except OSError as error:
            send(self.server_out, b"W", f"{name.decode()} can't be put into {FOLDER}: {error.strerror}\n".encode())

    def _state(self) -> dict[str, tuple[int, int, int]]:
        found = {}
        with os.scandir(FOLDER) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):
                    status = entry.stat(follow_symlinks=False)
                    if stat.S_ISREG(status.st_mode):
                        found[entry.name] = (status.st_ino, status.st_size, status.st_mtime_ns)
        return found

    def _list(self) -> None:
        """Send new and changed files, of the folder itself and not of folders below it."""
        left, room = self.settings["files_bytes"], self.settings["files"]
        for name, state in sorted(self._state().items()):
            if self.before.get(name) == state or name[0] == "." or not name.isprintable():
                continue
            if state[1] > left or room == 0:
                continue
            try:
                path = os.open(os.path.join(FOLDER, name), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
                with open(path, "rb") as file:
                    data = file.read(left)
            except OSError:  # its mode forbids reading it, or it went away
                continue
            left, room = left - len(data), room - 1
            send(self.server_out, b"F", name.encode() + b"\0" + data)
        send(self.server_out, b"E")


def signal_others(number: signal.Signals) -> None:
    """To all processes of the container but this one. Twice: the first may cross a fork."""
    for _ in range(2):
        with contextlib.suppress(ProcessLookupError):
            os.kill(-1, number)


def _set_dumpable(value: int) -> None:
    """0: no process of the same user can trace this one or open what it has open."""
    ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, value, 0, 0, 0)


def _load_filter(code: bytes) -> None:
    """Close the system calls that a program has no use for, beside those that the engine has closed."""
    program = ctypes.create_string_buffer(code, len(code))

    class Program(ctypes.Structure):  # struct sock_fprog
        _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))

    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    found = Program(len(code) // 8, ctypes.addressof(program))
    if libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(found), 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "seccomp")


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    server_in, server_out = os.dup(0), os.dup(1)
    _set_dumpable(0)
    Supervisor(server_in, server_out).serve()


if __name__ == "__main__":
    main()
