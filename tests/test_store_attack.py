"""A simulated attack: five of twenty-five owners lie in concert, and the batch that a run claims holds few lies.

Twenty honest owners answer six of ten popular questions each, and ask four of their own that nobody else asks. Five
liars agree on wrong golds. The shares of lies, as measured by these tests (`pytest -s` prints them; "without" is the
queue that takes every gold as a task, as it would be without votes, quarantine and shares):

| the liars…                                                              | without | with |
|-------------------------------------------------------------------------|---------|------|
| lie on every popular question, on their own, and swarm 8 of others'      | 30 %    | 0 %  |
| lie only where nobody can tell: on their own, and swarm 8 of others'     | 24 %    | 25 % |
| the same, and a trusted owner answers 30 of all questions, at random     | 23 %    | 0 %  |

The second row is the limit of what votes can do: a crowd that is alone with a question is right by majority.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from feedback_store import Guards, Policy, Store

BOSS = "key-boss"
LIARS = [f"liar-{n}" for n in range(5)]
HONEST = [f"honest-{n}" for n in range(20)]
RIGHT, LIE = "right", "lie"
POPULAR = [f"popular question {n}" for n in range(10)]
OWN = {owner: [f"{owner} asks {n}" for n in range(4)] for owner in [*HONEST, *LIARS]}


def votes(cautious: bool, seed: int) -> list[tuple[str, str, str]]:
    """(owner, question, gold), in a random order."""
    draw = random.Random(seed)
    cast = [(owner, question, RIGHT) for owner in HONEST for question in [*draw.sample(POPULAR, 6), *OWN[owner]]]
    swarmed = [OWN[owner][0] for owner in draw.sample(HONEST, 8)]
    for liar in LIARS:
        cast += [(liar, question, LIE) for question in [*OWN[liar], *swarmed, *([] if cautious else POPULAR)]]
    draw.shuffle(cast)
    return cast


def attacked(path: Path, cautious: bool, checks: int, seed: int) -> tuple[float, float]:
    """The share of lies among all tasks, and in the batch that a run claims."""
    policy = Policy(trusted_owners={BOSS})
    with Store.open(path, policy=policy) as store:
        cast = votes(cautious, seed)
        asked = sorted({question for _, question, _ in cast})
        cast += [(BOSS, question, RIGHT) for question in random.Random(seed).sample(asked, checks)]
        for owner, question, gold in cast:
            store.add_task([{"role": "user", "content": question}], "exact", gold, "exact", "person", owner)
        every = [task.gold for task in store.tasks(limit=10_000)]
        batch = store.claim_batch(store.start_run("r", {}), 200, Guards(trusted_owners={BOSS})).tasks
        assert len(batch) > 80
        assert not {one.owner for one in store.quarantines()} & set(HONEST)
        share = sum(task.gold == LIE for task in batch) / len(batch)
        before = every.count(LIE) / len(every)
        print(f"\nlies: {before:.1%} of all tasks, {share:.1%} of the batch, {len(store.quarantines())} in quarantine")
        return before, share


@pytest.mark.parametrize(
    ("cautious", "checks", "without", "at_most"), [(False, 0, 0.25, 0.05), (True, 0, 0.2, 0.3), (True, 30, 0.2, 0.05)]
)
def test_liars_in_concert_hardly_reach_the_batch(
    tmp_path: Path, cautious: bool, checks: int, without: float, at_most: float
) -> None:
    before, share = attacked(tmp_path / "s.db", cautious, checks, seed=1)
    assert before >= without
    assert share <= at_most
