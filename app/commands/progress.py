"""Stages as bars in the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from app.commands import console

_LABELS = {"prepare": "preparing", "rollouts": "  rollouts", "train": "training", "evaluate": "evaluating"}


@contextmanager
def bars() -> Iterator[Callable[[str, int, int, str], None]]:
    """A listener that shows each stage as a bar with its rate and time left."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description:<16}"), BarColumn(30), MofNCompleteColumn(), TimeRemainingColumn(),
               TextColumn("{task.fields[note]}", style="dim"))  # fmt: skip
    with Progress(*columns, console=console.err) as progress:
        shown: dict[str, Any] = {}

        def listen(stage: str, done: int, of: int, note: str) -> None:
            key = f"{stage} {note}" if stage == "evaluate" else stage
            if key not in shown:
                shown[key] = progress.add_task(_LABELS.get(stage, stage), total=of or None, note=note)
            progress.update(shown[key], completed=done, total=of or None, note=note)

        yield listen
