"""Consent: without it nothing of an owner's is trained on, whoever asks, and they can say so themselves."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from feedback_store import InvalidRecord, Store
from serving.model import BaseModel
from tests.test_api_admin import TAUGHT, calling
from tests.test_store_erasure import MINE, OURS, talk


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "s.db") as opened:
        opened.add_version("v0", None, "v0", {}, "published")
        opened.set_current("v0", "test")
        yield opened


def test_without_consent_a_verdict_makes_no_task(store: Store) -> None:
    store.set_consent("ada", False)
    conversation = talk(store, "ada", MINE)
    (outcome,) = store.outcomes(store.turns(conversation)[0].id)
    assert (outcome.task_id, outcome.score) == (None, 1.0), "the verdict is kept"
    assert "service only" in outcome.note
    assert store.queue_stats()["pending"] == 0
    store.set_consent("ada", True)
    talk(store, "ada", MINE)
    assert store.queue_stats()["pending"] == 1


def test_taking_it_back_withdraws_what_waits_but_not_what_others_asked(store: Store) -> None:
    talk(store, "ada", MINE)
    talk(store, "ada", OURS, "4")
    talk(store, "bob", OURS, "4")
    store.add_task([{"role": "user", "content": "generated"}], "exact", "1", "k", "generated")
    withdrawn = store.set_consent("ada", False)
    assert (withdrawn.deleted, withdrawn.emptied, withdrawn.held) == (1, 0, 0)
    assert store.queue_stats()["pending"] == 2


def test_what_a_run_holds_goes_before_the_next(store: Store) -> None:
    talk(store, "ada", MINE)
    run = store.start_run("r", {})
    (task,) = store.claim(run, 1)
    assert store.set_consent("ada", False).held == 1
    store.finish_run(run, "refused", {})
    assert store.withdraw_without_consent().emptied == 1
    assert store.claim(store.start_run("r", {}), 9) == []
    assert (store.task(task.id).state, store.task(task.id).messages) == ("withdrawn", [])


def test_the_setting_decides_for_who_said_nothing(store: Store) -> None:
    talk(store, "ada", MINE)
    talk(store, "bob", OURS, "4")
    store.set_consent("bob", True)
    store.training_by_default = False
    assert (store.consent("ada").training, store.consent("bob").training) == (False, True)
    assert store.withdraw_without_consent().deleted == 1
    assert [task.owner for task in store.tasks()] == ["bob"]
    with pytest.raises(InvalidRecord, match="name"):
        store.set_consent("", True)


async def test_an_owner_says_it_through_the_endpoint(base: BaseModel, store: Store, tmp_path: Path) -> None:
    async with calling(base, store, tmp_path) as client:
        before = (await client.get("/v1/consent")).json()
        assert (before["training"], before["stated_at"]) == (True, None)
        told = (await client.post("/v1/chat/completions", json=TAUGHT)).json()["whetstone"]
        assert told["outcome"]["task_id"]
        said = (await client.post("/v1/consent", json={"training": False})).json()
        assert (said["training"], said["withdrawn"]["deleted"]) == (False, 1)
        assert store.consent("local").training is False
        told = (await client.post("/v1/chat/completions", json=TAUGHT)).json()["whetstone"]
        assert told["outcome"]["task_id"] is None
        for wrong in ({}, {"training": "no"}, {"training": True, "owner": "bob"}):
            assert (await client.post("/v1/consent", json=wrong)).status_code == 400, json.dumps(wrong)
