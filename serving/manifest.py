"""A version's manifest: JSON beside its weights that says what they are, where they come from, and their hashes."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

_WORK = re.compile(r"\..+-[a-z0-9_]{8}")  # a working folder of `write_version`
WEIGHTS = ("adapter_model.safetensors", "adapter_config.json")


Kind = Literal["lora", "weights"]


class CorruptVersion(ValueError):
    """A version's folder isn't what its manifest says."""


class Manifest(BaseModel):
    """`kind`: an adapter ("lora") or full weights. `base` is the fingerprint of the model that the version is of: of
    the weights under the adapter, or those that full weights take the place of. `command` remakes the version."""

    model_config = ConfigDict(extra="forbid")

    id: str
    parent: str | None
    base: str
    base_name: str
    kind: Kind = "lora"
    files: dict[str, str] = Field(description="sha256 by file name")
    recipe: dict[str, Any] = {}
    seed: int = 0
    command: str = ""
    task_ids: list[str] = []
    gate: dict[str, Any] = {}
    created: str = Field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))


def write_version(
    folder: Path, save: Callable[[Path], None], describe: Callable[[dict[str, str]], Manifest]
) -> Manifest:
    """Make a version's folder whole or not at all: `save` writes the weights, `describe` gets their hashes."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.parent, fcntl.LOCK_SH):
        work = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            save(work)
            manifest = describe({file.name: sha256_of(file) for file in sorted(work.iterdir())})
            (work / "manifest.json").write_text(manifest.model_dump_json(indent=2) + "\n")
            work.chmod(0o755)
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(work, folder)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return manifest


def remove_unfinished(folder: Path) -> list[str]:
    """Remove what `write_version` left in `folder` when its process was killed; returns the names.

    Nothing is touched while any process writes a version there.
    """
    if not folder.is_dir():
        return []
    removed = []
    with _locked(folder, fcntl.LOCK_EX | fcntl.LOCK_NB) as alone:
        for left in folder.iterdir() if alone else ():
            if _WORK.fullmatch(left.name) and left.is_dir() and not left.is_symlink():
                shutil.rmtree(left, ignore_errors=True)
                removed.append(left.name)
    return removed


@contextlib.contextmanager
def _locked(folder: Path, how: int) -> Iterator[bool]:
    """A lock on a folder that dies with its process; whether it was got. Some network file systems have none."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, how)
        except OSError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)


def read_version(folder: Path, base: str | None = None) -> Manifest:
    """The manifest of a folder whose files match it. `base`: the fingerprint that it must fit.

    Raises CorruptVersion when the folder is incomplete or altered, or of another base.
    """
    try:
        manifest = Manifest.model_validate_json((folder / "manifest.json").read_text())
    except (OSError, ValidationError, UnicodeDecodeError) as error:
        raise CorruptVersion(f"{folder} has no readable manifest.json: {error}") from error
    for name, expected in manifest.files.items():
        file = folder / name
        try:
            found = sha256_of(file)
        except OSError as error:
            raise CorruptVersion(f"{file} can't be read: {error}") from error
        if found != expected:
            raise CorruptVersion(f"{file} was altered: its sha256 isn't the manifest's. Restore it or retrain.")
    if base is not None and manifest.base != base:
        raise CorruptVersion(
            f"Version {manifest.id!r} was trained on base {manifest.base} ({manifest.base_name}), not on {base}."
        )
    return manifest


def copy_version(source: Path, target: Path) -> Manifest:
    """Install a version's folder elsewhere, verified, whole or not at all."""
    known = read_version(source)

    def save(work: Path) -> None:
        for name in known.files:
            shutil.copyfile(source / name, work / name)

    return write_version(target, save, lambda _: known)


def sha256_of(file: Path) -> str:
    """The hash of a file's content, in hexadecimal."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
