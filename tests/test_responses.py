"""/v1/responses by the official client over a real port: whole, streamed, tools, structures, and what is kept."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import openai
import pytest
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI
from pydantic import SecretStr

from tests import test_api_client
from tests.fakes import calculator, until
from tests.test_api_client import Served
from tests.test_openai_clients import CITY, Report, forecaster

served = test_api_client.served
Q = "What is 6 * 7?"
ROME = "How is the weather in Rome?"
WEATHER: Any = {"type": "function", "name": "weather", "description": "Weather", "parameters": CITY, "strict": True}


@pytest.fixture
def create(served: Served) -> Any:
    async def create_one(given: Any = Q, **options: Any) -> Any:
        return await served.client.responses.create(model="whetstone", input=given, **options)

    return create_one


async def test_an_answer_names_its_version_and_its_turn_and_is_recorded(served: Served, create: Any) -> None:
    raw = await served.client.responses.with_raw_response.create(
        model="whetstone",
        input=Q,
        instructions="Be brief.",
        metadata={"verifier": "numeric", "gold": "42", "my": "tag"},
    )
    told = raw.parse()
    assert (told.output_text, told.status, told.model) == ("The result is 42.", "completed", "v0")
    extra = told.whetstone
    assert (raw.headers["x-whetstone-version"], raw.headers["x-whetstone-turn"]) == ("v0", extra["turn_id"])
    assert extra["outcome"]["score"] == 1.0
    assert [step["action"] for step in extra["steps"]] == ["code", "answer"]
    turn = served.store.turn(extra["turn_id"])
    assert [m["role"] for m in turn.messages] == ["system", "user"]
    assert told.usage.input_tokens == len(turn.prompt_ids)
    assert told.usage.output_tokens == sum(sum(step.mask) for step in turn.steps)
    assert told.metadata["my"] == "tag"
    verdict = await served.client.post("/feedback", body={"turn_id": turn.id, "score": 1}, cast_to=dict)
    assert verdict["score"] == 1

    kept = await served.client.responses.retrieve(told.id)
    same = {
        "id",
        "status",
        "model",
        "output",
        "usage",
        "instructions",
        "metadata",
        "tools",
        "temperature",
    }
    assert kept.model_dump(include=same) == told.model_dump(include=same)


async def test_events_come_typed_numbered_and_in_order(create: Any) -> None:
    events = [event async for event in await create(stream=True)]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    official = [kind for kind in kinds if not kind.startswith("whetstone.")]
    deltas = official.count("response.output_text.delta")
    assert deltas > 1
    message = ["response.output_item.added", "response.content_part.added", *["response.output_text.delta"] * deltas]
    message += ["response.output_text.done", "response.content_part.done", "response.output_item.done"]
    assert official == ["response.created", "response.in_progress", *message, "response.completed"]
    by_type = {event.type: event for event in events}
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == by_type["response.output_text.done"].text == "The result is 42."
    assert by_type["response.created"].response.status == "in_progress"
    final = by_type["response.completed"].response
    assert (final.output_text, final.whetstone["steps"][0]["action"]) == (text, "code")
    assert final.output[0].id == by_type["response.output_item.added"].item.id
    called, seen = by_type["whetstone.tool_call"], by_type["whetstone.tool_result"]
    assert ((called.tool, called.input), seen.text) == (("code", "print(6 * 7)"), "42")
    thought = "".join(event.delta for event in events if event.type == "whetstone.thinking.delta")
    assert "I will multiply." in thought


async def test_the_stream_helper_and_parse(served: Served) -> None:
    async with served.client.responses.stream(model="whetstone", input=Q) as stream:
        snapshots = [event.snapshot async for event in stream if event.type == "response.output_text.delta"]
        final = await stream.get_final_response()
    assert snapshots[-1] == final.output_text == "The result is 42."
    served.engine.script = forecaster
    parsed = await served.client.responses.parse(model="whetstone", input=Q, text_format=Report)
    assert parsed.output_parsed == Report(city="Rome", degrees=21)
    async with served.client.responses.stream(model="whetstone", input=Q, text_format=Report) as stream:
        done = [event.parsed async for event in stream if event.type == "response.output_text.done"]
    assert done == [Report(city="Rome", degrees=21)]


async def test_json_object(served: Served, create: Any) -> None:
    served.engine.script = forecaster
    told = await create(text={"format": {"type": "json_object"}})
    assert json.loads(told.output_text)["city"] == "Rome"
    assert told.text.format.type == "json_object"


@pytest.mark.parametrize("stored", [True, False], ids=["by its id", "sent back"])
async def test_the_clients_tool_goes_round(served: Served, create: Any, stored: bool) -> None:
    served.engine.script = forecaster
    asked = await create(ROME, tools=[WEATHER], store=stored)
    (call,) = asked.output
    assert (call.type, call.name, json.loads(call.arguments)) == ("function_call", "weather", {"city": "Rome"})
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "21 degrees"}
    if stored:
        told = await create([result], tools=[WEATHER], previous_response_id=asked.id)
    else:
        given = [{"role": "user", "content": [{"type": "input_text", "text": ROME}]}, call.model_dump(), result]
        told = await create(given, tools=[WEATHER])
    assert told.output_text == "It is 21 degrees."
    turn = served.store.turn(told.whetstone["turn_id"])
    assert [m["role"] for m in turn.messages] == ["user", "assistant", "tool"]
    again = [*asked.output, result] if stored else [result]
    with pytest.raises(openai.BadRequestError, match=r"no call .* waits for it"):
        await create(again[-1:], tools=[WEATHER])


async def test_a_call_is_streamed_as_arguments(served: Served) -> None:
    served.engine.script = forecaster
    kinds: list[str] = []
    async with served.client.responses.stream(model="whetstone", input=ROME, tools=[WEATHER]) as stream:
        async for event in stream:
            kinds += [event.type] if "whetstone" not in event.type else []
        final = await stream.get_final_response()
    call = ["response.output_item.added", "response.function_call_arguments.delta"]
    call += ["response.function_call_arguments.done", "response.output_item.done"]
    assert kinds == ["response.created", "response.in_progress", *call, "response.completed"]
    assert json.loads(final.output[0].arguments) == {"city": "Rome"}  # type: ignore[union-attr]
    forced = await served.client.responses.create(
        model="whetstone",
        input=Q,
        tools=[WEATHER | {"name": "Report", "parameters": Report.model_json_schema()}],
        tool_choice={"type": "function", "name": "Report"},
    )
    assert json.loads(forced.output[0].arguments)["degrees"] == 21  # type: ignore[union-attr]


async def test_a_response_goes_on_in_its_conversation_without_its_instructions(served: Served, create: Any) -> None:
    first = await create("hello", instructions="Speak Latin.")
    second = await create(Q, previous_response_id=first.id, instructions="Speak Greek.")
    turn = served.store.turn(second.whetstone["turn_id"])
    said = [(m["role"], m["content"]) for m in turn.messages]
    assert said == [("system", "Speak Greek."), ("user", "hello"), ("assistant", first.output_text), ("user", Q)]
    assert turn.conversation_id == first.whetstone["conversation_id"]
    assert second.previous_response_id == first.id
    served.engine.dead = True
    with pytest.raises(openai.InternalServerError):
        await create("hello", conversation=turn.conversation_id)
    served.engine.dead = False  # the turn that failed is no part of what was said
    third = await create("hello", conversation=turn.conversation_id)
    assert len(served.store.turn(third.whetstone["turn_id"]).messages) == 5
    assert third.conversation.id == turn.conversation_id

    items = served.client.responses.input_items
    with pytest.raises(openai.BadRequestError, match="include"):
        await served.client.responses.retrieve(second.id, include=["reasoning.encrypted_content"])
    with pytest.raises(openai.BadRequestError, match="limit: Input should be"):
        await items.list(second.id, limit=0)
    with pytest.raises(openai.NotFoundError, match="no item"):
        await items.list(second.id, after="item_none")
    page = await items.list(second.id, order="asc", limit=2)
    assert [item.role for item in page.data] == ["user", "assistant"]  # type: ignore[union-attr]
    assert [item.role async for item in items.list(second.id, limit=2)] == ["user", "assistant", "user"]


async def test_what_isnt_kept_or_is_deleted_is_gone(served: Served, create: Any) -> None:
    loose = await create("hello", store=False)
    kept = await create("hello")
    child = await create(Q, previous_response_id=kept.id)
    await served.client.responses.delete(kept.id)
    for gone in (loose.id, kept.id, "resp_none", kept.whetstone["turn_id"]):
        with pytest.raises(openai.NotFoundError):
            await served.client.responses.retrieve(gone)
        with pytest.raises(openai.NotFoundError) as refused:
            await create(Q, previous_response_id=gone)
        assert (refused.value.code, refused.value.param) == ("previous_response_not_found", "previous_response_id")
    assert served.store.turn(loose.whetstone["turn_id"]).status == "done", "the record has it all the same"
    assert (await create("hello", previous_response_id=child.id)).output_text


async def test_deleting_takes_the_turn_its_task_and_its_title_and_waits_for_an_answer(
    served: Served, create: Any
) -> None:
    judged = await create(metadata={"verifier": "numeric", "gold": "42"})
    child = await create("hello", previous_response_id=judged.id)
    told = await served.client.delete(f"/responses/{judged.id}", cast_to=dict)
    assert told == {
        "id": judged.id,
        "object": "response",
        "deleted": True,
        "whetstone": {"tasks_deleted": 1, "tasks_kept": 0, "versions_tainted": [], "note": ""},
    }
    (left,) = served.store.turns()
    assert left.id == child.whetstone["turn_id"]
    assert served.store.conversation(left.conversation_id).title == ""
    assert served.store.queue_stats()["pending"] == 0

    served.engine.delay = 0.2
    stream = await create("slow, please", stream=True)
    events = aiter(stream)
    begun = (await anext(events)).response.id
    with pytest.raises(openai.ConflictError) as busy:
        await served.client.responses.delete(begun)
    assert busy.value.code == "response_busy"
    assert (await served.client.responses.retrieve(begun)).status == "in_progress"
    with pytest.raises(openai.ConflictError, match="still being answered"):
        await create(Q, previous_response_id=begun)
    await stream.close()
    await until(lambda: served.store.turns()[0].status == "cancelled")
    assert (await served.client.responses.retrieve(begun)).status == "cancelled"


async def test_tokens_are_bounded_in_all_and_it_says_incomplete(served: Served, create: Any) -> None:
    told = await create("slow, please", max_output_tokens=20)
    assert (told.status, told.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert told.usage.output_tokens == 20
    assert told.output[0].status == "incomplete"
    *_, last = [event async for event in await create("slow, please", max_output_tokens=20, stream=True)]
    assert last.type == "response.incomplete"
    assert last.response.output_text == told.output_text
    assert (await served.client.responses.retrieve(told.id)).status == "incomplete"


async def test_an_answer_that_was_begun_and_not_ended_is_no_output(served: Served, create: Any) -> None:
    texts = iter(["<think>Hm.</think><answer>Half an ans", "<think>Again.</think><answer> All of it. </answer>"])
    served.engine.script = lambda _: next(texts)
    events = [event async for event in await create(stream=True)]
    done = [event.item for event in events if event.type == "response.output_item.done"]
    assert [(item.status, item.content[0].text) for item in done] == [
        ("incomplete", "Half an ans"),
        ("completed", "All of it."),
    ]
    assert events[-1].response.output_text == "All of it."
    assert events[-1].response.output[0].id == done[1].id
    assert (await served.client.responses.retrieve(events[-1].response.id)).output[0].id == done[1].id


async def test_an_error_midway_is_a_failed_response(served: Served, create: Any) -> None:
    served.engine.dies_after = 6
    events = [event async for event in await create("slow, please", stream=True)]
    assert events[-1].type == "response.failed"
    assert (events[-1].response.status, events[-1].response.error.code) == ("failed", "server_error")
    assert "died in the middle" in events[-1].response.error.message
    assert (await served.client.responses.retrieve(events[-1].response.id)).status == "failed"
    with pytest.raises(openai.ConflictError, match="has no answer"):
        await create(Q, previous_response_id=events[-1].response.id)
    served.engine.dead = True
    for stream in (False, True):
        with pytest.raises(openai.InternalServerError) as dead:
            await create(Q, stream=stream)
        assert dead.value.status_code == 503


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_goes_away_cancels_at_once(served: Served, create: Any, stream: bool) -> None:
    served.engine.delay = 3600  # no event will come
    asking = asyncio.create_task(create(stream=stream))
    await until(lambda: len(served.engine.requests) == 1)
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    await until(lambda: served.store.turns()[0].status == "cancelled")
    assert served.engine.aborted == 1


BAD: list[tuple[dict[str, Any], int, str | None]] = [
    ({"model": "gpt-5"}, 404, "model"),
    ({"input": []}, 400, "input"),
    ({"input": "  "}, 400, "input"),
    ({"input": "word " * 5000}, 400, "input"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, 400, "input"),
    ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, 400, None),
    ({"input": [{"type": "function_call", "call_id": "a", "name": "b", "arguments": "7"}]}, 400, "input.0.arguments"),
    ({"input": [{"role": "user", "content": "a"}, {"type": "function_call_output", "call_id": "c", "output": "x"}]},
     400, "input.1.call_id"),
    ({"tools": [{"type": "web_search"}]}, 400, "tools"),
    ({"tools": [WEATHER | {"name": "search"}]}, 400, "tools.0.name"),
    ({"tools": [WEATHER | {"defer_loading": True}]}, 400, None),
    ({"tool_choice": "required"}, 400, "tool_choice"),
    ({"text": {"format": {"type": "json_schema", "name": "a", "schema": {"not": {}}}}}, 400, "text.format.schema"),
    ({"text": {"verbosity": "high"}}, 400, "text.verbosity"),
    ({"background": True}, 400, "background"),
    ({"truncation": "auto"}, 400, "truncation"),
    ({"reasoning": {"effort": "low"}}, 400, "reasoning"),
    ({"include": ["reasoning.encrypted_content"]}, 400, "include"),
    ({"metadata": {"verifier": "numeric"}}, 400, "metadata"),
    ({"metadata": {"n": "x" * 513}}, 400, "metadata.n"),
    ({"metadata": {f"k{n}": "x" for n in range(17)}}, 400, "metadata"),
    ({"metadata": {"k" * 65: "x"}}, 400, "metadata"),
    ({"stream_options": {"include_obfuscation": False}}, 400, "stream_options"),
    ({"previous_response_id": "resp_a", "conversation": "conv_b"}, 400, "conversation"),
    ({"conversation": "conv_none"}, 404, None),
    ({"max_output_tokens": 0}, 400, "max_output_tokens"),
]  # fmt: skip


async def test_what_cannot_be_honoured_is_refused_by_its_path(served: Served) -> None:
    async with httpx.AsyncClient(base_url=served.url) as client:
        for change, status, param in BAD:
            refused = await client.post("/responses", json={"model": "whetstone", "input": "hello", **change})
            error = refused.json()["error"]
            assert (refused.status_code, error["param"] if param else None) == (status, param), (change, error)
            assert set(error) == {"message", "type", "param", "code"}
    assert served.store.stats()["turns"] == {}


async def test_a_response_is_its_owners_alone(base: Any, tmp_path: Any) -> None:
    from app.api.app import create_app
    from app.settings import Settings
    from feedback_store import Store
    from tests.fakes import make_service

    with Store.open(tmp_path / "store.db") as store:
        service, _ = make_service(base, store)
        app = create_app(service, Settings(home=tmp_path, api_keys="alice-secret,bob-secret"))  # type: ignore[arg-type]
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://any.host") as client:
            alice, bob = ({"Authorization": f"Bearer {name}-secret"} for name in ("alice", "bob"))
            body = {"model": "whetstone", "input": "hello"}
            mine = (await client.post("/v1/responses", json=body, headers=alice)).json()["id"]
            on = body | {"previous_response_id": mine}
            assert (await client.get(f"/v1/responses/{mine}", headers=alice)).status_code == 200
            for method, path in (("GET", mine), ("DELETE", mine), ("GET", f"{mine}/input_items")):
                assert (await client.request(method, f"/v1/responses/{path}", headers=bob)).status_code == 404
            assert (await client.post("/v1/responses", json=on, headers=bob)).status_code == 404
            assert (await client.post("/v1/responses", json=on, headers=alice)).status_code == 200


async def test_the_servers_tools_stay_when_a_question_with_own_tools_is_judged(served: Served, create: Any) -> None:
    served.engine.script = calculator
    told = await create(tools=[WEATHER], metadata={"verifier": "numeric", "gold": "42"})
    outcome = told.whetstone["outcome"]
    assert (outcome["score"], outcome["task_id"]) == (1.0, None)
    assert "client's own tools" in outcome["note"]
    later = await served.client.post(
        "/feedback", body={"turn_id": told.whetstone["turn_id"], "verifier": "numeric", "gold": "42"}, cast_to=dict
    )
    assert later["task_id"] is None


async def test_langchain_by_responses(served: Served) -> None:
    served.engine.script = forecaster
    model = ChatOpenAI(
        model="whetstone", base_url=served.url, api_key=SecretStr("any"), max_retries=0, use_responses_api=True
    )

    def weather(city: str) -> str:
        """Weather of a city."""
        return f"21 degrees in {city}"

    bound = model.bind_tools([weather])
    asked = await bound.ainvoke(ROME)
    assert [call["args"] for call in asked.tool_calls] == [{"city": "Rome"}]
    result = ToolMessage(weather("Rome"), tool_call_id=asked.tool_calls[0]["id"])
    told = await bound.ainvoke([HumanMessage(ROME), asked, result])
    assert told.text == "It is 21 degrees."
    again = await bound.ainvoke([HumanMessage(ROME), asked, result, told, HumanMessage(Q)])  # its own items, sent back
    assert again.text == "The result is 42."
    on = await bound.ainvoke([HumanMessage("And 2 * 3?")], previous_response_id=again.response_metadata["id"])
    assert len(served.store.turns()[0].messages) == 7
    assert on.usage_metadata is not None
    assert await model.with_structured_output(Report).ainvoke(Q) == Report(city="Rome", degrees=21)
    chunks = [chunk async for chunk in bound.astream(ROME)]
    whole = sum(chunks[1:], chunks[0])
    assert [call["args"] for call in whole.tool_calls] == [{"city": "Rome"}]
    served.engine.script = calculator  # whose tool shows in the stream as an extension
    streamed = "".join([chunk.text async for chunk in model.astream(Q)])
    assert streamed == "The result is 42."


@pytest.mark.parametrize("stream", [False, True])
async def test_metadata_that_says_nothing_is_no_error_and_a_golds_end_is_kept(served: Served, stream: bool) -> None:
    ends = "2099-12-01T00:00:00+00:00"
    for metadata in ({"verifier": None}, {"conversation_id": None},
                     {"verifier": "numeric", "gold": "42", "gold_expires_at": ends}):  # fmt: skip
        body = {"model": "whetstone", "input": Q, "metadata": metadata, "stream": stream}
        async with httpx.AsyncClient(base_url=str(served.client.base_url), timeout=60) as client:
            answered = await client.post("responses", json=body)
        assert answered.status_code == 200
        assert "response.completed" in answered.text or answered.json()["status"] == "completed"
    (task,) = served.store.tasks()
    assert task.expires_at is not None
    assert task.expires_at.isoformat() == ends
