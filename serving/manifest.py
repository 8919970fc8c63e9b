"""A version's manifest: JSON beside its weights that says what they are, where they come from, and their hashes."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

WEIGHTS = ("adapter_model.safetensors", "adapter_config.json")


class CorruptVersion(ValueError):
    """A version's folder isn't what its manifest says."""


class Manifest(BaseModel):
    """`base` is the fingerprint of the weights under the adapter; `command` remakes the version."""

    model_config = ConfigDict(extra="forbid")

    id: str
    parent: str | None
    base: str
    base_name: str
    kind: Literal["lora"] = "lora"
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
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        save(work)
        manifest = describe({name: sha256_of(work / name) for name in WEIGHTS})
        (work / "manifest.json").write_text(manifest.model_dump_json(indent=2) + "\n")
        work.chmod(0o755)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(work, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return manifest


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
