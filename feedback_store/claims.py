"""Claims under the guards: planned on a look at the queue, then taken in one short transaction of the queue's own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection, and_, func, or_, select

from feedback_store.database import again_after_conflicts, in_several_transactions
from feedback_store.guards import HELD_OUT, NEAR_DUPLICATE, OVER_SHARE, Guards, fair_share
from feedback_store.queue import Queue, give_up_claims, may_be_claimed
from feedback_store.records import Batch, Message
from feedback_store.schema import tasks

if TYPE_CHECKING:
    from feedback_store.near import HeldOut, Seen

_PAGE = 512
_LOOKED_AT = 50_000  # tasks, of which a batch is made at most
_TRIES = 3  # where other runs took the planned tasks meanwhile


class Claims(Queue):
    @in_several_transactions
    def claim_batch(
        self, run_id: str, n: int, guards: Guards, lease_seconds: float = 3600, unused: Collection[str] = ()
    ) -> Batch:
        """As `claim`, but of what the guards let through, and what they left in the queue.

        The batch that they judge is all that the run holds, without the `unused` ids, which it holds and won't train
        on. A task that is left may come with a later run's batch; one that overlaps the evaluation never does.
        """
        self._take_stock()
        left: dict[str, list[str]] = {}
        for _ in range(_TRIES):
            with self._read() as connection:
                held = self._held(connection, run_id, unused)
                planned, left = self._plan(connection, held, n, guards)
            if not planned:
                break
            claimed = self.claim(run_id, n, lease_seconds, only=planned)
            if len(claimed) < len(planned):  # what is left of the plan may be more than somebody's share
                keep = fair_share(
                    [task.owner for task in claimed], n, self._share(held, claimed, guards), guards.trusted_owners,
                    [row.owner for row in held],
                )  # fmt: skip
                kept = [claimed[position] for position in keep]
                self._put_back(run_id, [task.id for task in claimed if task not in kept])
                claimed = kept
            if claimed:
                return Batch(claimed, left)
        return Batch([], left)

    def _share(self, held: list[Any], claimed: list[Any], guards: Guards) -> float:
        return guards.share_of({task.owner for task in [*held, *claimed]})

    @again_after_conflicts
    def _take_stock(self) -> None:
        with self._write() as connection:
            self._sweep(connection)

    @again_after_conflicts
    def _put_back(self, run_id: str, ids: list[str]) -> None:
        if ids:
            with self._write() as connection:
                its = and_(tasks.c.run_id == run_id, tasks.c.id.in_(ids))
                give_up_claims(connection, its, failed=False, claim_state="released", now=self._now())

    def _held(self, connection: Connection, run_id: str, unused: Collection[str]) -> list[Any]:
        look = select(tasks.c.id, tasks.c.owner, tasks.c.messages)
        rows = connection.execute(look.where(tasks.c.run_id == run_id, tasks.c.state == "claimed"))
        return [row for row in rows if row.id not in unused]

    def _plan(
        self, connection: Connection, held: list[Any], n: int, guards: Guards
    ) -> tuple[list[str], dict[str, list[str]]]:
        """Ids to claim, in order, and what is left, by the reason."""
        waiting = self._owners(connection, guards) | {row.owner for row in held}
        share = guards.share_of(waiting)
        most = max(1, int(share * (n + len(held)) + 1e-9))
        seen, heldout = _near(held, guards)
        counted = Counter(row.owner for row in held)
        left: dict[str, list[str]] = {}
        found: list[Any] = []
        for row in self._candidates(connection, counted, most, guards):
            if counted[row.owner] >= most and row.owner not in guards.trusted_owners:
                left.setdefault(OVER_SHARE, []).append(row.id)
                continue
            text = prompt_text(row.messages)
            if heldout is not None and any(heldout.overlaps(part) for part in asked(row.messages)):
                left.setdefault(HELD_OUT, []).append(row.id)
                continue
            if seen is not None:
                if seen.like(text) is not None:
                    left.setdefault(NEAR_DUPLICATE, []).append(row.id)
                    continue
                seen.add(row.id, text)
            counted[row.owner] += 1
            found.append(row)
            if len(found) >= n and self._chosen(found, n, share, held, guards)[1] == n:
                break
        chosen, _ = self._chosen(found, n, share, held, guards)
        over = [row.id for row in found if row.id not in chosen]
        if over and len(chosen) < n:
            left.setdefault(OVER_SHARE, []).extend(over)
        return list(chosen), left

    @staticmethod
    def _chosen(found: list[Any], n: int, share: float, held: list[Any], guards: Guards) -> tuple[dict[str, None], int]:
        owners = [row.owner for row in found]
        positions = fair_share(owners, n, share, guards.trusted_owners, [row.owner for row in held])
        return dict.fromkeys(found[position].id for position in positions), len(positions)

    def _candidates(self, connection: Connection, counted: Counter[str], most: int, guards: Guards) -> Iterator[Any]:
        """What may be claimed, in a claim's order; an owner whose share is full isn't looked at on later pages."""
        columns = select(tasks.c.id, tasks.c.owner, tasks.c.attempts, tasks.c.messages)
        order = columns.where(may_be_claimed(self._now())).order_by(tasks.c.attempts, tasks.c.id).limit(_PAGE)
        page = order
        for _ in range(_LOOKED_AT // _PAGE):
            rows = connection.execute(page).all()
            yield from rows
            if len(rows) < _PAGE:
                return
            last = rows[-1]
            later = and_(tasks.c.attempts == last.attempts, tasks.c.id > last.id)
            page = order.where(or_(tasks.c.attempts > last.attempts, later))
            full = [owner for owner, n in counted.items() if n >= most and owner not in guards.trusted_owners]
            if full:
                page = page.where(tasks.c.owner.not_in(full))

    def _owners(self, connection: Connection, guards: Guards) -> set[str]:
        """As many of the owners with tasks as it takes to know the share: each found by one step in the index."""
        enough = len(guards.trusted_owners) + (int(1 / guards.owner_share) + 1 if guards.owner_share else 1)
        owners: set[str] = set()
        last: str | None = None
        waiting = (tasks.c.state == "pending", tasks.c.hold == "")
        for owner in guards.trusted_owners:
            if connection.execute(select(tasks.c.id).where(*waiting, tasks.c.owner == owner).limit(1)).first():
                owners.add(owner)
        while len(owners) < enough:
            after = () if last is None else (tasks.c.owner > last,)
            last = connection.execute(select(func.min(tasks.c.owner)).where(*waiting, *after)).scalar()
            if last is None:
                break
            owners.add(last)
        return owners


def asked(messages: list[Message]) -> list[str]:
    """What the user's side said, message by message."""
    return [str(message.get("content") or "") for message in messages if message.get("role") == "user"]


def prompt_text(messages: list[Message]) -> str:
    return "\n".join(str(message.get("content") or "") for message in messages)


def _near(held: list[Any], guards: Guards) -> tuple[Seen | None, HeldOut | None]:
    """The index of what the run holds, and that of the evaluation; None where it isn't asked for."""
    if not guards.fold and not guards.heldout:
        return None, None
    from feedback_store.near import HeldOut, Seen  # scipy and numpy, which only a trainer needs

    seen = Seen() if guards.fold else None
    if seen is not None:
        for row in held:
            seen.add(row.id, prompt_text(row.messages))
    return seen, HeldOut(guards.heldout) if guards.heldout else None
