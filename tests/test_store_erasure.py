"""Forgetting: the text is gone from every file, what stays is named, and what learnt from it is marked."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from app.erasure import sweep
from feedback_store import Busy, NotFound, Store, StoreError
from feedback_store.selection import Selection
from online_rl.result_record import ROLLOUTS, ResultRecord
from online_rl.tasks.base import Task
from serving.trajectory import Observation, Step
from tools.workspace import Workspaces

SECRET = "xylophone-7741"
MINE = [{"role": "user", "content": f"My code word is {SECRET}: what is 6 * 7?"}]
OURS = [{"role": "user", "content": "What is 2 + 2?"}]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "whetstone.db") as opened:
        for id, parent in (("v0", None), ("v1", "v0")):
            opened.add_version(id, parent, id, {}, "published")
        opened.set_current("v1", "test")
        yield opened


def talk(store: Store, owner: str, messages: list[dict[str, str]], gold: str = SECRET, seen: str = SECRET) -> str:
    """A conversation with a step, a tool result, an answer and a verdict, all of which say the gold."""
    conversation = store.create_conversation(owner)
    turn = store.begin_turn(conversation, messages, "v1", [1, 2, 3])
    observation = Observation("search", f"found {seen}")
    fields = {"text": f"<search>{seen}</search>", "thought": f"of {gold}", "action": "search", "input": seen}
    store.append_step(turn, Step(0, [7], [-0.5], [1], "v1", observation=observation, **fields))  # type: ignore[arg-type]
    store.finish_turn(turn, f"It is {gold}.", "done")
    store.add_outcome(turn, "client", 1.0, "exact", gold, f"because of {gold}", owner)
    return conversation


def learn(store: Store, candidate: str, parent: str, n: int = 100) -> str:
    """A run that trains on what waits."""
    run = store.start_run("r", {"parent": parent, "candidate": candidate})
    claimed = [task.id for task in store.claim(run, n)]
    store.add_version(candidate, parent, candidate, {}, "published", run_id=run)
    store.complete(run, claimed)
    store.finish_run(run, "promoted", {"examples": [{"question": MINE[0]["content"], "gold": SECRET}]})
    return run


def raw(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


def erase_all(store: Store, home: Path, vacuum: bool = True, **what: str) -> None:
    store.erase(**what)  # type: ignore[arg-type]
    assert not sweep(store, home, Workspaces(home / "files"), vacuum=vacuum).unfinished


@pytest.mark.parametrize("vacuum", [True, False])
def test_a_forgotten_text_is_in_no_file(store: Store, tmp_path: Path, vacuum: bool) -> None:
    for n in range(20):
        talk(store, "bob", [{"role": "user", "content": f"Question {n} {'x' * 300}"}], str(n), str(n))
    conversation = talk(store, "ada", MINE)
    files = Workspaces(tmp_path / "files")
    files.write(conversation, "notes.txt", SECRET.encode())
    store.rename_conversation(conversation, f"About {SECRET}")
    run = learn(store, "v2", "v1")
    folder = tmp_path / "runs" / run
    folder.mkdir(parents=True)
    (queued,) = [t for t in store.tasks(limit=100) if SECRET in str(t.messages)]
    task = Task(tuple(queued.messages), "exact", SECRET, "exact", "queue", {"queue_id": queued.id})
    other = Task(tuple(OURS), "exact", "4", "exact", "generated")
    rows = [vars(task) | {"messages": list(task.messages)}, vars(other) | {"messages": list(other.messages)}]
    (folder / "tasks.json").write_text(json.dumps(rows))
    examples = [{"question": t.question, "gold": t.gold, "before": "", "after": ""} for t in (task, other)]
    (folder / "evaluated.json").write_text(json.dumps({"before": [], "after": [], "examples": examples}))
    record = ResultRecord(folder / ROLLOUTS)
    record.keep(task.id, "search", SECRET, Observation("search", f"about {SECRET}"))
    record.keep(other.id, "search", "two", Observation("search", "four"))
    record.close()
    assert SECRET.encode() in raw(tmp_path)

    erase_all(store, tmp_path, vacuum, conversation=conversation)
    assert SECRET.encode() not in raw(tmp_path)
    assert not (tmp_path / "files" / conversation).exists()
    kept = ResultRecord(folder / ROLLOUTS, write=False)
    seen = kept.own(other.id, "search", "two")
    assert seen is not None
    assert seen.text == "four", "what other tasks saw is still there"
    assert [row["meta"].get("queue_id") for row in json.loads((folder / "tasks.json").read_text())] == [queued.id, None]
    assert store.find_conversations(Selection(search="xylophone")) == []
    assert len(store.conversations("bob")) == 20
    assert store.unswept().conversations == []


def test_what_stays_is_a_tombstone_and_forgetting_again_changes_nothing(store: Store) -> None:
    conversation = talk(store, "ada", MINE)
    (turn,) = store.turns(conversation)
    plan = store.erase(conversation=conversation, dry_run=True)
    assert store.conversation(conversation).turns == 1, "a dry run changes nothing"
    done = store.erase(conversation=conversation)
    assert (done.turns, done.steps, done.tool_results, done.outcomes, done.tasks_deleted) == (1, 1, 1, 1, 1)
    assert plan.conversations == done.conversations == [conversation]
    for look in (lambda: store.conversation(conversation), lambda: store.turn(turn.id)):
        with pytest.raises(NotFound):
            look()
    assert store.trace(conversation).note.startswith("forgotten 20")
    assert store.trace(turn.id).came_from[0].id == "v1", "which version wrote it is still known"
    again = store.erase(conversation=conversation)
    assert (again.already, again.conversations) == (1, [])
    assert store.erase(owner="ada").already == 1
    with pytest.raises(NotFound):
        store.erase(conversation="conv_none")
    with pytest.raises(NotFound):
        store.erase(owner="nobody")


def test_what_others_use_too_stays_for_them(store: Store) -> None:
    mine, theirs = talk(store, "ada", OURS, "4"), talk(store, "bob", OURS, "4")
    (task,) = store.tasks()
    assert task.owner == "ada"
    done = store.erase(owner="ada")
    assert (done.tasks_kept, done.tasks_deleted, done.tool_results) == (1, 0, 0)
    assert store.task(task.id).owner == "bob", "whose it was first isn't told any more"
    assert store.tool_results(conversation_id=theirs)[0].observation.text == f"found {SECRET}"
    assert [t.id for t in store.trace(task.id).came_from] == [theirs]
    done = store.erase(owner="bob")
    assert (done.tasks_deleted, done.tool_results) == (1, 1)
    assert mine not in [c.id for c in store.conversations()]


def test_versions_that_learnt_from_it_are_tainted_with_their_descendants(store: Store) -> None:
    conversation = talk(store, "ada", MINE)
    run = learn(store, "v2", "v1")
    talk(store, "bob", OURS, "4")
    learn(store, "v3", "v2")
    store.add_version("v2b", "v1", "v2b", {}, "published")
    store.set_current("v3", "newest")
    assert store.tainted() == {}
    done = store.erase(conversation=conversation)
    assert (done.tasks_emptied, done.tasks_deleted) == (1, 0)
    assert done.tainted == ["v2", "v3"]
    assert (done.in_service_tainted, done.roll_back_to, done.retrain) == ("v3", "v1", [run])
    assert store.clean_ancestor("v2b") == "v2b"
    assert {v: t.runs for v, t in store.tainted().items()} == {"v2": [run], "v3": [run]}
    (emptied,) = [t for t in store.tasks(limit=9) if t.state == "withdrawn"]
    assert (emptied.messages, emptied.gold, emptied.owner) == ([], "", "")
    assert store.run(run).report["examples"] == []
    down = store.trace(conversation).led_to
    assert [(t.id, [v.id for v in t.led_to]) for t in down] == [(run, ["v2"])]
    talk(store, "eve", MINE)  # the same question of another's is a new task, not the emptied one
    assert store.queue_stats()["pending"] == 1
    talk(store, "bob", OURS + MINE, "5")
    learn(store, "v4", "v3")
    assert "v4" in store.tainted(), "a child of tomorrow is tainted too"


def test_a_task_that_a_run_set_aside_taints_nothing(store: Store) -> None:
    conversation = talk(store, "ada", MINE)
    run = store.start_run("r", {})
    (task,) = store.claim(run, 1)
    store.set_stage(run, "claim", {"set_aside": {"too long": [task.id]}})
    store.add_version("v2", "v1", "v2", {}, "refused", run_id=run)
    store.finish_run(run, "refused", {})
    assert store.erase(conversation=conversation).tainted == []


def test_a_refused_candidate_was_trained_on_it_too(store: Store) -> None:
    conversation = talk(store, "ada", MINE)
    run = store.start_run("r", {})
    store.claim(run, 1)
    store.add_version("v2", "v1", "v2", {}, "refused", run_id=run)
    store.finish_run(run, "refused", {})
    done = store.erase(conversation=conversation)
    assert (done.tainted, done.in_service_tainted) == (["v2"], None)


def test_a_run_under_way_is_waited_for_and_a_dead_one_is_ended(store: Store, tmp_path: Path) -> None:
    conversation = talk(store, "ada", MINE)
    code = (
        "import sys; from feedback_store import Store\n"
        "with Store.open(sys.argv[1]) as store: run = store.start_run('r', {}); store.claim(run, 9); print(run)\n"
        "sys.stdout.flush(); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "whetstone.db")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        run = other.stdout.readline().strip()
        for what in ({"conversation": conversation}, {"owner": "ada"}):
            with pytest.raises(Busy, match=run):
                store.erase(**what)  # type: ignore[arg-type]
        assert store.expire(datetime.now(UTC) + timedelta(days=1)).skipped == 1
        assert store.conversation(conversation).turns == 1
        other.kill()
    folder = tmp_path / "runs" / run
    folder.mkdir(parents=True)
    (folder / "checkpoint").write_text(SECRET)
    done = store.erase(conversation=conversation)
    assert done.runs_ended == [run]
    assert store.run(run).status == "ended"
    sweep(store, tmp_path, Workspaces(tmp_path / "files"), vacuum=False)
    assert not folder.exists(), "weights of a run that can't go on and made no version"


def test_an_answer_under_way_is_waited_for(store: Store) -> None:
    conversation = store.create_conversation("ada")
    store.begin_turn(conversation, MINE, "v1", [1])
    with pytest.raises(Busy, match="under way"):
        store.erase(owner="ada")
    assert store.conversation(conversation).turns == 1


def test_one_turn_is_erased_and_its_conversation_stays(store: Store, tmp_path: Path) -> None:
    conversation = talk(store, "ada", MINE)
    (turn,) = store.turns(conversation)
    learn(store, "v2", "v1")
    later = store.begin_turn(conversation, OURS, "v1", [1])
    store.finish_turn(later, "4", "done")
    done = store.erase_turn(turn.id)
    assert (done.turns, done.steps, done.tasks_emptied, done.tainted) == (1, 1, 1, ["v2"])
    assert not sweep(store, tmp_path, vacuum=False).unfinished
    assert [t.id for t in store.turns(conversation)] == [later]
    assert store.conversation(conversation).title == "", "it was made of the question"
    assert SECRET.encode() not in raw(tmp_path)
    assert "erased" in store.trace(turn.id).note
    with pytest.raises(NotFound):
        store.erase_turn(turn.id)
    store.erase(owner="ada")
    assert store.conversations() == []


def test_a_crash_between_the_record_and_the_files_is_made_good(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = Workspaces(tmp_path / "files")
    conversation = talk(store, "ada", MINE)
    files.write(conversation, "a.txt", b"mine")
    store.erase(conversation=conversation)  # and nothing more: the process died
    assert store.unswept().conversations == [conversation]

    def full(*_: object) -> None:
        raise OSError("the disk is broken")

    with monkeypatch.context() as broken:
        broken.setattr(Workspaces, "forget", full)
        assert "disk is broken" in sweep(store, tmp_path, files, vacuum=False).unfinished
    assert store.unswept().conversations == [conversation]
    assert not sweep(store, tmp_path, files, vacuum=False).unfinished
    assert not (tmp_path / "files" / conversation).exists()
    assert SECRET.encode() not in raw(tmp_path)


def test_a_killed_erasure_leaves_all_or_nothing(store: Store, tmp_path: Path) -> None:
    conversations = [talk(store, "ada", [{"role": "user", "content": f"{SECRET} {n}"}], str(n)) for n in range(30)]
    code = (
        "import os, sys; from feedback_store import Store; from feedback_store.erasing import Work\n"
        "Work.judge = lambda *_: os.kill(os.getpid(), 9)\n"
        "Store.open(sys.argv[1]).erase(owner='ada')"
    )
    died = subprocess.run([sys.executable, "-c", code, str(tmp_path / "whetstone.db")], check=False)
    assert died.returncode == -9
    assert len(store.conversations("ada")) == 30, "the transaction was undone"
    assert len(store.erase(owner="ada").conversations) == len(conversations)


def test_a_reader_of_the_log_leaves_the_sweep_to_be_repeated(store: Store, tmp_path: Path) -> None:
    files = Workspaces(tmp_path / "files")
    conversation = talk(store, "ada", MINE)
    with closing(sqlite3.connect(tmp_path / "whetstone.db", isolation_level=None)) as reader:
        reader.execute("BEGIN")
        assert reader.execute("SELECT count(*) FROM turns").fetchone() == (1,)
        store.erase(conversation=conversation)
        assert "reader" in sweep(store, tmp_path, files, vacuum=False).unfinished
        assert store.unswept().conversations == [conversation]
    assert not sweep(store, tmp_path, files, vacuum=False).unfinished
    assert store.unswept().conversations == []


def test_old_conversations_expire_without_a_taint(tmp_path: Path) -> None:
    now = datetime(2026, 1, 1, tzinfo=UTC)
    with Store.open(tmp_path / "s.db", now=lambda: now) as store:
        store.add_version("v1", None, "v1", {}, "published")
        old = talk(store, "ada", MINE)
        learn(store, "v2", "v1")
        now += timedelta(days=40)
        new = talk(store, "ada", OURS, "4")
        plan = store.expire(now - timedelta(days=30), dry_run=True)
        done = store.expire(now - timedelta(days=30))
        assert plan.conversations == done.conversations == [old]
        assert [c.id for c in store.conversations()] == [new]
        assert store.tainted() == {}
        assert store.sizes()["erased"] == {"expired": 1}
        assert [run.task_ids for run in store.unswept().runs] != [], "the run's own copy of the text goes too"
        forgotten = store.erase(owner="ada")
        assert forgotten.tainted == ["v2"], "who asks to be forgotten takes back what has expired, too"


@pytest.mark.parametrize("what", [{}, {"owner": "a", "conversation": "b"}])
def test_what_to_forget_is_said(store: Store, what: dict[str, str]) -> None:
    with pytest.raises(StoreError, match="Say what"):
        store.erase(**what)  # type: ignore[arg-type]
    assert os.path.exists(store.where)
