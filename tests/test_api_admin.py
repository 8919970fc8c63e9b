"""What an administrator does through the endpoint, and what owners do with their own conversations."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.api.app import create_app
from app.settings import Settings
from feedback_store import NotFound, Store
from serving.model import BaseModel
from serving.versions import VersionRouter, install_shipped
from tests.fakes import make_service
from tests.test_versions import publish
from tools.workspace import Workspaces

SUM = {"model": "whetstone", "messages": [{"role": "user", "content": "What is 6 * 7?"}]}
TAUGHT = SUM | {"metadata": {"verifier": "numeric", "gold": "42"}}


@pytest.fixture
def store(tmp_path: Path) -> Any:
    with Store.open(tmp_path / "store.db") as opened:
        install_shipped(opened, tmp_path)
        publish(opened, tmp_path, "v1")
        opened.add_version("v2", "v1", "", {}, "refused")
        yield opened


@asynccontextmanager
async def calling(base: BaseModel, store: Store, tmp_path: Path, **knobs: Any) -> AsyncIterator[httpx.AsyncClient]:
    service, engine = make_service(base, store, workspaces=Workspaces(tmp_path / "files"))
    service.router = router = VersionRouter(store, engine, poll_s=0.05)
    await router.start()
    transport = httpx.ASGITransport(create_app(service, Settings(home=tmp_path, **knobs)), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as client:
        yield client
    await router.close()


async def test_admin_is_closed_without_its_scope(base: BaseModel, store: Store, tmp_path: Path) -> None:
    async with calling(base, store, tmp_path) as client:
        for refused in (await client.get("/v1/admin/runs"), await client.post("/v1/admin/versions/v1/use")):
            assert refused.status_code == 403, "even on loopback, where no key is needed"
            assert "ADMIN_OPEN_ON_LOOPBACK" in refused.json()["error"]["message"]
    async with calling(base, store, tmp_path, api_keys="alice-secret") as client:
        refused = await client.get("/v1/admin/runs", headers={"Authorization": "Bearer alice-secret"})
        assert refused.status_code == 403
        _, secret = store.add_key("boss", ["admin"])
    async with calling(base, store, tmp_path, api_keys="alice-secret") as client:
        client.headers["Authorization"] = f"Bearer {secret}"
        assert (await client.get("/v1/admin/runs")).status_code == 200
        assert (await client.post("/v1/chat/completions", json=SUM)).status_code == 403
    assert store.current_version() == "v0"


async def test_versions_are_swapped_and_rolled_back(base: BaseModel, store: Store, tmp_path: Path) -> None:
    async with calling(base, store, tmp_path, admin_open_on_loopback=True) as client:
        assert (await client.post("/v1/admin/versions/rollback")).status_code == 409
        used = await client.post("/v1/admin/versions/v1/use", json={"reason": "better"})
        assert used.json()["previous"] == "v0"
        listed = (await client.get("/v1/admin/versions")).json()
        assert listed["current"] == "v1"
        assert [(v["id"], v["status"], v["current"]) for v in listed["data"]][1:] == [
            ("v1", "published", True),
            ("v2", "refused", False),
        ]
        assert listed["changes"][0]["reason"] == "better"
        for status in (200, 409):  # the second is the same call, sent again
            rolled = await client.post("/v1/admin/versions/rollback", json={"from": "v1"})
            assert rolled.status_code == status
        for version, status in (("v9", 404), ("v2", 409)):
            assert (await client.post(f"/v1/admin/versions/{version}/use")).status_code == status
        assert (await client.post("/v1/admin/versions/v1/use", json={"why": "x"})).status_code == 400
    assert store.current_version() == "v0"


async def test_a_version_is_tried_on_a_share_and_what_can_t_be_loaded_isn_t_used(
    base: BaseModel, store: Store, tmp_path: Path
) -> None:
    async with calling(base, store, tmp_path, admin_open_on_loopback=True) as client:
        tried = await client.post("/v1/admin/versions/v1/canary", json={"share": 1.0})
        assert (tried.status_code, tried.json()["share"]) == (200, 1.0)
        serving = (await client.get("/v1/admin/versions")).json()["serving_here"]
        assert (serving["current"], serving["canary"]) == ("v0", {"version": "v1", "share": 1.0})
        assert (await client.post("/v1/chat/completions", json=SUM)).json()["model"] == "v1"
        for version, share, status in (("v1", 2, 400), ("v2", 0.5, 409), ("v0", 0.5, 409)):
            refused = await client.post(f"/v1/admin/versions/{version}/canary", json={"share": share})
            assert refused.status_code == status, refused.text
        assert (await client.post("/v1/admin/versions/v1/canary", json={"share": 0})).status_code == 200
        publish(store, tmp_path, "v3")
        (tmp_path / "versions" / "v3" / "adapter_model.safetensors").write_bytes(b"rot")
        assert (await client.post("/v1/admin/versions/v3/use")).status_code == 503
        assert (await client.post("/v1/chat/completions", json=SUM)).json()["model"] == "v0"
    assert store.current_version() == "v0"


async def test_runs_are_listed_and_shown(base: BaseModel, store: Store, tmp_path: Path) -> None:
    run_id = store.start_run("embedded-cpu", {})
    store.set_stage(run_id, "train", {"step": 3})
    async with calling(base, store, tmp_path, admin_open_on_loopback=True) as client:
        (listed,) = (await client.get("/v1/admin/runs")).json()["data"]
        assert (listed["id"], listed["status"], listed["alive"]) == (run_id, "running", True)
        assert (await client.get(f"/v1/admin/runs/{run_id}")).json()["stages"][0]["detail"] == {"step": 3}
        assert (await client.get("/v1/admin/runs/run_none")).status_code == 404
        assert (await client.get("/v1/admin/runs?limit=0")).status_code == 400


async def test_a_version_the_queue_and_the_counts_are_shown(base: BaseModel, store: Store, tmp_path: Path) -> None:
    run_id = store.start_run("embedded-cpu", {})
    store.add_version("v4", "v0", "", {"note": "made"}, "candidate", run_id=run_id)
    async with calling(base, store, tmp_path, admin_open_on_loopback=True) as client:
        told = (await client.post("/v1/chat/completions", json=TAUGHT)).json()["whetstone"]
        queue = (await client.get("/v1/admin/queue")).json()
        assert queue["stats"]["pending"] == 1
        (task,) = queue["data"]
        assert (task["id"], task["gold"], task["state"]) == (told["outcome"]["task_id"], "42", "pending")
        assert task["messages"][-1]["content"] == "What is 6 * 7?"
        assert (await client.get("/v1/admin/queue?state=done")).json()["data"] == []
        store.complete(run_id, [claimed.id for claimed in store.claim(run_id, 1)])
        version = (await client.get("/v1/admin/versions/v4")).json()
        assert (version["manifest"], version["status"]) == ({"note": "made"}, "candidate")
        assert version["lineage"]["task_ids"] == [task["id"]]
        assert version["lineage"]["conversation_ids"] == [told["conversation_id"]]
        assert (await client.get("/v1/admin/stats")).json()["turns"] == {"done": 1}
        assert (await client.get("/v1/admin/versions/v9")).status_code == 404
        assert (await client.get("/v1/admin/queue?state=lost")).json()["error"]["param"] == "state"


async def test_conversations_are_paged_and_read_by_their_owner(base: BaseModel, store: Store, tmp_path: Path) -> None:
    others = store.create_conversation("somebody else")
    async with calling(base, store, tmp_path) as client:
        made = [(await client.post("/v1/chat/completions", json=SUM)).json()["whetstone"] for _ in range(3)]
        ids = [told["conversation_id"] for told in made]
        first = (await client.get("/v1/conversations?limit=2")).json()
        assert [item["id"] for item in first["data"]] == ids[:0:-1]
        assert first["has_more"]
        rest = (await client.get(f"/v1/conversations?limit=2&after={first['last_id']}")).json()
        assert ([item["id"] for item in rest["data"]], rest["has_more"]) == ([ids[0]], False)
        (turn,) = (await client.get(f"/v1/conversations/{ids[0]}")).json()["turns"]["data"]
        assert (turn["id"], turn["answer"], turn["version"]) == (made[0]["turn_id"], "The result is 42.", "v0")
        for id_ in (others, "conv_none"):
            assert (await client.get(f"/v1/conversations/{id_}")).status_code == 404
            assert (await client.delete(f"/v1/conversations/{id_}")).status_code == 404
    assert store.conversation(others).owner == "somebody else"


async def test_a_deleted_conversation_is_erased_and_taints_what_learnt_from_it(
    base: BaseModel, store: Store, tmp_path: Path
) -> None:
    async with calling(base, store, tmp_path) as client:
        told = (await client.post("/v1/chat/completions", json=TAUGHT)).json()["whetstone"]
        path = f"/v1/conversations/{told['conversation_id']}"
        await client.post(f"{path}/files", files={"files": ("a.txt", b"mine")})
        gone = (await client.delete(path)).json()
        assert gone["deleted"]
        assert gone["whetstone"] == {
            "turns": 1, "tasks_deleted": 1, "tasks_kept": 0, "versions_tainted": [], "note": "",
        }  # fmt: skip
        assert (await client.get(path)).status_code == 404
        assert not (tmp_path / "files" / told["conversation_id"]).exists()
        with pytest.raises(NotFound):
            store.turn(told["turn_id"])
        with pytest.raises(NotFound):
            store.task(told["outcome"]["task_id"])

        told = (await client.post("/v1/chat/completions", json=TAUGHT)).json()["whetstone"]
        run = store.start_run("embedded-cpu", {})
        store.claim(run, 1)
        path = f"/v1/conversations/{told['conversation_id']}"
        busy = await client.delete(path)
        assert busy.status_code == 409
        assert run in busy.json()["error"]["message"]
        store.add_version("v3", "v1", "", {}, "published", run_id=run)
        store.finish_run(run, "promoted", {})
        gone = (await client.delete(path)).json()["whetstone"]
        assert (gone["tasks_deleted"], gone["tasks_kept"], gone["versions_tainted"]) == (1, 0, ["v3"])
        assert "keep what they learnt" in gone["note"]
        models = {m["id"]: m["whetstone"]["tainted"] for m in (await client.get("/v1/models")).json()["data"]}
        assert models == {"whetstone": False, "v0": False, "v1": False, "v3": True}

        open_one = store.create_conversation("local")
        store.begin_turn(open_one, [{"role": "user", "content": "x"}], "v0", [1])
        assert (await client.delete(f"/v1/conversations/{open_one}")).status_code == 409


async def test_conversations_are_searched_by_their_owner(base: BaseModel, store: Store, tmp_path: Path) -> None:
    async with calling(base, store, tmp_path, admin_open_on_loopback=True) as client:
        told = (await client.post("/v1/chat/completions", json=SUM)).json()["whetstone"]
        store.create_conversation("somebody else", "What is 6 * 7?")
        found = (await client.get("/v1/conversations", params={"search": "what IS result"})).json()
        assert [item["id"] for item in found["data"]] == [told["conversation_id"]]
        assert (await client.get("/v1/conversations", params={"search": "absent"})).json()["data"] == []
        for hostile in ('"', "*", "", "a" * 1001, "\0", "NEAR("):
            status = (await client.get("/v1/conversations", params={"search": hostile})).status_code
            assert status == (200 if hostile == "NEAR(" else 400), hostile
        run = store.start_run("r", {})
        assert (await client.get("/v1/admin/versions")).json()["data"][0]["tainted"] is None
        store.finish_run(run, "ended", {})


async def test_feedback_on_a_conversation_judges_its_last_answer(base: BaseModel, store: Store, tmp_path: Path) -> None:
    async with calling(base, store, tmp_path) as client:
        told = (await client.post("/v1/chat/completions", json=SUM)).json()["whetstone"]
        verdict = {"conversation_id": told["conversation_id"], "score": 1}
        assert (await client.post("/v1/feedback", json=verdict)).json()["turn_id"] == told["turn_id"]
        store.finish_turn(store.begin_turn(told["conversation_id"], SUM["messages"], "v0", [1]), "", "error")  # type: ignore[arg-type]
        assert (await client.post("/v1/feedback", json=verdict)).json()["turn_id"] == told["turn_id"]
        both = await client.post("/v1/feedback", json=verdict | {"turn_id": told["turn_id"]})
        assert both.status_code == 400
        for id_, status in ((store.create_conversation("local"), 409), (store.create_conversation("other"), 404)):
            assert (await client.post("/v1/feedback", json={"conversation_id": id_, "score": 1})).status_code == status


async def test_a_page_elsewhere_can_t_send_a_browser_here(base: BaseModel, store: Store, tmp_path: Path) -> None:
    async with calling(base, store, tmp_path, admin_open_on_loopback=True) as client:
        for origin in ("http://evil.example", "null", "https://127.0.0.1.evil.example", "http://["):
            for path in ("/v1/admin/versions/v1/use", "/v1/conversations"):
                refused = await client.post(path, headers={"Origin": origin})
                assert refused.status_code == 403, (origin, path)
        for origin in ("http://127.0.0.1:7860", "http://localhost:3000", "http://[::1]:8000"):
            assert (await client.post("/v1/conversations", headers={"Origin": origin})).status_code == 200, origin
    assert store.current_version() == "v0"


async def test_half_a_character_is_read_as_the_replacement_character(
    base: BaseModel, store: Store, tmp_path: Path
) -> None:
    half = "\ud800"
    function = {"name": "look", "description": half, "parameters": {"type": "object", "description": half}}
    call = {"id": "c", "type": "function", "function": {"name": "look", "arguments": json.dumps({"a": half})}}
    history = [
        {"role": "user", "content": half},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": half},
    ]
    body = SUM | {"messages": history, "tools": [{"type": "function", "function": function}]}
    async with calling(base, store, tmp_path) as client:
        client.headers["Content-Type"] = "application/json"
        answered = await client.post("/v1/chat/completions", content=json.dumps(body))
        assert answered.status_code == 200, answered.text
        unknown = SUM | {"metadata": {"conversation_id": half}}
        assert (await client.post("/v1/chat/completions", content=json.dumps(unknown))).status_code == 404
        tools = [{"type": "function", "function": {"name": f"t{n}", "description": "x" * 1000}} for n in range(90)]
        large = await client.post("/v1/chat/completions", json=SUM | {"tools": tools})
        assert (large.status_code, large.json()["error"]["param"]) == (400, "tools")


async def test_contested_golds_are_decided_and_owners_quarantined(
    base: BaseModel, store: Store, tmp_path: Path
) -> None:
    ask = [{"role": "user", "content": "How high?"}]
    tasks = [store.add_task(ask, "numeric", gold, "numeric", "client", f"key-{gold}")[0] for gold in "12"]
    async with calling(base, store, tmp_path, admin_open_on_loopback=True) as client:
        (review,) = (await client.get("/v1/admin/review")).json()["data"]
        assert [claim["gold"] for claim in review["golds"]] == ["1", "2"]
        at = f"/v1/admin/review/{review['id']}"
        refused = await client.post(at, json={"gold": "3"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "not_decided")
        assert (await client.delete(at)).status_code == 409
        decided = (await client.post(at, json={"gold": "2", "reason": "measured"})).json()
        assert (decided["decision"], decided["decided_by"]) == ("2", "local")
        assert [store.task(task_id).state for task_id in tasks] == ["rejected", "pending"]
        assert (await client.post(at, json={"gold": None})).json()["decision"] is None
        await client.delete(at)
        assert [store.task(task_id).state for task_id in tasks] == ["review", "review"]
        assert (await client.get("/v1/admin/review/0123")).status_code == 404

        put = (await client.post("/v1/admin/quarantine/key-1")).json()
        assert (put["active"], put["who"]) == (True, "local")
        assert [store.task(task_id).state for task_id in tasks] == ["rejected", "pending"]
        assert (await client.delete("/v1/admin/quarantine/key-1")).json()["active"] is False
        assert (await client.delete("/v1/admin/quarantine/key-1")).status_code == 404
        assert len((await client.get("/v1/admin/quarantine")).json()["data"]) == 1
