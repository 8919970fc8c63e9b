"""The endpoint, in process: real store, agent and tools; the engine says what the test wants."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from langchain_core.tools import tool
from openai.types.chat import ChatCompletionChunk

from app.api.app import create_app
from app.api.streaming import sse
from app.service import Service
from app.settings import Settings
from feedback_store import Store, StoreError
from serving.engines.base import EngineError
from serving.manifest import CorruptVersion
from serving.model import BaseModel
from tests.fakes import ScriptedEngine, make_service

HELLO = {"model": "whetstone", "messages": [{"role": "user", "content": "hello"}]}
SUM = {"model": "whetstone", "messages": [{"role": "user", "content": "What is 6 * 7?"}]}


@dataclass
class World:
    client: httpx.AsyncClient
    service: Service
    store: Store
    engine: ScriptedEngine

    async def chat(self, body: dict[str, Any], **extra: Any) -> httpx.Response:
        return await self.client.post("/v1/chat/completions", json={**body, **extra})


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "store.db") as opened:
        yield opened


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path, max_body_bytes=50_000)


@pytest.fixture
async def world(base: BaseModel, store: Store, settings: Settings) -> AsyncIterator[World]:
    service, engine = make_service(base, store)
    transport = httpx.ASGITransport(create_app(service, settings), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as client:
        yield World(client, service, store, engine)


def events_of(text: str) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


async def test_an_answer_names_its_version_and_carries_its_steps(world: World) -> None:
    response = await world.chat(SUM)
    body = response.json()
    assert response.status_code == 200
    assert response.headers["x-whetstone-version"] == body["model"] == "v0"
    assert body["choices"][0]["message"]["content"] == "The result is 42."
    assert body["choices"][0]["finish_reason"] == "stop"
    called, answered = body["whetstone"]["steps"]
    assert (called["action"], called["input"], called["thought"]) == ("code", "print(6 * 7)", "I will multiply.")
    assert called["observation"]["text"] == "42"
    assert answered["action"] == "answer"


async def test_the_turn_is_recorded_token_by_token(world: World) -> None:
    body = (await world.chat(SUM)).json()
    turn = world.store.turn(body["whetstone"]["turn_id"])
    assert (turn.status, turn.answer, turn.version) == ("done", "The result is 42.", "v0")
    assert body["usage"]["prompt_tokens"] == len(turn.prompt_ids)
    assert body["usage"]["completion_tokens"] == sum(sum(step.mask) for step in turn.steps)
    assert 0 in turn.steps[0].mask, "what the tool returned isn't the policy's own"
    assert world.store.history(turn.conversation_id)[-1]["content"] == "The result is 42."


async def test_a_stream_has_text_thinking_tools_usage_and_an_end(world: World) -> None:
    response = await world.chat(SUM, stream=True, stream_options={"include_usage": True})
    *chunks, end = events_of(response.text)
    assert end == "[DONE]"
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk, strict=True)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks if chunk["choices"]]
    assert deltas[0]["role"] == "assistant"
    assert "".join(delta.get("content", "") for delta in deltas) == "The result is 42."
    assert "I will multiply." in "".join(delta.get("reasoning_content", "") for delta in deltas)
    seen = [chunk["whetstone"].get("event") for chunk in chunks if "whetstone" in chunk]
    assert [name for name in seen if name] == ["tool_call", "tool_result", "step", "step"]
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["total_tokens"] > 0
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop"
    assert len(chunks[-2]["whetstone"]["steps"]) == 2
    named = {chunk["model"] for chunk in chunks} | {chunks[n]["whetstone"]["version"] for n in (0, -2)}
    assert named == {response.headers["x-whetstone-version"]} == {"v0"}


async def test_a_verified_answer_is_judged_at_once_and_queued(world: World) -> None:
    body = (await world.chat(SUM, metadata={"verifier": "numeric", "gold": "42"})).json()
    outcome = body["whetstone"]["outcome"]
    assert outcome["score"] == 1.0
    assert world.store.task(outcome["task_id"]).gold == "42"
    wrong = (await world.chat(SUM, metadata={"verifier": "numeric", "gold": "43"})).json()
    assert wrong["whetstone"]["outcome"]["score"] == 0.0


async def test_a_conversation_goes_on(world: World) -> None:
    first = (await world.chat(HELLO)).json()["whetstone"]
    await world.chat(SUM, metadata={"conversation_id": first["conversation_id"]})
    assert [said["role"] for said in world.store.history(first["conversation_id"])] == ["user", "assistant"] * 2
    gone = await world.chat(HELLO, metadata={"conversation_id": "conv-none"})
    assert gone.status_code == 404


async def test_sampling_parameters_reach_the_engine(world: World) -> None:
    body = (await world.chat(HELLO, max_completion_tokens=16, temperature=0, seed=3)).json()
    assert body["usage"]["completion_tokens"] <= 16, "in all generations of the answer"


LONG = "word " * 4000
BAD: list[tuple[str, dict[str, Any], int, str | None, str | None]] = [
    ("an unknown model", {"model": "gpt-5"}, 404, "model_not_found", "model"),
    ("no messages", {"messages": []}, 400, "invalid_value", "messages"),
    ("an empty message", {"messages": [{"role": "user", "content": "  "}]}, 400, "empty_message", "messages"),
    ("the last one not the user's", {"messages": [{"role": "assistant", "content": "x"}]}, 400, None, "messages"),
    ("a picture", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, None, None),
    ("nine answers", {"n": 9}, 400, "invalid_value", "n"),
    ("a conversation that forks", {"n": 2, "metadata": {"conversation_id": "c"}}, 400, "invalid_value", "n"),
    ("an empty stop string", {"stop": ["x", ""]}, 400, "invalid_value", "stop"),
    ("five stop strings", {"stop": list("abcde")}, 400, "invalid_value", "stop"),
    ("alternatives without logprobs", {"top_logprobs": 2}, 400, "invalid_value", "top_logprobs"),
    ("too many alternatives", {"logprobs": True, "top_logprobs": 21}, 400, "invalid_value", "top_logprobs"),
    ("a penalty", {"frequency_penalty": 0.5}, 400, "unsupported_parameter", "frequency_penalty"),
    ("a parameter nobody has", {"best_of": 3}, 400, "unsupported_parameter", "best_of"),
    ("a hot temperature", {"temperature": 9}, 400, "invalid_value", "temperature"),
    ("no tokens", {"max_tokens": 0}, 400, "invalid_value", "max_tokens"),
    ("an unknown verifier", {"metadata": {"verifier": "oracle", "gold": "1"}}, 400, "unknown_verifier", "verifier"),
    ("a verifier without gold", {"metadata": {"verifier": "numeric"}}, 400, "invalid_value", "metadata"),
    (
        "a long prompt",
        {"messages": [{"role": "user", "content": "word " * 4000}]},
        400,
        "context_length_exceeded",
        None,
    ),
]


@pytest.mark.parametrize(("what", "change", "status", "code", "param"), BAD, ids=[case[0] for case in BAD])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_bad_input_is_refused_in_openais_shape(
    world: World, what: str, change: dict[str, Any], status: int, code: str | None, param: str | None, stream: bool
) -> None:
    response = await world.chat({**HELLO, **change}, stream=stream)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    if code:
        assert error["code"] == code
    if param:
        assert error["param"] == param
    assert world.store.stats()["turns"] == {}, "a refused request leaves no turn"


async def test_what_changes_nothing_is_accepted(world: World) -> None:
    harmless = {"user": "u", "store": True, "n": 1, "stop": None, "tools": [], "logprobs": False, "presence_penalty": 0}
    harmless |= {"stop": [], "tool_choice": "none", "response_format": {"type": "text"}, "seed": -(2**70)}
    response = await world.chat(HELLO, **harmless, metadata={"tag": "mine"})
    assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    ("content", "type_", "status", "code"),
    [
        (b'{"model": ', "application/json", 400, "invalid_json"),
        (b"\xff\xfe", "application/json", 400, None),
        (b"[1]", "application/json", 400, None),
        (b"", "application/json", 400, None),
        (b'{"model":"whetstone"}', "text/plain", 400, "invalid_body"),
        (b"[" * 40_000, "application/json", 400, None),
        (b"x" * 60_000, "application/json", 413, "too_large"),
    ],
)
async def test_broken_bodies(world: World, content: bytes, type_: str, status: int, code: str | None) -> None:
    response = await world.client.post("/v1/chat/completions", content=content, headers={"Content-Type": type_})
    assert response.status_code == status, response.text
    assert response.json()["error"]["message"]
    if code:
        assert response.json()["error"]["code"] == code


async def test_a_bad_query_is_told_by_its_name(world: World) -> None:
    for path in ("/v1/conversations?limit=0", "/v1/conversations?limit=many"):
        error = (await world.client.get(path)).json()["error"]
        assert (error["param"], error["code"]) == ("limit", "invalid_value")
        assert error["message"].startswith("limit: Input should be"), error


async def test_a_body_without_a_length_is_cut_off_too(world: World) -> None:
    async def forever() -> AsyncIterator[bytes]:
        for _ in range(100):
            yield b" " * 1000

    response = await world.client.post(
        "/v1/chat/completions", content=forever(), headers={"Content-Type": "application/json"}
    )
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "too_large"


async def test_a_clients_tool_may_not_bear_the_name_of_the_servers(base: BaseModel, store: Store) -> None:
    @tool
    def shout(text: str) -> str:
        """Say it loudly."""
        return text.upper()

    service, _ = make_service(base, store, more=[shout])
    transport = httpx.ASGITransport(create_app(service, Settings(home=Path())))
    asked = {**HELLO, "tools": [{"type": "function", "function": {"name": "shout"}}]}
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as client:
        refused = await client.post("/v1/chat/completions", json=asked)
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "tools"
        alone = {**asked, "metadata": {"server_tools": "none"}}
        assert (await client.post("/v1/chat/completions", json=alone)).status_code == 200


async def test_unknown_routes_and_methods_are_in_shape(world: World) -> None:
    assert (await world.client.get("/v1/nothing")).json()["error"]["type"] == "invalid_request_error"
    assert (await world.client.get("/v1/chat/completions")).status_code == 405


async def test_a_dead_engine_is_503_and_leaves_a_closed_turn(world: World) -> None:
    world.engine.dead = True
    for stream in (False, True):
        response = await world.chat(HELLO, stream=stream)
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "engine_unavailable"
    assert world.store.stats()["turns"] == {"error": 2}
    assert (await world.client.get("/healthz")).status_code == 503


async def test_an_engine_that_dies_midway_ends_the_stream_with_an_error(world: World) -> None:
    world.engine.dies_after = 6
    response = await world.chat(HELLO, stream=True)
    assert response.status_code == 200
    *_, last = events_of(response.text)
    assert last["error"]["code"] == "engine_unavailable"
    (turn,) = world.store.turns()
    assert turn.status == "error"
    assert "died in the middle" in turn.error


async def test_a_store_that_fails_is_503_and_tells_the_log_why(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object, **__: object) -> str:
        raise StoreError("The store /srv/x.db: the disk is full. To go on: free some space.")

    monkeypatch.setattr(world.store, "begin_turn", full)
    response = await world.chat(HELLO)
    assert response.status_code == 503
    assert "/srv" not in response.text, "where the store lies is nothing for clients"
    assert "free some space" in caplog.text
    assert world.service.router.leases == 0  # type: ignore[attr-defined]


async def test_a_corrupt_version_is_told_as_one_and_its_place_only_to_the_log(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def corrupt(*_: object) -> None:
        try:
            raise CorruptVersion("/srv/versions/v0/adapter.safetensors was altered.")
        except CorruptVersion as error:
            raise EngineError(str(error)) from error
        yield

    monkeypatch.setattr(world.engine, "generate", corrupt)
    response = await world.chat(HELLO)
    assert (response.status_code, response.json()["error"]["code"]) == (503, "version_corrupt")
    assert "retry-after" not in response.headers
    assert "/srv" not in response.text
    assert "/srv/versions" in caplog.text


async def test_too_many_answers_at_once_is_429(world: World) -> None:
    world.engine.delay = 0.05
    many = await asyncio.gather(*[world.chat(HELLO) for _ in range(10)])
    statuses = [response.status_code for response in many]
    assert statuses.count(200) == 8
    assert statuses.count(429) == 2
    assert all(response.headers["retry-after"] for response in many if response.status_code == 429)
    assert (await world.chat(HELLO)).status_code == 200


async def test_models_lists_the_current_version_first(world: World) -> None:
    for name, parent in (("v0", None), ("v1", "v0")):
        world.store.add_version(name, parent, "", {}, "published")
    world.store.add_version("v2", "v1", "", {}, "candidate")
    world.store.add_version("v3", "v1", "", {}, "refused")
    world.store.set_current("v0", "a start")
    world.store.set_canary("v1", 0.25, "a trial")
    await world.engine.load("v1", None)
    data = (await world.client.get("/v1/models")).json()["data"]
    assert [model["id"] for model in data] == ["whetstone", "v0", "v1", "v2"]
    assert data[0]["whetstone"]["version"] == "v0"
    published = {"status": "published", "can_be_asked": True, "canary_share": 0.25, "tainted": False}
    assert data[2]["whetstone"] == {"version": "v1", "parent": "v0", "current": False, "loaded": True} | published
    assert (data[3]["whetstone"]["status"], data[3]["whetstone"]["can_be_asked"]) == ("candidate", False)
    assert (await world.chat(HELLO, model="v1")).json()["model"] == "v1"
    assert (await world.client.get("/v1/models/v1")).json()["id"] == "v1"
    assert (await world.client.get("/v1/models/v9")).status_code == 404


async def test_feedback_scores_and_corrects(world: World) -> None:
    turn_id = (await world.chat(SUM)).json()["whetstone"]["turn_id"]
    liked = await world.client.post("/v1/feedback", json={"turn_id": turn_id, "score": 1, "comment": "good"})
    assert liked.json()["score"] == 1.0
    assert liked.json()["task_id"] is None
    judged = (
        await world.client.post("/v1/feedback", json={"turn_id": turn_id, "verifier": "numeric", "gold": "41"})
    ).json()
    assert judged["score"] == 0.0
    assert world.store.task(judged["task_id"]).messages[-1]["content"] == "What is 6 * 7?"


async def test_feedback_tells_what_became_of_it(world: World) -> None:
    told = (await world.chat(SUM, metadata={"verifier": "numeric", "gold": "42"})).json()["whetstone"]
    assert (told["outcome"]["became"], told["outcome"]["note"]) == ("queued", "")
    turn_id = told["turn_id"]

    async def teach(**body: Any) -> dict[str, Any]:
        sent = {"turn_id": turn_id, "verifier": "numeric"} | body
        answer = await world.client.post("/v1/feedback", json=sent)
        assert answer.status_code == 200, answer.text
        told: dict[str, Any] = answer.json()
        return told

    assert (await teach(gold="42.0"))["became"] == "known"
    world.store.add_task(SUM["messages"], "math", "41", "math", "client", "key-other", gold_key="41")
    contested = await teach(gold="42", expires_at="2999-01-01T00:00:00Z")
    assert contested["became"] == "review"
    assert "until a person has decided: 2 golds contradict each other" in contested["note"]
    expiry = world.store.task(contested["task_id"]).expires_at
    assert expiry is not None
    assert expiry.year == 2999
    world.store.quarantine("local", "root", "a test")
    assert (await teach(gold="42"))["became"] == "quarantined"


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"turn_id": "TURN", "verifier": "numeric", "gold": "1", "expires_at": "2020-01-01T00:00:00Z"}, 400),
        ({"turn_id": "TURN", "verifier": "numeric", "gold": "1", "expires_at": "2999-01-01"}, 400),
        ({"turn_id": "TURN", "score": 1, "expires_at": "2999-01-01T00:00:00Z"}, 400),
        ({"turn_id": "turn-none", "score": 1}, 404),
        ({"turn_id": "TURN"}, 400),
        ({"turn_id": "TURN", "score": 2}, 400),
        ({"turn_id": "TURN", "score": 1, "verifier": "numeric", "gold": "1"}, 400),
        ({"turn_id": "TURN", "gold": "1"}, 400),
        ({"turn_id": "TURN", "verifier": "oracle", "gold": "1"}, 400),
        ({"turn_id": "TURN", "score": 1, "stars": 5}, 400),
        ({"turn_id": "TURN", "verifier": "numeric", "gold": "abc"}, 400),
    ],
)
async def test_bad_feedback(world: World, body: dict[str, Any], status: int) -> None:
    turn_id = (await world.chat(HELLO)).json()["whetstone"]["turn_id"]
    response = await world.client.post(
        "/v1/feedback", json={**body, "turn_id": body["turn_id"].replace("TURN", turn_id)}
    )
    assert response.status_code == status, response.text
    assert response.json()["error"]["message"]
    assert world.store.outcomes(turn_id) == []


async def test_health_names_engine_store_and_version(world: World) -> None:
    response = await world.client.get("/healthz")
    assert response.status_code == 200
    assert response.json()["version"] == "v0"
    assert response.json()["store"]["queue"]["pending"] == 0


async def test_keys_guard_the_endpoint_and_part_the_owners(base: BaseModel, store: Store, tmp_path: Path) -> None:
    service, _ = make_service(base, store)
    settings = Settings(home=tmp_path, api_keys="alice-secret,bob-secret")  # type: ignore[arg-type]
    transport = httpx.ASGITransport(create_app(service, settings))
    async with httpx.AsyncClient(transport=transport, base_url="http://any.host") as client:

        async def post(path: str, body: dict[str, Any], key: str | None) -> httpx.Response:
            headers = {"Authorization": f"Bearer {key}"} if key else {}
            return await client.post(path, json=body, headers=headers)

        for key in (None, "wrong"):
            refused = await post("/v1/chat/completions", HELLO, key)
            assert refused.status_code == 401
            assert refused.json()["error"]["type"] == "authentication_error"
        answer = await post("/v1/chat/completions", HELLO, "alice-secret")
        turn_id = answer.json()["whetstone"]["turn_id"]
        verdict = {"turn_id": turn_id, "score": 0}
        assert (await post("/v1/feedback", verdict, "bob-secret")).status_code == 404
        assert (await post("/v1/feedback", verdict, "alice-secret")).status_code == 200
        assert (await client.get("/healthz")).status_code == 200


async def test_without_keys_only_this_machine_is_served(world: World) -> None:
    response = await world.client.post("/v1/chat/completions", json=HELLO, headers={"Host": "evil.example:8000"})
    assert response.status_code == 403


def test_no_line_break_of_any_kind_stands_in_an_event() -> None:
    told = sse(json.dumps({"text": "a\x85b\u2028c\u2029d"}, ensure_ascii=False))
    assert len(told.splitlines()) == 2
    assert json.loads(told.splitlines()[0].removeprefix("data: ")) == {"text": "a\x85b\u2028c\u2029d"}
