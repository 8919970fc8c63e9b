"""Forgetting, to the end: after the record, the files of conversations and the runs' own copies.

Each step may be repeated: what a crash or a full disk cuts short, the next erasure or the server's next start finishes.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from feedback_store import Store
    from tools.workspace import Workspaces

log = logging.getLogger(__name__)


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
    from online_rl.run_files import forget_tasks
    from tools.file_rules import WorkspaceError
    from tools.workspace import Workspaces

    files = workspaces or Workspaces(home / "files")

    left = store.unswept()
    try:
        for conversation_id in left.conversations:
            files.forget(conversation_id)
        changed = sum(
            forget_tasks(home / "runs" / run.run_id, set(run.task_ids), whole=not run.has_version) for run in left.runs
        )
    except (
        OSError,
        WorkspaceError,
        ValueError,
        KeyError,
    ) as error:  # the disk, or a run's file that isn't what was written
        log.error("an erasure isn't finished: %s", error)
        why = f"the files couldn't be removed ({error}). Mend that and repeat; the record itself has forgotten."
        return Swept(0, 0, why)
    if not store.sweep_database(vacuum):
        why = "a reader keeps the database's log in use, which may hold the text: repeat when it has ended."
        return Swept(len(left.conversations), changed, why)
    store.mark_swept(left.conversations)
    return Swept(len(left.conversations), changed)


def backups(store_path: Path) -> list[Path]:
    """Copies that migrations left beside the store: an erasure doesn't reach into them."""
    return sorted(store_path.parent.glob(f"{store_path.name}.revision-*.bak"))
