"""How much is in the record, by version, day and verdict."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from sqlalchemy import String, cast, func, select, text

from feedback_store.database import Database
from feedback_store.schema import consents, outcomes, steps, tombstones, tool_results, turns


class Statistics(Database):
    def sizes(self, days: int = 14) -> dict[str, Any]:
        """`{"bytes": of the database, "steps": n, "tool_results": n, "turns_by_version": {id: n}, "turns_by_day":
        {"2026-01-31": n}, "outcomes_by_verifier": {name: {"count": n, "mean_score": x}}, "erased": {reason: n},
        "without_consent": n owners}`; days without a turn, and those before the last `days`, are left out."""
        day = cast(func.date(turns.c.created_at), String)
        since = self._now() - timedelta(days=days)
        with self._read() as connection:
            if connection.dialect.name == "sqlite":
                size = text("SELECT page_count * page_size FROM pragma_page_count, pragma_page_size")
            else:
                size = text("SELECT pg_database_size(current_database())")
            count = func.count()

            def by(column: Any, table: Any, *where: Any) -> dict[str, int]:
                query = select(column, count).select_from(table).where(*where).group_by(column).order_by(column)
                return {str(name): n for name, n in connection.execute(query)}

            judged = connection.execute(
                select(outcomes.c.verifier, count, func.avg(outcomes.c.score)).group_by(outcomes.c.verifier)
            )
            return {
                "bytes": connection.execute(size).scalar_one(),
                "steps": connection.execute(select(count).select_from(steps)).scalar_one(),
                "tool_results": connection.execute(select(count).select_from(tool_results)).scalar_one(),
                "turns_by_version": by(turns.c.version, turns),
                "turns_by_day": by(day, turns, turns.c.created_at >= since),
                "outcomes_by_verifier": {name: {"count": n, "mean_score": mean} for name, n, mean in judged},
                "erased": by(tombstones.c.reason, tombstones),
                "without_consent": connection.execute(
                    select(count).select_from(consents).where(~consents.c.training)
                ).scalar_one(),
            }
