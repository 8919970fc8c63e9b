"""Server and trainer share the store: claims are exclusive, and a process that is killed loses nothing acknowledged."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from feedback_store import RunUnderWay, Store, StoreError
from feedback_store.database import parse_location, utc_now
from feedback_store.migrate import bring_up_to_date
from feedback_store.presence import lives
from feedback_store.processes import Process, this_process
from tests.databases import Places, count, edit, rows

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are told apart by /proc")
ASK = [{"role": "user", "content": "?"}]
PROCESSES = 16


def at_once(work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Runs `work(*arguments)` in PROCESSES processes that start it together; their answers."""
    context = multiprocessing.get_context("fork")
    start, answers = context.Barrier(PROCESSES), context.Queue()

    def body() -> None:
        start.wait(30)
        try:
            answers.put(work(*arguments))
        except BaseException as error:
            answers.put(repr(error))
            raise

    workers = [context.Process(target=body) for _ in range(PROCESSES)]
    for worker in workers:
        worker.start()
    gathered = [answers.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join(30)
    assert [worker.exitcode for worker in workers] == [0] * PROCESSES, gathered
    return gathered


def claim_all(place: str) -> list[str]:
    done: list[str] = []
    with Store.open(place) as store:
        run = store.start_run("r", {})
        while claimed := store.claim(run, 3):
            done += store.complete(run, [task.id for task in claimed[:2]])
            store.release(run)  # a third one goes back, for any process to take
    return done


def test_processes_that_claim_at_once_never_share_a_task(place: str) -> None:
    with Store.open(place) as store:
        ids = {store.add_task([{"role": "user", "content": str(n)}], "math", "1", "k", "s")[0] for n in range(60)}
        counts = Counter(task_id for done in at_once(claim_all, place) for task_id in done)
        assert set(counts) == ids
        assert set(counts.values()) == {1}
        assert store.queue_stats()["done"] == len(ids)


def rate(place: str, turn_id: str) -> list[tuple[str | None, str]]:
    with Store.open(place) as store:
        outcomes = [store.add_outcome(turn_id, "client", 1.0, "math", str(gold)) for gold in range(5)]
    return [(outcome.task_id, outcome.note) for outcome in outcomes]


def test_outcomes_from_many_processes_make_each_task_once(place: str) -> None:
    with Store.open(place) as store:
        turn_id = store.begin_turn(store.create_conversation("ada"), [{"role": "user", "content": "?"}], "v0", [])
        answers = [answer for answered in at_once(rate, place, turn_id) for answer in answered]
        assert {task.id for task in store.tasks()} == {task_id for task_id, _ in answers}
        assert len(store.tasks()) == 5
        assert sum(note == "" for _, note in answers) == 5
        assert len(store.outcomes(turn_id)) == PROCESSES * 5


def open_and_write(place: str) -> str:
    with Store.open(place) as store:
        return store.create_conversation("ada")


def test_processes_may_create_the_store_at_once(places: Places) -> None:
    place = places.blank()
    conversations = at_once(open_and_write, place)
    with Store.open(place) as store:
        assert {c.id for c in store.conversations()} == set(conversations)


def test_processes_that_open_an_old_store_at_once_migrate_it_once(places: Places) -> None:
    place = places.blank()
    bring_up_to_date(parse_location(place), 5, revision="0001")
    assert len(set(at_once(open_and_write, place))) == PROCESSES
    if places.kind == "sqlite":
        assert len(list(Path(place).parent.glob("*.bak"))) == 1


WRITER = """
import sys
from feedback_store import Store, StoredObservation, StoredStep
store = Store.open(sys.argv[1])
turn = store.begin_turn(store.create_conversation("ada"), [{"role": "user", "content": "count"}], "v0", [1])
print(turn, flush=True)
for n in range(10**6):
    seen = StoredObservation("code", f"seen {n}", False, {}, 0.0)
    store.append_step(turn, StoredStep(n, [n], [-0.5], [1], "v0", f"step {n}", "", "code", "", seen, True, 0.0))
    print(n, flush=True)
"""


def test_a_killed_writer_loses_nothing_acknowledged(place: str, places: Places) -> None:
    with Store.open(place) as store:
        writer = subprocess.Popen([sys.executable, "-c", WRITER, place], stdout=subprocess.PIPE, text=True)
        assert writer.stdout is not None
        turn_id = writer.stdout.readline().strip()
        acknowledged = [int(writer.stdout.readline()) for _ in range(20)]
        mine = store.begin_turn(store.create_conversation("me"), [{"role": "user", "content": "hi"}], "v0", [])
        assert store.recover() == 0  # both processes live
        writer.send_signal(signal.SIGKILL)
        acknowledged += [int(line) for line in writer.stdout if line.endswith("\n")]
        os.waitid(os.P_PID, writer.pid, os.WEXITED | os.WNOWAIT)  # dead, but still in the process table
        assert store.recover() == 1
        writer.wait()

        turn = store.turn(turn_id)
        assert turn.status == "interrupted"
        assert turn.finished_at is not None
        assert [step.index for step in turn.steps][: len(acknowledged)] == acknowledged
        assert len(turn.steps) - len(acknowledged) in (0, 1)  # at most the one whose acknowledgement was cut off
        assert all(s.observation and s.observation.text == f"seen {s.index}" for s in turn.steps)
        assert store.turn(mine).status == "running"
        assert store.recover() == 0
    if places.kind == "sqlite":
        assert rows(place, "PRAGMA integrity_check") == [("ok",)]


def test_a_turn_of_another_host_is_left_alone_until_it_is_old(place: str) -> None:
    moment = datetime(2026, 1, 1, tzinfo=UTC)
    with Store.open(place, now=lambda: moment) as store:
        turn_id = store.begin_turn(store.create_conversation("me"), [{"role": "user", "content": "hi"}], "v0", [])
        edit(place, "UPDATE turns SET host = 'elsewhere', pid = 1")
        moment += timedelta(hours=23)
        assert store.recover() == 0
        moment += timedelta(hours=2)
        assert store.recover() == 1
        # It was only out of sight: its process may still end it.
        store.finish_turn(turn_id, "hello", "done")
        assert store.turn(turn_id).status == "done"


def test_a_run_whose_process_died_is_not_alive(place: str) -> None:
    start = "import sys; from feedback_store import Store; print(Store.open(sys.argv[1]).start_run('r', {}))"
    started = subprocess.run([sys.executable, "-c", start, place], capture_output=True, text=True, check=True)
    run_id = started.stdout.strip()
    with Store.open(place) as store:
        assert (store.run(run_id).status, store.run(run_id).alive) == ("running", False)
        store.set_stage(run_id, "train", {"resumed": True})
        assert store.run(run_id).alive
        store.finish_run(run_id, "ended", {})
        assert store.run(run_id).alive is None


def test_a_store_is_not_carried_across_a_fork(place: str) -> None:
    with Store.open(place) as store:
        store.create_conversation("ada")
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                store.conversations()
                answer = ""
            except StoreError as error:
                answer = str(error)
            os.write(writing, json.dumps(answer).encode())
            os._exit(0)
        os.waitpid(child, 0)
        assert "fork" in json.loads(os.read(reading, 65536))
        os.close(reading)
        os.close(writing)
        assert len(store.conversations()) == 1


def test_a_process_of_another_host_lives_as_long_as_it_says_so(place: str) -> None:
    moment = datetime(2026, 1, 1, tzinfo=UTC)
    with Store.open(place, now=lambda: moment) as store:
        store.beat(60)
        turn_id = store.begin_turn(store.create_conversation("me"), ASK, "v0", [])
        run_id = store.start_run("r", {})
        for table in ("processes", "turns", "runs"):
            edit(place, f"UPDATE {table} SET host = 'elsewhere/1'")
        moment += timedelta(seconds=59)
        assert (store.recover(), store.run(run_id).alive, store.runs()[0].alive) == (0, True, True)
        with pytest.raises(RunUnderWay, match=rf"{run_id} is under way in process {os.getpid()} on elsewhere\."):
            store.only_run().__enter__()
        moment += timedelta(seconds=2)
        assert (store.recover(), store.run(run_id).alive) == (1, False)
        assert store.turn(turn_id).status == "interrupted"
        with store.only_run():
            store.set_stage(run_id, "train", {})  # goes on here
            assert store.run(run_id).alive


def test_a_process_that_is_present_beats_until_it_leaves(place: str) -> None:
    beats = multiprocessing.Semaphore(0)
    with Store.open(place) as store:
        with store.present(beats.release, every=0.05):
            for _ in range(3):
                assert beats.acquire(timeout=60)
            assert count(place, "processes") == 1
        edit(place, "UPDATE processes SET host = 'elsewhere/1'")
        me = this_process()
        with store._read() as connection:
            gone = lives(connection, Process("elsewhere/1", me.pid, me.started), utc_now())
        assert gone is False, "it said that it ended"


HOLDER = """
import sys
from feedback_store import Store
with Store.open(sys.argv[1]) as store, store.only_run():
    print("held", flush=True)
    sys.stdin.read()
"""


def test_one_process_trains_on_a_server(place: str, places: Places) -> None:
    """On SQLite the run's home is the store's, and a lock of that home says so."""
    if places.kind == "sqlite":
        pytest.skip("the home's lock is tested in test_loop")
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, place], stdin=-1, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with Store.open(place) as store:
        with pytest.raises(RunUnderWay, match="Another process trains"), store.only_run():
            pass
        holder.kill()
        holder.wait()
        for _ in range(600):  # the server notices that the session's process is gone
            try:
                with store.only_run():
                    break
            except RunUnderWay:
                time.sleep(0.05)
        else:
            raise AssertionError("the lock outlived its process")
