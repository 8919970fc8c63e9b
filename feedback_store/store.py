"""The store as one object: what the server, the trainer and the console open."""

from __future__ import annotations

import os
from types import TracebackType
from typing import Any, Self

from sqlalchemy import func, select

from feedback_store.conversations import Conversations
from feedback_store.database import Clock, connect_to, parse_location, utc_now
from feedback_store.erasure import Erasure
from feedback_store.keys import Keys
from feedback_store.lineage import LineageTree
from feedback_store.migrate import bring_up_to_date
from feedback_store.outcomes import Outcomes
from feedback_store.queue import Queue
from feedback_store.runs import Runs
from feedback_store.schema import conversations, outcomes, turns
from feedback_store.search import Search
from feedback_store.selection import Reading
from feedback_store.statistics import Statistics
from feedback_store.sweep import Sweep
from feedback_store.taints import Taints
from feedback_store.tool_results import ToolResults
from feedback_store.versions import Versions


class Store(
    Conversations,
    ToolResults,
    Outcomes,
    Queue,
    Versions,
    Runs,
    Keys,
    Search,
    Erasure,
    Sweep,
    Taints,
    LineageTree,
    Statistics,
    Reading,
):
    """The record of conversations, outcomes, tasks, versions and runs, and the API keys.

    Every method is one transaction and blocks; async code calls it through `asyncio.to_thread`. Threads may share
    one store; each process opens its own. All raise StoreError.
    """

    @classmethod
    def open(
        cls,
        path_or_url: str | os.PathLike[str],
        *,
        max_pending: int = 100_000,
        busy_seconds: float = 30.0,
        now: Clock = utc_now,
    ) -> Self:
        """Opens the file (made with its folder if missing) or the database at a URL, migrated to this release.

        `max_pending`: how many tasks may wait in the queue. `busy_seconds`: how long to wait for another process's
        write. `now`: the clock that stamps rows and ends leases. An older SQLite file is copied beside itself first.
        """
        url = parse_location(path_or_url)
        bring_up_to_date(url, busy_seconds)
        return cls(connect_to(url, busy_seconds), max_pending=max_pending, busy_seconds=busy_seconds, now=now)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def stats(self) -> dict[str, Any]:
        """For the console: `{"conversations": n, "turns": {status: n}, "outcomes": {source: {"count": n,
        "mean_score": x or None}}, "queue": queue_stats(), "current_version": id or None}`.
        """
        with self._read() as connection:
            count = connection.execute(select(func.count()).select_from(conversations)).scalar_one()
            by_status = connection.execute(select(turns.c.status, func.count()).group_by(turns.c.status)).all()
            by_source = connection.execute(
                select(outcomes.c.source, func.count(), func.avg(outcomes.c.score)).group_by(outcomes.c.source)
            ).all()
        return {
            "conversations": count,
            "turns": {status: n for status, n in by_status},
            "outcomes": {source: {"count": n, "mean_score": mean} for source, n, mean in by_source},
            "queue": self.queue_stats(),
            "current_version": self.current_version(),
        }
