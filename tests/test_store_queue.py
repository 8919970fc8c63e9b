"""The queue against a simple model of it: nothing is lost, nothing is held twice, leases end, failures add up."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from feedback_store import InvalidRecord, NotFound, QueueFull, Store
from online_rl.tasks.base import ask
from tests.databases import Places


class Clock:
    def __init__(self) -> None:
        self.time = datetime(2026, 1, 1, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.time

    def advance(self, seconds: float) -> None:
        self.time += timedelta(seconds=seconds)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(place: str, clock: Clock) -> Iterator[Store]:
    with Store.open(place, now=clock) as opened:
        yield opened


def add(store: Store, *questions: str, kind: str = "math") -> list[str]:
    return [store.add_task([{"role": "user", "content": q}], "math", "1", kind, "client")[0] for q in questions]


def test_the_content_hash_is_the_trainers_task_id(store: Store) -> None:
    task = ask("Où est Lima ?", "exact", "Pérou", "lookup")
    task_id, created = store.add_task(list(task.messages), task.verifier, task.gold, task.kind, "generated")
    assert created
    assert store.task(task_id).content_hash[:16] == task.id


def test_a_lease_ends_and_the_task_is_claimed_anew(store: Store, clock: Clock) -> None:
    (task_id,) = add(store, "a")
    slow, quick = store.start_run("r", {}), store.start_run("r", {})
    (task,) = store.claim(slow, 5, lease_seconds=60)
    assert (task.state, task.run_id, task.lease_until) == ("claimed", slow, clock.time + timedelta(seconds=60))
    assert store.claim(quick, 5) == []
    clock.advance(60)
    assert store.task(task_id).state == "pending"
    (task,) = store.claim(quick, 5)
    assert (task.id, task.run_id, task.attempts) == (task_id, quick, 1)
    assert store.complete(slow, [task_id]) == []  # it lost the task with its lease
    assert store.renew(slow, 60) == 0
    assert store.complete(quick, [task_id]) == [task_id]
    assert store.complete(quick, [task_id]) == []
    assert [t.state for t in store.run_tasks(slow)] == ["expired"]
    assert [t.state for t in store.run_tasks(quick)] == ["completed"]


def test_a_resumed_run_keeps_what_nobody_took(store: Store, clock: Clock) -> None:
    (task_id,) = add(store, "a")
    run = store.start_run("r", {})
    store.claim(run, 1, lease_seconds=60)
    clock.advance(600)
    assert store.renew(run, 60) == 1
    assert store.task(task_id).state == "claimed"
    assert store.complete(run, [task_id]) == [task_id]


def test_five_failures_and_a_task_is_dead(store: Store, clock: Clock) -> None:
    (task_id,) = add(store, "poison")
    for attempt in range(5):
        run = store.start_run("r", {})
        (task,) = store.claim(run, 1, lease_seconds=60)
        assert task.attempts == attempt
        if attempt % 2:
            store.finish_run(run, "failed", {})
        else:
            clock.advance(61)
    run = store.start_run("r", {})
    assert store.claim(run, 1) == []
    assert store.task(task_id).state == "dead"
    assert [t.id for t in store.tasks("dead")] == [task_id]


def test_a_polite_release_is_no_failure(store: Store) -> None:
    (task_id,) = add(store, "a")
    for _ in range(6):
        run = store.start_run("r", {})
        assert len(store.claim(run, 1)) == 1
        assert store.release(run) == 1
        assert store.release(run) == 0
    task = store.task(task_id)
    assert (task.state, task.attempts, task.run_id, task.lease_until) == ("pending", 0, None, None)


def test_a_finished_run_holds_nothing(store: Store) -> None:
    add(store, "a", "b")
    run = store.start_run("r", {})
    first, _ = store.claim(run, 2)
    store.complete(run, [first.id])
    store.finish_run(run, "ended", {})
    stats = store.queue_stats()
    assert (stats["pending"], stats["claimed"], stats["done"]) == (1, 0, 1)


def test_the_oldest_come_first_and_the_failed_last(store: Store) -> None:
    ids = add(store, "a", "b", "c")
    run = store.start_run("r", {})
    store.claim(run, 1)
    store.release(run, failed=True)
    assert [t.id for t in store.claim(run, 3)] == [ids[1], ids[2], ids[0]]


def test_a_claim_may_ask_for_more_than_there_is(store: Store) -> None:
    ids = add(store, *map(str, range(40)))
    run = store.start_run("r", {})
    claimed = store.claim(run, 10**6)
    assert [t.id for t in claimed] == ids
    assert store.complete(run, ids) == ids


def test_a_full_queue_refuses_new_tasks_only(place: str) -> None:
    with Store.open(place, max_pending=2) as store:
        ids = add(store, "a", "b")
        with pytest.raises(QueueFull, match="2 tasks wait"):
            add(store, "c")
        assert add(store, "a") == ids[:1]
        store.claim(store.start_run("r", {}), 1)
        assert len(add(store, "c")) == 1


def test_unknown_runs_and_tasks_are_named(store: Store) -> None:
    run = store.start_run("r", {})
    for call in (
        lambda: store.claim("run_x", 1),
        lambda: store.renew("run_x"),
        lambda: store.release("run_x"),
        lambda: store.complete("run_x", []),
        lambda: store.run_tasks("run_x"),
    ):
        with pytest.raises(NotFound, match="run_x"):
            call()
    with pytest.raises(NotFound, match="task_x"):
        store.complete(run, ["task_x"])
    with pytest.raises(NotFound, match="task_x"):
        store.task("task_x")
    with pytest.raises(InvalidRecord):
        store.claim(run, 0)
    with pytest.raises(InvalidRecord, match="verifier"):
        store.add_task([{"role": "user", "content": "a"}], "", "1", "math", "client")


@dataclass
class Modelled:
    state: str = "pending"
    attempts: int = 0
    run: str | None = None
    until: datetime | None = None

    def give_up(self, failed: bool) -> None:
        self.attempts += failed
        self.state = "dead" if failed and self.attempts >= 5 else "pending"
        self.run = self.until = None

    def lapsed(self, now: datetime) -> bool:
        return self.state == "claimed" and self.until is not None and self.until <= now

    def seen(self, now: datetime) -> str:
        return ("dead" if self.attempts >= 4 else "pending") if self.lapsed(now) else self.state


class QueueModel(RuleBasedStateMachine):
    """Each rule does the same to the store and to a dict, and every answer must agree."""

    runs = Bundle("runs")
    places: Places

    def __init__(self) -> None:
        super().__init__()
        self.place = self.places.new()
        self.clock = Clock()
        self.store = Store.open(self.place, now=self.clock, max_pending=6)
        self.model: dict[str, Modelled] = {}
        self.by_question: dict[int, str] = {}

    def teardown(self) -> None:
        self.store.close()
        self.places.drop(self.place)

    def held(self, run: str) -> list[str]:
        return [i for i, t in self.model.items() if t.state == "claimed" and t.run == run]

    @initialize(target=runs)
    def first_run(self) -> str:
        return self.store.start_run("r", {})

    @rule(target=runs)
    def another_run(self) -> str:
        return self.store.start_run("r", {})

    @rule(question=st.integers(0, 11))
    def add(self, question: int) -> None:
        new = question not in self.by_question
        full = sum(t.state == "pending" for t in self.model.values()) >= 6
        if new and full:
            with pytest.raises(QueueFull):
                add(self.store, str(question))
            return
        task_id, created = self.store.add_task([{"role": "user", "content": str(question)}], "math", "1", "k", "s")
        assert created == new
        if new:
            self.by_question[question] = task_id
            self.model[task_id] = Modelled()
        assert self.by_question[question] == task_id

    @rule(run=runs, n=st.integers(1, 4), lease=st.sampled_from([10, 60]))
    def claim(self, run: str, n: int, lease: int) -> None:
        for task in self.model.values():
            if task.lapsed(self.clock.time):
                task.give_up(failed=True)
        waiting = sorted((t.attempts, i) for i, t in self.model.items() if t.state == "pending")[:n]
        assert [t.id for t in self.store.claim(run, n, lease)] == [i for _, i in waiting]
        for _, task_id in waiting:
            task = self.model[task_id]
            task.state, task.run, task.until = "claimed", run, self.clock.time + timedelta(seconds=lease)

    @rule(seconds=st.sampled_from([1, 10, 61]))
    def wait(self, seconds: int) -> None:
        self.clock.advance(seconds)

    @rule(run=runs)
    def renew(self, run: str) -> None:
        held = self.held(run)
        assert self.store.renew(run, 30) == len(held)
        for task_id in held:
            self.model[task_id].until = self.clock.time + timedelta(seconds=30)

    @rule(run=runs, data=st.data())
    def complete(self, run: str, data: st.DataObject) -> None:
        if not self.model:
            return
        asked = data.draw(st.lists(st.sampled_from(sorted(self.model)), unique=True))
        ended = [i for i in asked if i in self.held(run)]
        assert self.store.complete(run, asked) == ended
        for task_id in ended:
            self.model[task_id].state = "done"

    @rule(run=runs, failed=st.booleans())
    def release(self, run: str, failed: bool) -> None:
        held = self.held(run)
        assert self.store.release(run, failed) == len(held)
        for task_id in held:
            self.model[task_id].give_up(failed)

    @invariant()
    def the_store_agrees(self) -> None:
        now = self.clock.time
        seen = {t.id: (t.state, t.attempts) for t in self.store.tasks()}
        assert seen == {i: (t.seen(now), t.attempts) for i, t in self.model.items()}
        stats = self.store.queue_stats()
        for state in ("pending", "claimed", "done", "dead"):
            assert stats[state] == sum(t.seen(now) == state for t in self.model.values())


def test_the_queue_is_its_model(places: Places) -> None:
    QueueModel.places = places
    run_state_machine_as_test(QueueModel, settings=settings(max_examples=15, stateful_step_count=25, deadline=None))
