"""Forgetting on either database: what was withdrawn before, copies elsewhere, reviews, races, and the audit of it."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event, text

from app.erasure import sweep
from app.retention import tidy
from app.settings import Settings
from app.unclosed import Unclosed
from feedback_store import Busy, Store, StoreError
from feedback_store.erasing import Work, owner_hash
from feedback_store.errors import Conflict
from feedback_store.withdrawal import withdraw
from online_rl.replay import Replay
from online_rl.result_record import ROLLOUTS, ResultRecord
from online_rl.tasks.base import Task
from serving.trajectory import Observation
from tests.databases import rows
from tests.test_store_erasure import MINE, OURS, SECRET, learn, talk
from tests.test_store_postgres import until


@pytest.fixture
def store(place: str) -> Iterator[Store]:
    with Store.open(place) as opened:
        opened.add_version("v1", None, "v1", {}, "published")
        yield opened


def test_what_consent_withdrew_before_is_forgotten_too(store: Store, tmp_path: Path) -> None:
    conversation = talk(store, "ada", MINE)
    trained = store.start_run("r", {})
    store.claim(trained, 9)
    store.add_version("v2", "v1", "v2", {}, "refused", run_id=trained)
    store.finish_run(trained, "refused", {})  # its task waits again
    talk(store, "ada", OURS, "4")
    failed = store.start_run("r", {})
    task = store.claim(failed, 9)[-1]
    store.finish_run(failed, "failed", {})
    folder = tmp_path / "runs" / failed
    folder.mkdir(parents=True)
    kept = {"messages": list(OURS), "verifier": "exact", "gold": "4", "kind": "k", "source": "queue"}
    (folder / "tasks.json").write_text(json.dumps([kept | {"meta": {"queue_id": task.id}}]))
    assert store.set_consent("ada", training=False).emptied == 2
    assert store.tainted() == {}, "what was learnt before isn't taken back by that"
    assert store.erase(conversation=conversation).tainted == ["v2"]
    store.erase(owner="ada")
    assert not sweep(store, tmp_path, vacuum=False).unfinished
    assert not folder.exists()
    assert not store.unswept()


async def test_results_of_who_refuses_training_are_not_replayed(store: Store) -> None:
    async def ask(tool: str, input: str) -> Observation:
        return Observation(tool, "from the world")

    call = Replay(ask, "recorded_first", store).of(Task(tuple(OURS), "exact", "4", "k", "generated"))
    talk(store, "ada", MINE, seen=SECRET)
    assert (await call("search", SECRET)).text == f"found {SECRET}"
    store.set_consent("ada", training=False)
    assert (await call("search", SECRET)).text == "from the world"


def test_results_that_other_tasks_saw_go_from_the_runs_too(store: Store, tmp_path: Path) -> None:
    conversation = talk(store, "ada", MINE)
    run = store.start_run("r", {})
    (tmp_path / "runs" / run).mkdir(parents=True)
    record = ResultRecord(tmp_path / "runs" / run / ROLLOUTS)
    record.keep("theirs", "search", SECRET, Observation("search", f"found {SECRET}"))
    record.keep("theirs", "search", "two", Observation("search", "four"))
    record.close()
    store.erase(conversation=conversation)
    assert run in sweep(store, tmp_path, vacuum=False).unfinished, "it may write there now"
    assert store.unswept().results != []
    store.finish_run(run, "ended", {})
    assert not sweep(store, tmp_path, vacuum=False).unfinished
    left = ResultRecord(tmp_path / "runs" / run / ROLLOUTS, write=False)
    assert left.own("theirs", "search", SECRET) is None
    assert left.own("theirs", "search", "two") is not None
    assert not store.unswept()


def test_a_review_goes_with_the_gold_that_it_chose(store: Store) -> None:
    talk(store, "ada", OURS, SECRET)
    talk(store, "bob", OURS, "4")
    review = store.decide_review(store.reviews()[0].id, SECRET, "root", f"since {SECRET}")
    assert SECRET not in str(store.audit_log("review.accept")[0].detail.get("task"))
    store.erase(owner="ada")
    assert [task.state for task in store.tasks()] == ["pending"], "bob's gold isn't rejected for one that is gone"
    assert store.review(review.id).basis == ""
    assert SECRET not in str([entry.detail for entry in store.audit_log()])


def test_no_table_has_the_text_of_a_review_or_a_quarantine(store: Store, place: str) -> None:
    talk(store, "ada", OURS, SECRET)
    talk(store, "bob", OURS, "4")
    store.decide_review(store.reviews()[0].id, "4", "root", f"not {SECRET}")
    store.quarantine("ada", "root", f"says {SECRET}")
    store.erase(owner="ada")
    for table in ("questions", "quarantines", "audit", "tasks"):
        assert SECRET not in str(rows(place, f"SELECT * FROM {table}")), table


def test_a_vote_that_comes_meanwhile_is_kept(store: Store, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if "postgres" not in place:
        pytest.skip("SQLite has one writer at a time")
    talk(store, "ada", OURS, "4")
    voting = threading.Thread(target=store.add_task, args=(OURS, "exact", "4", "k", "upload", "bob"))

    def withdraw_late(*arguments: Any) -> tuple[int, int]:  # once it is known who asked, and bob wasn't among them
        waits = "SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
        if voting.ident is None:
            voting.start()
        until(lambda: not voting.is_alive() or rows(place, waits))
        return withdraw(*arguments)

    monkeypatch.setattr("feedback_store.erasing.withdraw", withdraw_late)
    store.erase(owner="ada")
    voting.join(60)
    assert [(task.owner, task.gold) for task in store.tasks()] == [("bob", "4")]


def test_an_erased_turn_is_swept_after_a_crash_and_takes_its_title(store: Store, tmp_path: Path) -> None:
    conversation = talk(store, "ada", OURS, "4")
    (first,) = store.turns(conversation)
    learn(store, "v2", "v1")
    store.erase_turn(first.id)
    assert store.unswept().runs != []
    tidy(store, Settings(home=tmp_path))
    assert not store.unswept()
    later = store.begin_turn(conversation, MINE, "v1", [1])  # it names the conversation now
    store.finish_turn(later, "so", "done")
    assert SECRET in store.conversation(conversation).title
    store.erase_turn(later)
    assert store.conversation(conversation).title == ""
    store.rename_conversation(conversation, "Sums")
    last = store.begin_turn(conversation, OURS, "v1", [1])
    store.finish_turn(last, "4", "done")
    store.erase_turn(last)
    assert store.conversation(conversation).title == "Sums", "a person gave it"


def test_a_damaged_run_file_is_told_and_keeps_nothing_else_back(store: Store, tmp_path: Path) -> None:
    conversation = talk(store, "ada", MINE)
    run = learn(store, "v2", "v1")
    for name in ("files/" + conversation, "runs/" + run):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "runs" / run / "tasks.json").write_text("[1]")
    store.erase(conversation=conversation)
    assert "tasks.json is no list of tasks" in sweep(store, tmp_path, vacuum=False).unfinished
    assert not (tmp_path / "files" / conversation).exists()
    assert store.unswept()


def test_a_turn_that_the_store_could_not_close_is_closed_later(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    conversation = store.create_conversation("ada")
    turn = store.begin_turn(conversation, MINE, "v1", [1])
    turns = Unclosed(store)

    def full(*_: object) -> None:
        raise StoreError("the disk is full")

    with monkeypatch.context() as broken:
        broken.setattr(store, "finish_turn", full)
        with pytest.raises(StoreError, match="full"):
            turns.finish(turn, "so", "done")
        with pytest.raises(StoreError, match="full"):
            turns.retry()
    with pytest.raises(Busy):
        store.erase(conversation=conversation)
    assert (turns.retry(), len(turns)) == (1, 0)
    assert (store.turn(turn).status, store.turn(turn).answer) == ("done", "so")
    store.erase(conversation=conversation)


def test_rewriting_a_large_database_has_no_time_limit(store: Store, place: str) -> None:
    said: list[str] = []

    @event.listens_for(store._engine, "before_cursor_execute")
    def listen(connection: Any, cursor: Any, statement: str, *_: object) -> None:
        said.append(statement)

    assert store.sweep_database(vacuum=True)
    if "postgres" in place:
        assert said[0] == "SET statement_timeout = 0"
        assert said[1].startswith("VACUUM FULL")
        assert "audit" in said[1]
        with store._engine.connect() as connection:
            assert connection.execute(text("SHOW statement_timeout")).scalar() != "0"


def test_the_audit_has_erasures_and_changes_of_the_version(store: Store) -> None:
    store.set_current("v1", "first", who="root")
    conversation = talk(store, "ada", MINE)
    store.erase(conversation=conversation, dry_run=True)
    store.erase(conversation=conversation)
    talk(store, "bob", OURS, "4")
    store.erase(owner="bob", who="root")
    talk(store, "eve", OURS, "4")
    store.expire(datetime.now(UTC) + timedelta(days=1))
    told = [(entry.who, entry.action, entry.subject) for entry in reversed(store.audit_log())]
    assert told[:3] == [
        ("root", "version.use", "v1"),
        (owner_hash("ada"), "forget", conversation),
        ("root", "forget", owner_hash("bob")),
    ]
    assert told[3][:2] == ("retention", "expire")
    assert len(told) == 4


def test_only_what_others_asked_for_counts_as_kept(store: Store) -> None:
    talk(store, "ada", OURS, "4")
    store.add_task(OURS, "exact", "4", "k", "upload", "ada")  # the same, by herself and without a conversation
    done = store.erase(owner="ada")
    assert (done.tasks_kept, done.tasks_deleted) == (0, 1)


def test_an_owner_with_nothing_but_tasks_and_verdicts_of_others_is_forgotten(store: Store) -> None:
    theirs = talk(store, "bob", OURS, "4")
    (turn,) = store.turns(theirs)
    store.add_task(OURS, "exact", "4", "k", "upload", "ada")
    store.add_outcome(turn.id, "person", 0.0, reason=f"ada knows of {SECRET}", owner="ada")
    done = store.erase(owner="ada")
    assert (done.tasks_kept, done.outcomes) == (1, 1)
    assert [outcome.owner for outcome in store.outcomes(turn.id)] == ["bob"]


def test_a_conflict_loses_no_count_of_what_expired(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = [talk(store, "ada", [{"role": "user", "content": f"Question {n}"}], str(n)) for n in range(3)]
    erase, calls = Work.erase, iter(range(9))

    def undone_once(self: Work, found: Any) -> None:
        if next(calls) == 1:
            raise Conflict("another transaction was first")
        erase(self, found)

    monkeypatch.setattr(Work, "erase", undone_once)
    monkeypatch.setattr("feedback_store.withdrawal.CHUNK", 1)
    assert store.expire(datetime.now(UTC) + timedelta(days=1)).conversations == ids
