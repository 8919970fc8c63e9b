"""The last stage of a run: its candidate becomes a registered version, and serves if the gate lets it."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from feedback_store import Store
from online_rl.adapters import save_version
from online_rl.gate import Decision
from online_rl.recipe import Recipe
from online_rl.tasks.base import Task
from serving.manifest import WEIGHTS
from serving.model import BaseModel

PublishedStatus = Literal["published", "refused"]


class Outdated(RuntimeError):
    """The version that the candidate was compared with serves no more."""


def register(
    store: Store,
    home: Path,
    base: BaseModel,
    run_id: str,
    names: tuple[str, str],
    recipe: Recipe,
    recipe_name: str,
    tasks: Sequence[Task],
    decision: Decision,
) -> None:
    """Write the candidate's folder, whatever lies there, and name it in the registry, unless that was done already.

    `names`: the parent's and the candidate's.
    """
    parent, candidate = names
    if candidate in {version.id for version in store.versions()}:
        return
    trained = home / "runs" / run_id / "candidate"

    def copy(work: Path) -> None:
        for name in WEIGHTS:
            shutil.copyfile(trained / name, work / name)

    target = home / "versions" / candidate
    manifest = save_version(
        copy,
        target,
        base,
        parent,
        recipe=recipe.model_dump(),
        seed=recipe.seed,
        command=f"whetstone train --once --recipe {recipe_name} --steps {recipe.max_steps}",
        task_ids=[task.id for task in tasks],
        gate=decision.report(),
    )
    known: PublishedStatus = "published" if decision.promote else "refused"
    store.add_version(candidate, parent, str(target), manifest.model_dump(), known, run_id=run_id)


def promote(store: Store, run_id: str, names: tuple[str, str], tasks: Sequence[Task], reason: str) -> None:
    """Put the candidate in service; its tasks are done with. Raises Outdated."""
    parent, candidate = names
    if store.current_version() not in names:
        raise Outdated(
            f"{candidate} was compared with {parent}, which serves no more. It is published: "
            f"`whetstone versions use {candidate}` puts it in service."
        )
    store.complete(run_id, [task.meta["queue_id"] for task in tasks if task.source == "queue"])
    store.set_current(candidate, f"{run_id}: {reason}", who=run_id)
