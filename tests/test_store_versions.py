"""Which version a conversation stays on, which one is tried, and how that ends: as the store keeps it."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest

from feedback_store import Canary, InService, InvalidRecord, NotFound, Store

ASK = [{"role": "user", "content": "?"}]
IDLE = 1800.0


class Clock:
    time = datetime(2026, 1, 1, tzinfo=UTC)

    def __call__(self) -> datetime:
        self.time += timedelta(milliseconds=1)
        return self.time

    def wait(self, seconds: float) -> None:
        self.time += timedelta(seconds=seconds)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(place: str, clock: Clock) -> Iterator[Store]:
    with Store.open(place, now=clock) as opened:
        for name, parent in (("v0", None), ("v1", "v0"), ("v2", "v1"), ("v3", "v2")):
            opened.add_version(name, parent, name, {}, "published")
        opened.set_current("v1", "test")
        yield opened


def begin(store: Store, version: str, conversation: str | None = None, stays: bool = True) -> tuple[str, str]:
    """(conversation, turn)"""
    conversation = conversation or store.create_conversation("ada")
    return conversation, store.begin_turn(conversation, ASK, version, [1], stays=stays)


def kept(store: Store, conversation: str, idle: float = IDLE, owner: str = "ada") -> str | None:
    return store.in_service(conversation, owner, idle).kept


def test_a_conversation_stays_until_it_is_idle(store: Store, clock: Clock) -> None:
    conversation, turn = begin(store, "v1")
    store.set_current("v2", "better")
    assert kept(store, conversation) == "v1"
    clock.wait(IDLE - 1)
    store.finish_turn(turn, "a long answer", "done")  # counts as use, too
    clock.wait(IDLE - 1)
    assert kept(store, conversation) == "v1"
    clock.wait(2)
    assert kept(store, conversation) is None
    begin(store, "v2", conversation)
    assert kept(store, conversation) == "v2"
    assert kept(store, conversation, owner="eve") is None
    assert kept(store, "conv_none") is None


def test_a_version_that_was_asked_for_by_name_isnt_kept(store: Store) -> None:
    conversation, _ = begin(store, "v0", stays=False)
    assert kept(store, conversation) is None
    begin(store, "v1", conversation)
    begin(store, "v0", conversation, stays=False)
    assert kept(store, conversation) == "v1"


def test_what_was_withdrawn_or_replaced_meanwhile_isnt_kept(store: Store) -> None:
    conversation, _ = begin(store, "v1")
    store.set_current("v2", "better")
    late, _ = begin(store, "v1")  # by a process that hadn't heard of it
    assert kept(store, late) == kept(store, conversation) == "v1"
    assert kept(store, begin(store, "v0")[0]) is None
    store.set_current("v3", "rolled back", move_conversations=True)
    assert kept(store, begin(store, "v2")[0]) is None
    begin(store, "v1", conversation)
    store.set_current("v1", "again")
    begin(store, "v1", conversation)
    assert kept(store, conversation) == "v1"
    store.set_current("v2", "better")
    store.set_version_status("v1", "refused")
    assert kept(store, conversation) is None


def test_a_rollback_may_take_its_conversations_along(store: Store) -> None:
    old, _ = begin(store, "v1")
    store.set_current("v2", "better")
    new, _ = begin(store, "v2")
    store.set_canary("v3", 0.5, "try it")
    tried, _ = begin(store, "v3")
    assert store.set_current("v1", "rolled back") == 0
    assert kept(store, new) == "v2"
    assert store.set_current("v1", "said again, with more", move_conversations=True) == 1
    assert (kept(store, old), kept(store, new), kept(store, tried)) == ("v1", None, "v3")
    assert store.conversations_on(IDLE) == {"v1": 1, "v3": 1}
    assert len(store.version_changes()) == 3


def test_a_canary_begins_changes_and_ends(store: Store) -> None:
    assert store.canary() is None
    store.set_canary("v2", 0.1, "try it")
    assert store.canary() == Canary("v2", 0.1)
    store.set_canary("v2", 0.5, "more of it")
    conversation, _ = begin(store, "v2")
    with pytest.raises(InvalidRecord, match="'v3' isn't on trial; 'v2' is"):
        store.set_canary("v3", 0, "no")
    assert store.set_canary("v2", 0, "enough") == 0
    assert store.canary() is None
    assert kept(store, conversation) == "v2"
    assert store.set_canary("v2", 0, "worse", move_conversations=True) == 1
    assert kept(store, conversation) is None


def test_a_canary_ends_when_it_is_put_in_service_or_withdrawn(store: Store) -> None:
    store.set_canary("v2", 0.5, "try it")
    store.set_current("v2", "promoted")
    assert store.canary() is None
    store.set_current("v1", "rolled back")
    assert store.canary() is None, "a rollback isn't a new trial"
    store.set_canary("v3", 1, "try that one")
    store.set_current("v2", "something else")
    assert store.canary() == Canary("v3", 1.0)
    store.set_version_status("v3", "refused")
    assert store.canary() is None
    assert store.in_service(None, "ada", IDLE).canary is None


@pytest.mark.parametrize(
    ("version", "share", "why"),
    [
        ("v1", 0.1, "in service already"),
        ("v2", 1.5, "between 0 and 1"),
        ("v2", -1, "between"),
        ("v2", float("nan"), "nan"),
    ],
)
def test_a_canary_that_cant_be_is_refused(store: Store, version: str, share: float, why: str) -> None:
    with pytest.raises(InvalidRecord, match=why):
        store.set_canary(version, share, "no")


def test_a_canary_is_a_published_version(store: Store) -> None:
    store.set_version_status("v3", "refused")
    with pytest.raises(InvalidRecord, match="refused"):
        store.set_canary("v3", 0.1, "no")
    with pytest.raises(NotFound, match="v9"):
        store.set_canary("v9", 0.1, "no")
    with pytest.raises(InvalidRecord, match="when it ends"):
        store.set_canary("v2", 0.1, "no", move_conversations=True)


def test_full_weights_take_everybody_and_end_a_trial(store: Store) -> None:
    store.add_version("w1", "v0", "w1", {"kind": "weights"}, "published")
    conversation = store.create_conversation("ada")
    store.begin_turn(conversation, ASK, "v1", [1], stays=True)
    store.set_canary("v2", 0.5, "try it")
    with pytest.raises(InvalidRecord, match="'w1' is full weights"):
        store.set_canary("w1", 0.5, "try it")
    assert store.set_current("w1", "better") == 1
    assert store.in_service(conversation, "ada", IDLE) == InService("w1", None, None)
    with pytest.raises(InvalidRecord, match="'w1' is full weights"):
        store.set_canary("v2", 0.5, "beside it")
    store.begin_turn(conversation, ASK, "w1", [1], stays=True)
    assert store.set_current("v1", "back") == 1, "and back"


def test_a_finished_runs_journal_takes_notes(store: Store) -> None:
    run = store.start_run("test", {})
    store.finish_run(run, "promoted", {})
    store.add_note(run, "swap failed", {"why": "no space"})
    assert store.run(run).stages[-1].detail == {"why": "no space"}
    with pytest.raises(NotFound):
        store.add_note("run_x", "swap failed", {})
