"""Finds and reads the documents of a folder. Hidden files are left out, and no link leads anywhere."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path

from tools.documents import Unreadable
from tools.text import clean

MEDIA_TYPES = {
    ".txt": "text/plain",
    ".text": "text/plain",
    ".md": "text/markdown",
    ".markdown": "text/markdown",
    ".html": "text/html",
    ".htm": "text/html",
    ".xhtml": "application/xhtml+xml",
    ".pdf": "application/pdf",
}
MAX_BYTES = 50 << 20


@dataclass(frozen=True)
class Found:
    """`path` is relative to the folder, in the file system's own bytes: a name needn't be UTF-8."""

    path: bytes
    size: int
    mtime_ns: int


@dataclass(frozen=True)
class Tree:
    """`skipped` are (path, reason) of what was seen and not taken; `closed` are folders that couldn't be listed."""

    files: tuple[Found, ...]
    skipped: tuple[tuple[bytes, str], ...]
    closed: tuple[bytes, ...]

    def unlooked(self, path: bytes) -> bool:
        """Whether `path` may still be there, in a folder that couldn't be listed."""
        return any(not folder or path.startswith(folder + b"/") for folder in self.closed)


def walk(root: Path) -> Tree:
    """The documents below `root` in a stable order."""
    files, skipped, closed = [], [], []
    waiting = [b""]
    base = os.fsencode(root)
    while waiting:
        folder = waiting.pop()
        try:
            with os.scandir(os.path.join(base, folder)) as listed:
                entries = sorted(listed, key=lambda entry: entry.name)
        except OSError as error:
            skipped.append((folder or b".", f"can't be listed ({error.strerror})"))
            closed.append(folder)
            continue
        for entry in entries:
            path = os.path.join(folder, entry.name)
            if entry.name.startswith(b"."):
                continue
            document = os.path.splitext(os.fsdecode(entry.name))[1].lower() in MEDIA_TYPES
            try:
                if entry.is_symlink():
                    if document or entry.is_dir():
                        skipped.append((path, "is a link; links aren't followed"))
                elif entry.is_dir(follow_symlinks=False):
                    waiting.append(path)
                elif document:
                    found = entry.stat(follow_symlinks=False)
                    if stat.S_ISREG(found.st_mode):
                        files.append(Found(path, found.st_size, found.st_mtime_ns))
                    else:
                        skipped.append((path, "isn't a regular file"))
            except OSError as error:
                skipped.append((path, f"can't be read ({error.strerror})"))
    return Tree(tuple(sorted(files, key=lambda file: file.path)), tuple(sorted(skipped)), tuple(closed))


def read_file(root: Path, file: Found) -> bytes:
    """The content. Raises OSError, and Unreadable for what is too large."""
    descriptor = os.open(
        os.path.join(os.fsencode(root), file.path), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    )
    with os.fdopen(descriptor, "rb") as opened:
        now = os.fstat(descriptor)
        if not stat.S_ISREG(now.st_mode):
            raise Unreadable("isn't a regular file")
        if now.st_size > MAX_BYTES:
            raise Unreadable(f"has {now.st_size / 2**20:.0f} MB; at most {MAX_BYTES >> 20} are read")
        return opened.read(MAX_BYTES + 1)[:MAX_BYTES]


def display_name(path: bytes) -> str:
    """A path as it is shown and cited."""
    return " ".join(clean(os.fsdecode(path)).split()) or "?"
