"""The files of each conversation: what a person uploaded, what programs wrote, and the figures that they drew.

    root/<conversation>/files/<name>       uploaded, or written by a program; programs find them in /mnt/data
    root/<conversation>/images/<hash>.png figures

Names and bytes come from strangers and from hostile programs, so nothing here follows a symbolic link, a name is one
plain name, and a conversation's room is bounded. Any number of threads and processes may use the same root.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import io
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from tools.file_rules import (
    BadImage,
    BadName,
    FileMissing,
    WorkspaceError,
    WorkspaceFull,
    check_name,
    check_png,
    look_of,
    media_type_of,
)

if TYPE_CHECKING:
    from tools.python.backend import File

__all__ = ["BadImage", "BadName", "FileInfo", "FileMissing", "WorkspaceError", "WorkspaceFull", "Workspaces"]

_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_TEMPORARY = ".part-"
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # a named pipe in the way doesn't hold us up


@dataclass(frozen=True)
class FileInfo:
    """`bytes` is the size; `media_type` is guessed from the name; `modified_at` is in UTC."""

    name: str
    bytes: int
    media_type: str
    modified_at: datetime


class Workspaces:
    """The files of all conversations, under `root`. Every call blocks for as long as the disk does.

    `max_bytes` bounds one conversation's files and figures together, `max_files` the number of each. A conversation
    that has no files yet is an empty one. Raises BadName for an id that can't be a conversation's.
    """

    def __init__(self, root: Path, max_bytes: int = 64 << 20, max_files: int = 100) -> None:
        self.root = root
        self.max_bytes = max_bytes
        self.max_files = max_files

    def files(self, conversation_id: str) -> list[FileInfo]:
        """The conversation's files by name, without its figures."""
        with self._open(conversation_id, "files") as folder:
            return [] if folder is None else [_info(name, found) for name, found in _scan(folder)]

    def read(self, conversation_id: str, name: str) -> bytes:
        """Raises FileMissing and BadName."""
        return self._read(conversation_id, "files", check_name(name))

    def path(self, conversation_id: str, name: str) -> Path:
        """Where the file lies, for a reader that takes a path. Raises FileMissing and BadName."""
        return self._path(conversation_id, "files", check_name(name))

    def open(self, conversation_id: str, name: str) -> io.BufferedReader:
        """For reading bit by bit; the caller closes it. Raises FileMissing and BadName."""
        return self._reader(conversation_id, "files", check_name(name))

    def write(self, conversation_id: str, name: str, data: bytes) -> FileInfo:
        """Keep `data` as `name`, in place of what had that name; on disk when this returns.

        Raises BadName, also for a name that differs from another file's by case or look alone, and WorkspaceFull.
        """
        return self._write(conversation_id, [(name, data)])[0]

    def write_all(self, conversation_id: str, files: Sequence[File]) -> list[FileInfo]:
        """Keep all of `files`, or none where one has a bad name or there is no room for all. Raises as `write`."""
        return self._write(conversation_id, [(file.name, file.data) for file in files]) if files else []

    def remove(self, conversation_id: str, name: str) -> None:
        """Raises FileMissing and BadName."""
        check_name(name)
        with self._open(conversation_id, "files") as folder:
            if folder is None:
                raise _missing(name)
            try:
                os.unlink(name, dir_fd=folder)
            except (FileNotFoundError, IsADirectoryError):
                raise _missing(name) from None

    def write_image(self, conversation_id: str, png: bytes) -> str:
        """Keep a figure; returns its name, which is made from its content. Raises BadImage and WorkspaceFull."""
        check_png(png)
        name = hashlib.sha256(png).hexdigest()[:32] + ".png"
        with self._locked(conversation_id) as top:
            self._make_room(top, "images", {name: len(png)})
            _put(top, "images", name, png)
        return name

    def open_image(self, conversation_id: str, name: str) -> io.BufferedReader:
        """As `open`, of a figure."""
        return self._reader(conversation_id, "images", check_name(name))

    def read_image(self, conversation_id: str, name: str) -> bytes:
        """Raises FileMissing and BadName."""
        return self._read(conversation_id, "images", check_name(name))

    def image_path(self, conversation_id: str, name: str) -> Path:
        """Raises FileMissing and BadName."""
        return self._path(conversation_id, "images", check_name(name))

    def load(self, conversation_id: str) -> list[File]:
        """All files with their bytes, as a program gets them. One that vanishes meanwhile is left out."""
        from tools.python.backend import File  # here: the tools of that package build on this module

        loaded = []
        for info in self.files(conversation_id):
            with contextlib.suppress(FileMissing):
                loaded.append(File(info.name, self.read(conversation_id, info.name)))
        return loaded

    def forget(self, conversation_id: str) -> None:
        """Delete the conversation's files and figures. A program that still runs could write anew: end it first."""
        with self._top(conversation_id) as top:
            if top is None:
                return
            fcntl.flock(top, fcntl.LOCK_EX)
            if self._is_there(conversation_id, top):  # else somebody else forgot it while we waited
                shutil.rmtree(self.root / conversation_id)  # goes by directory descriptors, so no link leads it astray
        _sync(self.root)

    # A conversation's folder is opened once and everything else is reached from its descriptor: a folder that is
    # exchanged for a link meanwhile changes nothing.

    @contextlib.contextmanager
    def _top(self, conversation_id: str) -> Iterator[int | None]:
        if not _ID.fullmatch(conversation_id):
            raise BadName(f"{conversation_id[:80]!r} isn't a conversation's id.")
        try:
            top = os.open(self.root / conversation_id, _FOLDER)
        except FileNotFoundError:
            yield None
            return
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENOTDIR) and os.path.lexists(self.root / conversation_id):
                raise FileMissing(f"{self.root / conversation_id} isn't a folder: remove it.") from error
            raise
        try:
            yield top
        finally:
            os.close(top)

    @contextlib.contextmanager
    def _open(self, conversation_id: str, kind: str) -> Iterator[int | None]:
        """The descriptor of the conversation's folder `kind`; None where there is none yet."""
        with self._top(conversation_id) as top:
            folder = None if top is None else _below(top, kind)
            try:
                yield folder
            finally:
                if folder is not None:
                    os.close(folder)

    @contextlib.contextmanager
    def _locked(self, conversation_id: str) -> Iterator[int]:
        """The descriptor of the conversation's folder, made if need be, with no other writer in it."""
        while True:
            with self._top(conversation_id) as top:
                if top is None:
                    (self.root / conversation_id).mkdir(mode=0o700, parents=True, exist_ok=True)
                    _sync(self.root)
                    continue
                fcntl.flock(top, fcntl.LOCK_EX)
                if not self._is_there(conversation_id, top):
                    continue  # forgotten while we waited
                yield top
                return

    def _is_there(self, conversation_id: str, top: int) -> bool:
        try:
            return os.path.samestat(os.fstat(top), os.stat(self.root / conversation_id, follow_symlinks=False))
        except FileNotFoundError:
            return False

    def _write(self, conversation_id: str, files: Sequence[tuple[str, bytes]]) -> list[FileInfo]:
        names = [check_name(name) for name, _ in files]
        with self._locked(conversation_id) as top:
            looks = {look_of(found): found for found, _ in _scan_below(top, "files")}
            for number, name in enumerate(names):
                if name in names[:number]:
                    raise BadName(f"{name!r} is there twice: give each file a name of its own.")
                if (other := looks.setdefault(look_of(name), name)) != name:
                    raise BadName(f"{name!r} looks like {other!r}, which is there already: choose another name.")
            self._make_room(top, "files", {name: len(data) for name, data in files})
            return [_info(name, _put(top, "files", name, data)) for name, data in files]

    def _make_room(self, top: int, kind: str, sizes: dict[str, int]) -> None:
        """Raises WorkspaceFull where files of these names and sizes can't be kept beside the others."""
        held = {part: _scan_below(top, part) for part in ("files", "images")}
        count = len({name for name, _ in held[kind]} | sizes.keys())
        if count > self.max_files:
            raise WorkspaceFull(
                f"{_listed(sizes)} can't be kept: the conversation would have {count} {kind}, and may have "
                f"{self.max_files}. Delete some, or begin a new conversation."
            )
        used = sum(
            status.st_size
            for part, found in held.items()
            for name, status in found
            if part != kind or name not in sizes
        )
        if used + sum(sizes.values()) > self.max_bytes:
            raise WorkspaceFull(
                f"{_listed(sizes)} can't be kept: with {sum(sizes.values()):,} bytes beside the {used:,} that the "
                f"conversation has it would be over {self.max_bytes:,}. Delete some files, begin a new conversation, "
                "or raise WHETSTONE_FILES_MB."
            )

    def _reader(self, conversation_id: str, kind: str, name: str) -> io.BufferedReader:
        with self._open(conversation_id, kind) as folder:
            if folder is None:
                raise _missing(name)
            return _open_file(folder, name)

    def _read(self, conversation_id: str, kind: str, name: str) -> bytes:
        with self._reader(conversation_id, kind, name) as file:
            return file.read()

    def _path(self, conversation_id: str, kind: str, name: str) -> Path:
        self._reader(conversation_id, kind, name).close()
        return self.root / conversation_id / kind / name


def _info(name: str, found: os.stat_result) -> FileInfo:
    return FileInfo(name, found.st_size, media_type_of(name), datetime.fromtimestamp(found.st_mtime, UTC))


def _listed(names: Iterable[str]) -> str:
    first, *others = names
    return repr(first) + (f" and {len(others)} more" if others else "")


def _missing(name: str) -> FileMissing:
    return FileMissing(f"There is no file {name!r} in this conversation.")


def _below(top: int, kind: str) -> int | None:
    try:
        return os.open(kind, _FOLDER, dir_fd=top)
    except FileNotFoundError:
        return None


def _scan(folder: int) -> list[tuple[str, os.stat_result]]:
    """The plain files in an open folder, by name."""
    found = []
    for name in sorted(os.listdir(folder)):
        with contextlib.suppress(FileNotFoundError):
            status = os.stat(name, dir_fd=folder, follow_symlinks=False)
            if stat.S_ISREG(status.st_mode) and not name.startswith("."):
                found.append((name, status))
    return found


def _scan_below(top: int, kind: str) -> list[tuple[str, os.stat_result]]:
    folder = _below(top, kind)
    if folder is None:
        return []
    try:
        return _scan(folder)
    finally:
        os.close(folder)


def _open_file(folder: int, name: str) -> io.BufferedReader:
    try:
        descriptor = os.open(name, _FILE, dir_fd=folder)
    except FileNotFoundError:
        raise _missing(name) from None
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):  # a link, a socket
            raise _missing(name) from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _missing(name)
    return open(descriptor, "rb")


def _put(top: int, kind: str, name: str, data: bytes) -> os.stat_result:
    with contextlib.suppress(FileExistsError):
        os.mkdir(kind, 0o700, dir_fd=top)
    folder = os.open(kind, _FOLDER, dir_fd=top)
    try:
        return _replace(folder, name, data)
    finally:
        os.close(folder)


def _replace(folder: int, name: str, data: bytes) -> os.stat_result:
    """Write beside, then rename: a reader sees the old bytes or the new. The lock is held."""
    for left in os.listdir(folder):
        if left.startswith(_TEMPORARY):  # of a writer that died
            os.unlink(left, dir_fd=folder)
    temporary = _TEMPORARY + secrets.token_hex(8)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with open(os.open(temporary, flags, 0o600, dir_fd=folder), "wb") as file:
        try:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            os.rename(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
        except BaseException:
            os.unlink(temporary, dir_fd=folder)
            raise
        os.fsync(folder)
        return os.fstat(file.fileno())


def _sync(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
