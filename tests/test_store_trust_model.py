"""The queue with votes, dates, review and quarantine against a plain model of it, by whatever hypothesis thinks of."""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from feedback_store import InvalidRecord, NotFound, Policy, Store
from tests.test_store_queue import Clock

Key = tuple[int, str]  # question, gold
QUESTIONS, GOLDS, OWNERS = range(3), "ab", "uvwx"
POLICY = Policy(quarantine_rate=1.0)  # nobody but a person puts anyone in quarantine here


@dataclass
class Modelled:
    id: str
    expires: datetime | None
    state: str = "pending"
    hold: str = ""
    attempts: int = 0
    run: str | None = None
    until: datetime | None = None

    def give_up(self, failed: bool) -> None:
        self.attempts += failed
        self.state = "dead" if failed and self.attempts >= 5 else "pending"
        self.run = self.until = None


class TrustModel(RuleBasedStateMachine):
    template: Path | None = None

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        path = Path(self.folder.name, "s.db")
        if TrustModel.template is not None:
            shutil.copy(TrustModel.template, path)
        self.clock = Clock()
        self.store = Store.open(path, now=self.clock, policy=POLICY)
        self.tasks: dict[Key, Modelled] = {}
        self.votes: list[tuple[int, str, str, datetime | None]] = []  # question, owner, gold, its end
        self.decided: dict[int, str | None] = {}
        self.barred: set[str] = set()

    def teardown(self) -> None:
        self.store.close()
        self.folder.cleanup()

    @initialize()
    def two_runs(self) -> None:
        self.runs = [self.store.start_run("r", {}), self.store.start_run("r", {})]

    # -- the model

    def expired(self, key: Key) -> bool:
        expires = self.tasks[key].expires
        return expires is not None and expires <= self.clock.time

    def settle(self, question: int) -> None:
        mine = {key: task for key, task in self.tasks.items() if key[0] == question}
        each = {(owner, gold): end for q, owner, gold, end in self.votes if q == question}
        said = {owner: (gold, end) for q, owner, gold, end in self.votes if q == question and owner not in self.barred}
        word = {owner: gold for owner, (gold, end) in said.items() if end is None or end > self.clock.time}
        for (_, gold), task in mine.items():
            counted = [end for its, end in said.values() if its == gold]
            ends = counted or [end for (_, its), end in each.items() if its == gold]
            known = [end for end in ends if end is not None]
            task.expires = max(known) if len(known) == len(ends) else None
        for key, task in mine.items():
            if task.state == "dead":
                continue
            (best, most), *_ = [*Counter(word.values()).most_common(1), ("", 0)]
            if self.expired(key):
                task.hold = "expired"
            elif question in self.decided:
                task.hold = "" if self.decided[question] == key[1] else "rejected"
            elif not word or most < 0.7 * len(word):
                task.hold = "review"
            else:
                task.hold = "" if best == key[1] else "rejected"

    def sweep(self) -> None:
        for task in self.tasks.values():
            if task.state == "claimed" and task.until is not None and task.until <= self.clock.time:
                task.give_up(failed=True)
        for question in QUESTIONS:
            self.settle(question)

    def seen(self, key: Key) -> str:
        task = self.tasks[key]
        state = task.state
        if state == "claimed" and task.until is not None and task.until <= self.clock.time:
            state = "dead" if task.attempts >= 4 else "pending"
        if state != "pending":
            return state
        return "expired" if self.expired(key) else task.hold or "pending"

    # -- what is done to both

    @rule(question=st.sampled_from(QUESTIONS), gold=st.sampled_from(GOLDS), owner=st.sampled_from(OWNERS),
          days=st.sampled_from([None, None, 1]))  # fmt: skip
    def teach(self, question: int, gold: str, owner: str, days: int | None) -> None:
        expires = self.clock.time + timedelta(days=days) if days else None
        messages = [{"role": "user", "content": f"question {question}"}]
        made = self.store.add_task(messages, "exact", gold, "k", "person", owner, expires_at=expires)
        key = (question, gold)
        assert made[1] is (key not in self.tasks)
        if key not in self.tasks:
            self.tasks[key] = Modelled(made[0], expires)
        self.votes.append((question, owner, gold, expires))
        self.settle(question)

    @rule(run=st.integers(0, 1), n=st.integers(1, 3))
    def claim(self, run: int, n: int) -> None:
        self.sweep()
        waiting = sorted((t.attempts, t.id) for k, t in self.tasks.items() if self.seen(k) == "pending")[:n]
        claimed = self.store.claim(self.runs[run], n, 60)
        assert [(task.attempts, task.id) for task in claimed] == waiting
        for task in self.tasks.values():
            if (task.attempts, task.id) in waiting:
                task.state, task.run = "claimed", self.runs[run]
                task.until = self.clock.time + timedelta(seconds=60)

    @rule(seconds=st.sampled_from([30, 61, 86_400]))
    def wait(self, seconds: int) -> None:
        self.clock.advance(seconds)

    @rule(run=st.integers(0, 1))
    def renew(self, run: int) -> None:
        held = [t for t in self.tasks.values() if t.state == "claimed" and t.run == self.runs[run]]
        assert self.store.renew(self.runs[run], 60) == len(held)
        for task in held:
            task.until = self.clock.time + timedelta(seconds=60)

    @rule(run=st.integers(0, 1), how=st.sampled_from(["complete", "release", "fail"]))
    def end(self, run: int, how: str) -> None:
        held = [t for t in self.tasks.values() if t.state == "claimed" and t.run == self.runs[run]]
        if how == "complete":
            assert set(self.store.complete(self.runs[run], [t.id for t in held])) == {t.id for t in held}
        else:
            assert self.store.release(self.runs[run], failed=how == "fail") == len(held)
        for task in held:
            if how == "complete":
                task.state = "done"
            else:
                task.give_up(failed=how == "fail")

    @rule(question=st.sampled_from(QUESTIONS), gold=st.sampled_from(["a", "b", None]))
    def decide(self, question: int, gold: str | None) -> None:
        its = [task.id for (q, _), task in self.tasks.items() if q == question]
        if not its or (gold is not None and (question, gold) not in self.tasks):
            with pytest.raises((NotFound, InvalidRecord)):
                self.store.decide_review(its[0] if its else "0", gold, "root")
            return
        self.store.decide_review(its[0], gold, "root")
        self.decided[question] = gold
        self.settle(question)

    @rule(question=st.sampled_from(QUESTIONS))
    def withdraw(self, question: int) -> None:
        its = [task.id for (q, _), task in self.tasks.items() if q == question]
        if question not in self.decided:
            with pytest.raises((NotFound, InvalidRecord)):
                self.store.withdraw_review(its[0] if its else "0", "root")
            return
        self.store.withdraw_review(its[0], "root")
        del self.decided[question]
        self.settle(question)

    @rule(owner=st.sampled_from(OWNERS))
    def quarantine_or_lift(self, owner: str) -> None:
        if owner in self.barred:
            self.store.lift_quarantine(owner, "root")
            self.barred.remove(owner)
        else:
            self.store.quarantine(owner, "root", "?")
            self.barred.add(owner)
        for question in {q for q, who, *_ in self.votes if who == owner}:
            self.settle(question)

    @rule()
    def requeue(self) -> None:
        self.sweep()
        dead = [(key, task) for key, task in self.tasks.items() if task.state == "dead"]
        assert self.store.requeue([task.id for _, task in dead], "root") == len(dead)
        for _, task in dead:
            task.state, task.attempts, task.run, task.until = "pending", 0, None, None
        for (question, _), _ in dead:
            self.settle(question)

    @invariant()
    def the_store_agrees(self) -> None:
        seen = {task.id: (task.state, task.attempts) for task in self.store.tasks()}
        assert seen == {task.id: (self.seen(key), task.attempts) for key, task in self.tasks.items()}
        # One at the most of a question's golds may be claimed.
        free = [question for question, gold in self.tasks if self.seen((question, gold)) == "pending"]
        assert len(free) == len(set(free))


@pytest.fixture(autouse=True, scope="module")
def _an_empty_store_to_copy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    TrustModel.template = tmp_path_factory.mktemp("template") / "empty.db"
    Store.open(TrustModel.template).close()
    yield
    TrustModel.template = None


TestTrustModel = TrustModel.TestCase
TestTrustModel.settings = settings(max_examples=15, stateful_step_count=25, deadline=None)
