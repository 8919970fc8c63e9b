"""Whose word a question's gold is: votes, review, quarantine, dates; and that it is told and written down."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from feedback_store import InvalidRecord, NotFound, Outcome, Policy, Store
from feedback_store.gold import Vote, weigh
from online_rl.verifiers import gold_key
from tests.test_store_queue import Clock

TRUSTED = "key-boss"


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(place: str, clock: Clock) -> Iterator[Store]:
    with Store.open(place, now=clock, policy=Policy(trusted_owners={TRUSTED})) as opened:
        yield opened


def teach(
    store: Store, owner: str, gold: str, question: str = "How high?", source: str = "person", score: float = 0.0, **more
) -> Outcome:
    messages = [{"role": "user", "content": question}]
    turn = store.begin_turn(store.create_conversation(owner), messages, "v0", [])
    key = gold_key("numeric", gold)
    return store.add_outcome(turn, source, score, "numeric", gold, owner=owner, gold_key=key, **more)


def states(store: Store) -> dict[str, str]:
    return {task.gold: task.state for task in store.tasks()}


def test_votes_are_owners_and_not_repetitions() -> None:
    loud = [Vote("mallory", "41", 0.5)] * 50
    assert weigh([*loud, Vote("ada", "42", 0.5)], Policy()).gold_key is None
    honest = [Vote(name, "42", 0.5) for name in ("ada", "bob", "eve")]
    assert weigh([*loud, *honest], Policy()).gold_key == "42"
    assert weigh([*loud, Vote("mallory", "42", 0.5)], Policy()).gold_key == "42"  # the last word counts


def test_equal_golds_are_one_task_and_others_wait_for_review(store: Store) -> None:
    first = teach(store, "ada", "8849")
    assert (first.became, first.trust, first.note) == ("queued", 0.5, "")
    again = teach(store, "bob", "8,849.0", "how  HIGH")
    assert (again.became, again.task_id) == ("known", first.task_id)
    other = teach(store, "eve", "8848")
    assert other.became == "review"
    assert "until a person has decided" in other.note
    assert states(store) == {"8849": "review", "8848": "review"}
    assert store.claim(store.start_run("r", {}), 9) == []
    teach(store, "dan", "8849")  # three of four: three quarters of the trust
    assert states(store) == {"8849": "pending", "8848": "rejected"}
    assert "say otherwise" in store.tasks("rejected")[0].reason


def test_a_verifier_of_another_name_is_no_way_round(store: Store) -> None:
    teach(store, "ada", "42")
    turn = store.begin_turn(store.create_conversation("eve"), [{"role": "user", "content": "How high?"}], "v0", [])
    assert store.add_outcome(turn, "person", 0.0, "exact", "41", owner="eve").became == "review"
    assert set(states(store).values()) == {"review"}


def test_a_trusted_owner_wins_and_a_person_counts_less_than_a_client(store: Store) -> None:
    teach(store, "ada", "1", "a?")
    assert teach(store, TRUSTED, "2", "a?").became == "queued"
    assert states(store) == {"1": "rejected", "2": "pending"}
    for name in ("ada", "bob"):
        teach(store, name, "1", "b?", source="client")
    teach(store, "eve", "2", "b?")  # 1.6 against 0.5
    assert store.review(store.tasks("rejected")[-1].id).golds[0].gold == "1"


def test_who_corrects_himself_is_taken_at_his_last_word(store: Store) -> None:
    teach(store, "ada", "41")
    assert teach(store, "ada", "42").became == "queued"
    assert states(store) == {"41": "rejected", "42": "pending"}


def test_a_task_that_is_done_opens_again_only_when_it_is_answered_wrongly_again(store: Store, clock: Clock) -> None:
    messages = [{"role": "user", "content": "How high?"}]
    old = store.begin_turn(store.create_conversation("ada"), messages, "v0", [])
    task_id = teach(store, "ada", "42").task_id
    run = store.start_run("r", {})
    clock.advance(10)
    store.claim(run, 1)
    store.complete(run, [task_id])
    clock.advance(10)
    before = store.add_outcome(old, "person", 0.0, "numeric", "42", owner="ada", gold_key="42")
    assert before.became == "done"  # the answer is older than what was learnt
    assert teach(store, "ada", "42", score=1.0).became == "done"
    assert teach(store, "bob", "42", score=0.0).became == "reopened"
    assert [task.id for task in store.claim(run, 9)] == [task_id]


def test_a_gold_ends_on_its_day_and_may_be_taught_anew(store: Store, clock: Clock) -> None:
    until = clock.time + timedelta(days=1)
    teach(store, "ada", "1", "Who leads?", expires_at=until)
    teach(store, "bob", "2", "Who leads?")
    assert states(store) == {"1": "review", "2": "review"}
    clock.advance(86_400)
    assert states(store)["1"] == "expired"
    assert [task.gold for task in store.claim(store.start_run("r", {}), 9)] == ["2"]  # nothing stands against it now
    with pytest.raises(InvalidRecord, match="later time"):
        teach(store, "ada", "3", "Who leads?", expires_at=until)
    assert store.outcomes()[0].gold == "2"
    teach(store, "ada", "1", "Who leads?", expires_at=clock.time + timedelta(days=9))
    assert store.tasks("review")[0].gold == "1"


def test_a_person_decides_and_takes_it_back(store: Store) -> None:
    teach(store, "ada", "1")
    teach(store, "bob", "2")
    (review,) = store.reviews()
    assert {claim.gold: claim.owners for claim in review.golds} == {"1": {"ada": 0.5}, "2": {"bob": 0.5}}
    with pytest.raises(InvalidRecord, match="Nobody gave the gold '3'"):
        store.decide_review(review.id, "3", "root")
    decided = store.decide_review(review.id, "2", "root", "looked it up")
    assert (decided.decision, decided.basis, decided.decided_by) == ("2", "review", "root")
    assert states(store) == {"1": "rejected", "2": "pending"}
    assert store.reviews() == []
    for name in ("eve", "dan", "fay", "gil"):
        assert teach(store, name, "1").became == "rejected"  # votes don't undo what a person decided
    store.decide_review(review.id, None, "root")
    assert set(states(store).values()) == {"rejected"}
    store.withdraw_review(review.id, "root")
    assert states(store) == {"1": "pending", "2": "rejected"}
    with pytest.raises(InvalidRecord, match="Nothing was decided"):
        store.withdraw_review(review.id, "root")
    with pytest.raises(NotFound):
        store.review("0123")
    done = [(entry.who, entry.action, entry.subject) for entry in store.audit_log("review")]
    assert done == [("root", f"review.{what}", review.id) for what in ("withdraw", "reject", "accept")]
    assert store.audit_log("review.accept")[0].detail["reason"] == "looked it up"


def lie(store: Store, owner: str, times: int, start: int = 0) -> None:
    for n in range(start, start + times):
        teach(store, TRUSTED, "42", f"question {n}?")
        teach(store, owner, "41", f"question {n}?")


def test_an_owner_who_contradicts_what_is_known_is_quarantined_and_let_go(store: Store, clock: Clock) -> None:
    teach(store, "mallory", "7", "nobody else asks this?")
    teach(store, "mallory", "7", "nor this?")
    teach(store, "ada", "7", "nor this?")
    lie(store, "mallory", 2)
    assert store.quarantines() == []
    lie(store, "mallory", 1, start=2)
    (found,) = store.quarantines()
    assert (found.owner, found.active, found.who) == ("mallory", True, "guard")
    assert "3 of 3" in found.reason
    alone, shared = (task for task in store.tasks() if task.gold == "7")
    assert (alone.state, shared.state) == ("review", "pending")
    assert teach(store, "mallory", "5", "another?").became == "quarantined"

    store.lift_quarantine("mallory", "root", "was ill advised")
    assert store.task(alone.id).state == "pending"
    assert not store.quarantines()[0].active
    clock.advance(1)
    lie(store, "mallory", 2, start=3)  # only what comes after counts
    assert not store.quarantines()[0].active
    lie(store, "mallory", 1, start=5)
    assert store.quarantines()[0].active
    assert [entry.action for entry in store.audit_log("quarantine")] == ["quarantine", "quarantine.lift", "quarantine"]
    with pytest.raises(NotFound, match="in quarantine"):
        store.lift_quarantine("ada", "root")
    with pytest.raises(InvalidRecord, match="trusted_owners"):
        store.quarantine(TRUSTED, "root", "no")


def test_a_person_s_decision_judges_owners_too(store: Store) -> None:
    for n in range(3):
        teach(store, "ada", "1", f"{n}?")
        teach(store, "bob", "2", f"{n}?")
    for review in store.reviews():
        store.decide_review(review.id, "1", "root")
    assert [one.owner for one in store.quarantines()] == ["bob"]


def test_a_source_without_trust_trains_nothing_alone(tmp_path: Path) -> None:
    policy = Policy(by_source={"person": 0.0}, by_owner={"key-good": 0.9})
    with Store.open(tmp_path / "s.db", policy=policy) as store:
        assert teach(store, "ada", "1").became == "review"
        assert teach(store, "key-good", "1").became == "known"
        assert states(store) == {"1": "pending"}


def test_a_dead_task_is_found_and_put_back(store: Store, clock: Clock) -> None:
    task_id = teach(store, "ada", "42").task_id
    assert task_id is not None
    for _ in range(4):
        run = store.start_run("r", {})
        store.claim(run, 1)
        store.finish_run(run, "failed", {})
    with pytest.raises(InvalidRecord, match="isn't dead"):
        store.requeue([task_id], "root")
    store.claim(run := store.start_run("r", {}), 1, lease_seconds=5)
    clock.advance(5)
    (dead,) = store.dead_tasks()
    assert dead.task.id == task_id
    assert run in dead.reason
    assert "lease" in dead.reason
    assert store.requeue([task_id], "root", "the disk was full") == 1
    assert (store.dead_tasks(), store.task(task_id).state, store.task(task_id).attempts) == ([], "pending", 0)
    assert store.audit_log()[0].action == "queue.requeue"
    with pytest.raises(NotFound):
        store.requeue(["task_x"], "root")


def test_a_conversation_that_is_forgotten_takes_its_vote_along(store: Store) -> None:
    mine = teach(store, "ada", "1")
    teach(store, "bob", "2")
    assert set(states(store).values()) == {"review"}
    store.finish_turn(mine.turn_id, "1", "done")
    store.erase(conversation=store.turn(mine.turn_id).conversation_id)
    assert states(store) == {"2": "pending"}


def test_an_owner_who_is_forgotten_leaves_no_name_behind(store: Store) -> None:
    mine = teach(store, "ada", "1")
    store.finish_turn(mine.turn_id, "1", "done")
    store.quarantine("ada", "root", "she lies")
    store.erase(owner="ada")
    assert store.quarantines() == []
    assert "ada" not in str(store.audit_log())
