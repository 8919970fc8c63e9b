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

Tricks with time gain nothing either: repeating others' golds with a date that ends them, deleting one's lies as soon as
they count against one, or a lie that outlives the honest golds, which are erased by age.
"""

from __future__ import annotations

import random
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from feedback_store import Guards, Policy, Store
from tests.test_store_queue import Clock

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


def say(store: Store, owner: str, question: str, gold: str, expires_at: datetime | None = None) -> str:
    """Teaches a gold in a conversation, and returns that."""
    conversation = store.create_conversation(owner)
    turn = store.begin_turn(conversation, [{"role": "user", "content": question}], "v0", [])
    store.finish_turn(turn, "?", "done")
    store.add_outcome(turn, "person", 0.0, "exact", gold, owner=owner, expires_at=expires_at)
    return conversation


@pytest.mark.parametrize("trick", ["expiry", "deletion", "retention"])
def test_tricks_with_time_gain_the_liars_nothing(tmp_path: Path, trick: str) -> None:
    clock = Clock()
    with Store.open(tmp_path / "s.db", now=clock) as store:
        for owner, question, gold in votes(cautious=True, seed=1):
            if owner in HONEST and question in POPULAR:
                say(store, owner, question, gold)
        clock.advance(86_400)
        for n, liar in enumerate(LIARS):
            if trick == "expiry":  # only where it isn't noticed: two each
                for question in POPULAR[2 * n : 2 * n + 2]:
                    say(store, liar, question, RIGHT, clock.time + timedelta(seconds=60))
                    say(store, liar, question, LIE)
            elif trick == "deletion":
                for first in range(0, len(POPULAR), 2):
                    said = [say(store, liar, question, LIE) for question in POPULAR[first : first + 2]]
                    for conversation in said:
                        store.erase(conversation=conversation)
                say(store, liar, f"{liar} asks", LIE)
            else:
                for question in POPULAR[2 * n : 2 * n + 2]:
                    say(store, liar, question, LIE)
        if trick == "retention":
            assert len(store.expire(clock.time).conversations) == 120
        clock.advance(3600)
        batch = store.claim_batch(store.start_run("r", {}), 200, Guards()).tasks
        assert [task for task in batch if task.gold == LIE] == []
        assert len(batch) == (0 if trick == "retention" else len(POPULAR))
        assert {one.owner for one in store.quarantines()} == (set(LIARS) if trick == "deletion" else set())
