"""An interpreter at work: takes programs from its control socket, runs them, and sends back what they made."""

import contextlib
import os
import resource
import socket
import stat
import sys
import time

from . import cell, frames

_TICK_NS = 20_000_000  # more than a tick of any kernel's clock
State = dict[str, tuple[int, int, int]]  # of a file: inode, size, time of change


def serve(control: socket.socket, folder: str, cpu_s: int, most_files: int, most_bytes: int, most_images: int) -> None:
    """Run programs until the server hangs up. `folder` is where their files lie."""
    main = sys.modules["__main__"] = type(sys)("__main__")  # dataclasses and pickle look names up there
    sys.argv[:] = [""]
    sys.set_int_max_str_digits(0)  # time is limited already, and 2**20000 is a fair question
    os.chdir(folder)
    while True:
        message = frames.receive(control)
        if message is None:
            os._exit(0)
        header, (source, *contents) = message
        for name in header["remove"]:
            with contextlib.suppress(OSError):
                os.remove(os.path.join(folder, name))
        gone = [name for name, data in zip(header["files"], contents, strict=True) if not _put(folder, name, data)]
        del message, contents  # else they would count as the program's memory
        _backdate(folder)
        before = _state(folder)
        used = resource.getrusage(resource.RUSAGE_SELF)
        soft = int(used.ru_utime + used.ru_stime) + cpu_s
        hard = soft + 1 if header["last"] else resource.RLIM_INFINITY
        resource.setrlimit(resource.RLIMIT_CPU, (soft, hard))
        code = cell.run(source, main.__dict__)
        images: list[bytes] = []
        try:
            images = cell.figures(most_images)
        except BaseException as error:  # a figure whose text can't be set, or that is too large
            cell.report(error, source)
            code = code or 1
        after = _state(folder)
        gone += [name for name in before if name not in after and name.isprintable() and name[0] != "."]
        names, made, left_out = _changed(folder, before, after, most_files, most_bytes)
        try:
            if left_out:
                sys.stderr.write(f"{left_out} files weren't kept: too many or too large.\n")
            sys.stdout.flush()
            sys.stderr.flush()
        except BaseException:  # the program put something else in their place
            code = code or 1
        reply = {"number": header["number"], "exit_code": code}
        reply |= {"files": names, "images": len(images), "gone": gone[:most_files]}
        for part in frames.pack(reply, [*made, *images]):
            control.sendall(part)


def _state(folder: str) -> State:
    found = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            status = entry.stat(follow_symlinks=False)
            if stat.S_ISREG(status.st_mode):
                found[entry.name] = (status.st_ino, status.st_size, status.st_mtime_ns)
    return found


def _backdate(folder: str) -> None:
    """A file written within one tick of the file system's clock and again at once would look unchanged."""
    now = time.time_ns()
    for name, (_, _, when) in _state(folder).items():
        if abs(now - when) < _TICK_NS:
            with contextlib.suppress(OSError):
                os.utime(os.path.join(folder, name), ns=(when - _TICK_NS, when - _TICK_NS), follow_symlinks=False)


def _put(folder: str, name: str, data: bytes) -> bool:
    """Write a file, unless something of an earlier program's is in its way that isn't one, or the room is too small."""
    path = os.path.join(folder, name)
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_NONBLOCK
        with open(path, "wb", opener=lambda path, _: os.open(path, flags, 0o600)) as file:
            file.write(data)
    except OSError as error:
        sys.stderr.write(f"The file {name} isn't there: {error.strerror}.\n")
        with contextlib.suppress(OSError):
            os.remove(path)
        return False
    return True


def _changed(
    folder: str, before: State, after: State, most_files: int, most_bytes: int
) -> tuple[list[str], list[bytes], int]:
    """Names and contents of new and changed files of the folder itself, and how many more there are."""
    names: list[str] = []
    made: list[bytes] = []
    left = most_bytes
    left_out = 0
    for name, (inode, size, when) in sorted(after.items()):
        if before.get(name) == (inode, size, when) or name[0] == "." or not name.isprintable():
            continue
        if size > left or len(names) == most_files:
            left_out += 1
            continue
        try:
            with open(os.path.join(folder, name), "rb") as file:
                data = file.read(left + 1)
        except OSError:
            continue
        if len(data) <= left:
            names.append(name)
            made.append(data)
            left -= len(data)
    return names, made, left_out
