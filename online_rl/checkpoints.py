"""Checkpoints that count only once they are whole, so that a kill at any moment leaves a good one to go on from."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from online_rl.recipe import Recipe
from online_rl.step_metrics import Metrics
from serving.manifest import sha256_of

SEAL = "whole.json"
POSITION = "tapo.json"
MAY_CHANGE = {"max_steps", "max_minutes", "concurrency", "micro_batch", "save_steps", "keep_checkpoints"}
"""Recipe keys that a resumed run may change: they don't alter what is learnt."""


def last_good_checkpoint(run_dir: Path) -> Path | None:
    """The newest checkpoint whose every file is there with the content that it was sealed with; None if there is none.

    A process killed while it saves leaves a folder with no seal, so the one before it counts.
    """
    folders = sorted(run_dir.glob("checkpoint-*"), key=step_of, reverse=True)
    return next((folder for folder in folders if _is_whole(folder)), None)


def seal(folder: Path) -> None:
    hashes = {file.name: sha256_of(file) for file in sorted(folder.iterdir()) if file.is_file() and file.name != SEAL}
    draft = folder / f"{SEAL}.part"
    draft.write_text(json.dumps(hashes, indent=1), encoding="utf-8")
    os.replace(draft, folder / SEAL)


def _is_whole(folder: Path) -> bool:
    seal = folder / SEAL
    if not seal.is_file():
        return False
    hashes: dict[str, str] = json.loads(seal.read_text(encoding="utf-8"))
    return all((folder / name).is_file() and sha256_of(folder / name) == hash for name, hash in hashes.items())


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def starting_point(run_dir: Path, recipe: Recipe, resume: bool) -> Path | None:
    """The checkpoint to go on from, with everything newer than it cleared away; None for a fresh start."""
    metrics = run_dir / "metrics.jsonl"
    if not resume and (metrics.exists() or last_good_checkpoint(run_dir)):
        raise ValueError(f"{run_dir} already holds a run: resume it, or give another run_dir")
    checkpoint = last_good_checkpoint(run_dir)
    if checkpoint is not None:
        before = json.loads((checkpoint / POSITION).read_text(encoding="utf-8"))["recipe"]
        changed = {k: v for k, v in recipe.model_dump().items() if k not in MAY_CHANGE and before.get(k) != v}
        if changed:
            was = ", ".join(f"{key} was {before.get(key)!r}, is {value!r}" for key, value in changed.items())
            raise ValueError(f"{checkpoint} was made by another recipe ({was}): give the same, or another run_dir")
    step = step_of(checkpoint) if checkpoint else 0
    for folder in run_dir.glob("checkpoint-*"):
        if step_of(folder) > step:
            shutil.rmtree(folder)
    kept = read_metrics(metrics, up_to=step)
    if metrics.exists():
        draft = metrics.with_suffix(".part")
        draft.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        os.replace(draft, metrics)
    return checkpoint


def read_metrics(file: Path, up_to: int) -> list[Metrics]:
    """The steps on record; a last line that a kill cut short is left out."""
    found: list[Metrics] = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        try:
            metrics = json.loads(line)
        except json.JSONDecodeError:
            break
        if metrics["step"] <= up_to:
            found.append(metrics)
    return found
