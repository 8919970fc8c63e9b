"""Forgetting, to the end: after the record, the files of conversations and the runs' own copies.

Each step may be repeated: what a crash or a full disk cuts short, the next erasure or the server's next start finishes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from feedback_store import Store
    from tools.workspace import Workspaces

log = logging.getLogger(__name__)

_RUNS = 1000  # the newest, among which are those under way


@dataclass(frozen=True)
class Swept:
    """What was cleaned beside the record. `unfinished` says what is left to do, and is empty when all is done."""

    conversations: int
    runs: int
    unfinished: str = ""


def sweep(store: Store, home: Path, workspaces: Workspaces | None = None, *, vacuum: bool) -> Swept:
    """Finish every erasure in the record: files, run folders, the database's leftovers. Blocks. Raises StoreError.

    `vacuum`: see `Store.sweep_database`.
    """
    from online_rl.run_files import forget_results, forget_tasks
    from tools.file_rules import WorkspaceError
    from tools.workspace import Workspaces

    files = workspaces or Workspaces(home / "files")
    left = store.unswept()
    whys: list[str] = []

    def done(remove: Callable[[], object], what: str) -> bool:
        """What can't be removed is told, and keeps nothing else from being removed."""
        try:
            return bool(remove())
        except (OSError, WorkspaceError, ValueError) as error:  # the disk, or a run's file that isn't what was written
            log.error("an erasure isn't finished: %s: %s", what, error)
            whys.append(f"{what} couldn't be removed ({error}). Mend that and repeat; the record itself has forgotten.")
            return False

    for id in left.conversations:
        done(partial(files.forget, id), f"the files of {id}")
    changed = {
        run.run_id
        for run in left.runs
        if done(
            partial(forget_tasks, home / "runs" / run.run_id, set(run.task_ids), whole=not run.has_version),
            f"the copies of run {run.run_id}",
        )
    }
    if left.results:
        at_work = {run.id for run in store.runs(limit=_RUNS) if run.status == "running" and run.alive is not False}
        for folder in sorted((home / "runs").glob("*")):
            forget = partial(forget_results, folder, set(left.results), in_use=folder.name in at_work)
            if done(forget, f"tool results in run {folder.name}"):
                changed.add(folder.name)
    if not store.sweep_database(vacuum):
        whys.append("a reader keeps the database's log in use, which may hold the text: repeat when it has ended.")
    if whys:
        return Swept(len(left.conversations), len(changed), " ".join(whys))
    store.mark_swept(left)
    return Swept(len(left.conversations), len(changed))


def backups(store_path: Path) -> list[Path]:
    """Copies that migrations left beside the store: an erasure doesn't reach into them."""
    return sorted(store_path.parent.glob(f"{store_path.name}.revision-*.bak"))
