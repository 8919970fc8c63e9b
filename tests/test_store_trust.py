"""Whose word a question's gold is: votes, review, quarantine, dates; and that it is told and written down."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import select

from feedback_store import InvalidRecord, NotFound, Outcome, Policy, Store
from feedback_store.admission import Gold, content_hash, put_task
from feedback_store.gold import Vote, question_hash, weigh
from feedback_store.schema import questions
from feedback_store.votes import last_votes
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


def test_a_time_without_a_zone_is_refused(store: Store, clock: Clock) -> None:
    naive = (clock.time + timedelta(days=1)).replace(tzinfo=None)
    with pytest.raises(InvalidRecord, match="no time zone"):
        teach(store, "ada", "1", "Who leads?", expires_at=naive)
    with pytest.raises(InvalidRecord, match="no time zone"):
        store.add_key("laptop", ["chat"], naive)
    assert not store.tasks()
    assert not store.api_keys()


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
    (kept,) = store.quarantines()
    assert kept.active
    assert "ada" not in str(kept)
    assert "ada" not in str(store.audit_log())
    assert teach(store, "ada", "2").became == "quarantined", "the key works still, and counts for nothing"
    store.lift_quarantine(kept.owner, "root")
    assert states(store) == {"2": "pending"}


def test_an_expiry_bounds_the_vote_that_carries_it(store: Store, clock: Clock) -> None:
    for name in ("ada", "bob"):
        teach(store, name, "1")
    soon = clock.time + timedelta(seconds=1)
    teach(store, "mallory", "1", expires_at=soon)
    teach(store, "mallory", "2")
    clock.advance(2)
    store.claim(store.start_run("r", {}), 9)
    assert states(store) == {"1": "review", "2": "review"}, "two against one, as if mallory had said nothing before"
    teach(store, "eve", "1")
    assert states(store) == {"1": "pending", "2": "rejected"}
    teach(store, "eve", "1", expires_at=clock.time + timedelta(seconds=5))
    clock.advance(9)
    store.claim(store.start_run("r", {}), 9)
    assert states(store) == {"1": "review", "2": "review"}, "a vote that ended counts no more, though its task goes on"


def test_the_last_of_the_votes_ends_a_gold(store: Store, clock: Clock) -> None:
    for name, days in (("ada", 1), ("bob", 3)):
        teach(store, name, "1", expires_at=clock.time + timedelta(days=days))
    assert store.tasks()[0].expires_at == clock.time + timedelta(days=3)


def test_a_gold_that_expired_doesnt_revive_an_older_one(store: Store, clock: Clock) -> None:
    teach(store, "ada", "1")
    teach(store, "ada", "2", expires_at=clock.time + timedelta(days=1))
    clock.advance(2 * 86_400)
    assert store.claim(store.start_run("r", {}), 9) == []
    assert states(store) == {"1": "review", "2": "expired"}


def test_who_dated_a_gold_isnt_judged_by_it_afterwards(store: Store, clock: Clock) -> None:
    for n in range(4):
        teach(store, "ada", "1", f"{n}?", expires_at=clock.time + timedelta(days=1))
    clock.advance(2 * 86_400)
    for n in range(4):
        teach(store, TRUSTED, "2", f"{n}?")
    teach(store, "ada", "5", "another?")
    assert store.quarantines() == []


def test_to_reject_all_golds_judges_nobody(store: Store) -> None:
    for n in range(3):
        teach(store, "ada", "1", f"{n}?")
        teach(store, "bob", "2", f"{n}?")
    for review in store.reviews():
        store.decide_review(review.id, None, "root")
    assert store.quarantines() == []


def test_a_review_takes_the_gold_of_a_vote_and_none_that_expired(store: Store, clock: Clock) -> None:
    teach(store, "ada", "1", expires_at=clock.time + timedelta(days=1))
    teach(store, "bob", "2")
    asked = [{"role": "user", "content": "How high?"}]
    store.add_task(asked, "no_tool", "1", "no_tool", "person", "eve", gold_key="")
    (review,) = store.reviews()
    store.decide_review(review.id, "1", "root")
    taken = {(task.verifier, task.gold): task.state for task in store.tasks()}
    assert (taken["numeric", "1"], taken["numeric", "2"]) == ("pending", "rejected")
    clock.advance(2 * 86_400)
    with pytest.raises(InvalidRecord, match="has expired"):
        store.decide_review(review.id, "1", "root")


def test_deleting_wrong_golds_doesnt_undo_them(store: Store) -> None:
    for n in range(6):
        teach(store, TRUSTED, "42", f"question {n}?")
    for n in range(3):
        lied = teach(store, "mallory", "41", f"question {n}?")
        store.finish_turn(lied.turn_id, "", "done")
        store.erase(conversation=store.turn(lied.turn_id).conversation_id)
    for _ in range(20):  # nor do right ones that were deleted outweigh them
        honest = teach(store, "mallory", "42", "question 5?")
        store.finish_turn(honest.turn_id, "", "done")
        store.erase(conversation=store.turn(honest.turn_id).conversation_id)
    (found,) = store.quarantines()
    assert (found.owner, found.active) == ("mallory", True)


def test_withdrawing_consent_doesnt_undo_wrong_golds(store: Store) -> None:
    for n in range(2):
        teach(store, "mallory", "41", f"question {n}?")
    run = store.start_run("r", {})
    assert len(store.claim(run, 1)) == 1  # which is emptied then, while the other is deleted
    store.release(run)
    for n in range(3):
        teach(store, TRUSTED, "42", f"question {n}?")
    assert store.set_consent("mallory", False).emptied == 1
    store.set_consent("mallory", True)
    teach(store, "mallory", "41", "question 2?")
    assert [one.owner for one in store.quarantines()] == ["mallory"]


def test_what_grew_old_stays_known(store: Store, clock: Clock) -> None:
    for name in ("ada", "bob", "eve"):
        told = teach(store, name, "1", source="client")
        store.finish_turn(told.turn_id, "", "done")
    clock.advance(86_400)
    lie = teach(store, "mallory", "2")
    store.finish_turn(lie.turn_id, "", "done")
    store.expire(clock.time)
    assert states(store) == {"2": "rejected"}
    assert teach(store, "gil", "1").became == "queued", "the gold that is known may be taught again"
    (question,) = [store.review(lie.task_id or "")]
    assert (question.basis, question.decision) == ("known", "1")
    for name in ("mallory", "dan", "fay", "hal", "ivy"):
        teach(store, name, "2", source="client")
    assert states(store) == {"1": "rejected", "2": "pending"}, "until others say otherwise as surely"


def test_who_withdraws_consent_takes_the_vote_along(store: Store) -> None:
    teach(store, "ada", "1")
    teach(store, "bob", "2")
    store.set_consent("ada", False)
    assert states(store) == {"2": "pending"}


def test_repeating_a_question_costs_no_more_each_time(store: Store) -> None:
    asked = [{"role": "user", "content": "How high?"}]
    for _ in range(40):
        store.add_task(asked, "exact", "1", "exact", "person", "ada")
    with store._read() as connection:
        (vote,) = last_votes(connection, [question_hash(asked)])
    assert vote.owner == "ada"


def test_a_full_queue_keeps_nothing_of_the_question(place: str) -> None:
    with Store.open(place, max_pending=1) as store:
        teach(store, "ada", "1", "a?")
        assert "full" in teach(store, "ada", "1", "b?").note
        with store._read() as connection:
            assert len(connection.execute(select(questions)).all()) == 1


def test_a_task_that_was_withdrawn_is_not_looked_at_by_every_claim(store: Store, clock: Clock) -> None:
    teach(store, "ada", "1", expires_at=clock.time + timedelta(days=1))
    run = store.start_run("r", {})
    store.claim(run, 1)
    store.release(run)
    store.set_consent("ada", False)
    (task,) = store.tasks()
    assert (task.state, task.expires_at) == ("withdrawn", None)


@pytest.mark.parametrize("places", ["postgresql"], indirect=True)
def test_no_gold_slips_past_a_quarantine_that_is_being_made(store: Store) -> None:
    teach(store, "mallory", "1", "a?")
    asked: list[dict[str, object]] = [{"role": "user", "content": "b?"}]
    given = Gold("exact", "1", "person", "mallory", 0.5)
    with store._write() as connection:  # a gold that is being taken
        put_task(connection, asked, given, kind="k", policy=store.policy, max_pending=9, now=store._now())
        barring = threading.Thread(target=store.quarantine, args=("mallory", "root", "lies"))
        barring.start()
        barring.join(0.5)
        assert barring.is_alive(), "it waits until that gold is in"
    barring.join(60)
    assert {task.state for task in store.tasks()} == {"review"}


def test_a_task_is_told_in_the_words_of_those_who_still_ask_for_it(store: Store) -> None:
    first = teach(store, "ada", "8849", "how  HIGH, dear?", source="client")
    store.finish_turn(first.turn_id, "", "done")
    again = teach(store, "bob", "8,849.0", "How high, dear?", source="client")
    assert again.task_id == first.task_id
    before = store.task(first.task_id or "").content_hash
    store.erase(owner="ada")
    (task,) = store.tasks()
    assert (task.owner, task.gold, task.messages[0]["content"]) == ("bob", "8,849.0", "How high, dear?")
    assert task.content_hash == content_hash(task.messages, "numeric", "8,849.0") != before


def test_names_and_tool_calls_make_another_question() -> None:
    plain = {"role": "user", "content": "How high?"}
    called = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    asked = [[plain], [plain | {"name": "Ada"}], [plain, called], [plain, called | {"tool_calls": [{"id": "x"}]}]]
    assert len({question_hash(messages) for messages in asked}) == 4
    assert question_hash([plain | {"content": "how HIGH"}]) == question_hash([plain])
