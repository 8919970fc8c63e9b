"""What a batch may be made of, so that nobody's golds can take it over: shares of owners, near-duplicates, held out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

OVER_SHARE = "over their owner's share of the batch"
NEAR_DUPLICATE = "nearly the same as another of the batch"
HELD_OUT = "overlapping the evaluation"


@dataclass(frozen=True)
class Guards:
    """`owner_share`: what one owner may have of a batch, 1 for all of it; it rises to 1/k where only k owners have
    tasks, so that one alone learns. `trusted_owners` may have any share. `fold`: one of several near-duplicates.
    `heldout`: the evaluation's questions, which no task may overlap."""

    owner_share: float = 0.2
    trusted_owners: Collection[str] = frozenset()
    fold: bool = True
    heldout: Sequence[str] = ()

    def share_of(self, owners: Collection[str]) -> float:
        """What one of `owners`, who have tasks, may have of a batch. A trusted one among them is company enough."""
        if any(owner in self.trusted_owners for owner in owners):
            return self.owner_share
        return max(self.owner_share, 1 / max(1, len(owners)))

    def trim(self, owners: Sequence[str]) -> list[int]:
        """The positions of the largest batch that can be made of tasks of these owners."""
        return fair_share(owners, len(owners), self.share_of(set(owners)), self.trusted_owners)


def fair_share(
    owners: Sequence[str], n: int, share: float, trusted: Collection[str] = (), held: Sequence[str] = ()
) -> list[int]:
    """Which of the candidates, given by their owners in order, make the largest batch of at most `n` in which no owner
    has more than `share` of it and of what is `held` together (one at least); positions, in order."""
    before, offered = Counter(held), Counter(owners)

    def limit(size: int, owner: str) -> int:
        return n if owner in trusted else max(0, max(1, int(share * size + 1e-9)) - before[owner])

    size = n + len(held)
    while True:
        most = min(n, sum(min(count, limit(size, owner)) for owner, count in offered.items())) + len(held)
        if most >= size:
            break
        size = most
    taken: Counter[str] = Counter()
    chosen: list[int] = []
    for position, owner in enumerate(owners):
        if len(chosen) < n and taken[owner] < limit(size, owner):
            taken[owner] += 1
            chosen.append(position)
    return chosen
