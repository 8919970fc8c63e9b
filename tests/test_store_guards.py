"""What a batch may be made of: shares of owners, near-duplicates, and nothing of the evaluation."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from feedback_store import Guards, Store, claims
from feedback_store.errors import Conflict
from feedback_store.guards import HELD_OUT, NEAR_DUPLICATE, OVER_SHARE, fair_share
from feedback_store.near import HeldOut, Seen
from online_rl.tasks.generated import generate


def fill(store: Store, **owners: int) -> None:
    for owner, n in owners.items():
        for i in range(n):
            store.add_task([{"role": "user", "content": f"{owner} {i}"}], "exact", "x", "exact", "person", owner)


@pytest.mark.parametrize(
    ("owners", "share", "taken"),
    [
        ({"ada": 30}, 0.2, {"ada": 10}),  # alone: all of it
        ({"ada": 30, "bob": 3}, 0.2, {"ada": 3, "bob": 3}),  # two: half each
        ({"ada": 30, "bob": 3}, 1.0, {"ada": 10}),  # no cap
        ({"mal": 30, "a": 2, "b": 2, "c": 2, "d": 2, "e": 2}, 0.2, {"mal": 2, "a": 2, "b": 2, "c": 2, "d": 2}),
    ],
)
def test_an_owner_has_a_share_of_the_batch(
    place: str, owners: dict[str, int], share: float, taken: dict[str, int]
) -> None:
    with Store.open(place) as store:
        fill(store, **owners)
        run = store.start_run("r", {})
        batch = store.claim_batch(run, 10, Guards(share, fold=False))
        assert Counter(task.owner for task in batch.tasks) == taken
        left = sum(owners.values()) - len(batch.tasks)
        assert store.queue_stats()["pending"] == left
        if len(batch.tasks) < 10:
            assert len(batch.left[OVER_SHARE]) == left
        # A second claim adds to the same batch, and doesn't begin a new one.
        more = store.claim_batch(run, 10, Guards(share, fold=False)).tasks
        held = Counter(task.owner for task in [*batch.tasks, *more])
        assert share == 1 or len(owners) == 1 or max(held.values()) <= max(share, 1 / len(owners)) * sum(held.values())


def test_a_trusted_owner_may_fill_the_batch_and_others_have_their_share_of_it(place: str) -> None:
    with Store.open(place) as store:
        fill(store, boss=8, eve=30)
        batch = store.claim_batch(store.start_run("r", {}), 100, Guards(0.2, {"boss"}, fold=False))
        assert Counter(task.owner for task in batch.tasks) == {"boss": 8, "eve": 2}


@given(
    st.lists(st.sampled_from("abcdef"), max_size=60),
    st.integers(1, 40),
    st.floats(0.05, 1),
    st.lists(st.sampled_from("abc"), max_size=5),
)
def test_no_share_is_ever_exceeded(owners: list[str], n: int, share: float, held: list[str]) -> None:
    chosen = fair_share(owners, n, share, held=held)
    assert chosen == sorted(set(chosen))
    batch = Counter(owners[i] for i in chosen)
    size = len(chosen) + len(held)
    assert len(chosen) <= n
    before = Counter(held)
    for owner, count in batch.items():
        assert count + before[owner] <= max(1, share * size + 1e-6)


@pytest.mark.parametrize(
    ("one", "other", "alike"),
    [
        ("What is 12 * 13?", "what is 12*13", True),
        ("What is 12 * 13?", "What is 12 * 14?", False),
        ("What is 12 * 13?", "What is 12 + 13?", False),
        ("What is 12 - 13?", "What is 13 - 12?", False),
        ("What is (2 + 3) * 4?", "What is 2 + (3 * 4)?", False),
        ("What is the capital of Peru?", "What is the capital of Chile?", False),
        ("What is the capital of Niger?", "What is the capital of Nigeria?", False),
        ("Give the two-letter code of Peru.", "Give the two letter code of Peru", True),
        (
            "Amara buys 12 tickets at 3 euros each and gives a quarter of them to her brother; how many does she keep?",
            "Amara buys 12 tickets at 3 euros each, and gives a quarter of them to her brother. How many does she keep",
            True,
        ),
        ("", "", True),
        ("…", "日本", False),
    ],
)
def test_near_duplicates_have_the_same_words_and_the_same_numbers(one: str, other: str, alike: bool) -> None:
    seen = Seen()
    seen.add("one", one)
    assert (seen.like(other) == "one") is alike


def test_near_duplicates_are_folded_for_one_batch_and_stay_for_another(place: str) -> None:
    with Store.open(place) as store:
        for text in ("What is 12 * 13?", "Please: what is 5 + 5, now and here?", "Please, what is 5 + 5 now, and here"):
            store.add_task([{"role": "user", "content": text}], "numeric", "1", "numeric", "person")
        batch = store.claim_batch(first := store.start_run("r", {}), 10, Guards())
        assert len(batch.tasks) == 2
        (left,) = batch.left[NEAR_DUPLICATE]
        store.complete(first, [task.id for task in batch.tasks])
        assert [task.id for task in store.claim_batch(store.start_run("r", {}), 10, Guards()).tasks] == [left]


TEMPLATE = "In the year of our lord when the old mill stood by the river, {} had {} sheep. How many are left of {}?"


@pytest.mark.parametrize(
    ("text", "overlaps"),
    [
        ("what is 31 * 17", True),
        ("Please tell me, what is 31 * 17? And show how.", True),
        ("What is 31 * 18?", False),
        ("They say a train that leaves the northern station at noon with ninety people aboard will be late", True),
        ("A train that leaves the northern station.", False),
        (TEMPLATE.format("Cid", 9, 9), False),  # two items share these words: they are a template's
    ],
)
def test_nothing_that_overlaps_the_evaluation_is_claimed(place: str, text: str, overlaps: bool) -> None:
    items = [
        "What is 31 * 17?",
        "A train that leaves the northern station at noon with ninety people aboard: when is it in Rome?",
        TEMPLATE.format("Ada", 7, 7),
        TEMPLATE.format("Bo", 8, 8),
        "Hi!",
    ]
    with Store.open(place) as store:
        messages = [{"role": "user", "content": text}, {"role": "assistant", "content": "?"}]
        task_id, _ = store.add_task([*messages, {"role": "user", "content": "Well?"}], "exact", "1", "exact", "person")
        batch = store.claim_batch(store.start_run("r", {}), 10, Guards(heldout=items))
        assert [task.id for task in batch.tasks] == ([] if overlaps else [task_id])
        assert batch.left == ({HELD_OUT: [task_id]} if overlaps else {})


def test_generated_practice_is_no_evaluation_item_and_hardly_taken_for_one() -> None:
    for kind in ("arithmetic", "lookup"):
        heldout = HeldOut(task.question for task in generate(kind, 60, 0, "heldout"))
        assert all(heldout.overlaps(task.question) for task in generate(kind, 60, 0, "heldout"))
        practice = generate(kind, 200, 3, "train")
        assert sum(heldout.overlaps(task.question) for task in practice) <= 4


def test_what_a_run_holds_and_wont_use_doesnt_count(place: str) -> None:
    with Store.open(place) as store:
        fill(store, ada=4, bob=4)
        run = store.start_run("r", {})
        unfit = [task.id for task in store.claim_batch(run, 4, Guards(fold=False)).tasks]
        batch = store.claim_batch(run, 8, Guards(fold=False), unused=unfit)
        assert Counter(task.owner for task in batch.tasks) == {"ada": 2, "bob": 2}


def test_a_conflict_on_the_way_loses_no_claim(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with Store.open(place) as store:
        fill(store, ada=2, boss=2)
        run, other = store.start_run("r", {}), store.start_run("r", {})
        plan, give_up, tries = store._plan, claims.give_up_claims, []

        def overtaken(*arguments: Any) -> Any:  # another run is quicker with one of boss's
            planned = plan(*arguments)
            if not tries:
                store.claim(other, 1, only=[task.id for task in store.tasks() if task.owner == "boss"])
            return planned

        def undone_once(*arguments: Any, **named: Any) -> int:
            tries.append(named)
            if len(tries) == 1:
                raise Conflict("The database undid it.")
            return give_up(*arguments, **named)

        monkeypatch.setattr(store, "_plan", overtaken)
        monkeypatch.setattr(claims, "give_up_claims", undone_once)
        batch = store.claim_batch(run, 4, Guards(0.5, {"boss"}, fold=False))
        assert len(tries) == 2
        assert Counter(task.owner for task in batch.tasks) == {"ada": 1, "boss": 1}
        assert {task.id for task in store.tasks() if task.run_id == run} == {task.id for task in batch.tasks}
