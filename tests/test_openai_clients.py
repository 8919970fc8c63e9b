"""Clients that people use, against the endpoint on a real port: openai's own and LangChain's."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, SecretStr

from tests import test_api_client
from tests.fakes import calculator
from tests.test_api_client import SUM, Served

served = test_api_client.served

ROME: list[Any] = [{"role": "user", "content": "How is the weather in Rome?"}]
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER: Any = {"type": "function", "function": {"name": "weather", "description": "Weather", "parameters": CITY}}


class Report(BaseModel):
    """The weather of a city."""

    city: str
    degrees: int


def forecaster(context: str) -> str:
    """A policy that asks the client for the weather, and tells what it hears; under a grammar it writes JSON."""
    if context.endswith("<answer>"):
        return '{"city": "Rome", "degrees": 21}'
    if context.endswith("<call>"):
        return '{"name": "Report", "arguments": {"city": "Rome", "degrees": 21}}'
    tail = context[context.rfind("<|im_start|>user") :]
    if "weather" in tail and "<response>" in tail:
        return "<think>Heard.</think>\n<answer>It is 21 degrees.</answer>"
    if "weather in Rome" in tail and '{"name":"weather"' in context:
        return '<think>Ask.</think>\n<call>{"name": "weather", "arguments": {"city": "Rome"}}</call>'
    return "<think>Easy.</think><answer>The result is 42.</answer>"


@pytest.fixture
def create(served: Served) -> Any:
    served.engine.script = forecaster

    async def create_one(messages: list[Any] = SUM, **options: Any) -> Any:
        return await served.client.chat.completions.create(model="whetstone", messages=messages, **options)

    return create_one


async def test_stop_ends_the_text_whole_and_streamed(create: Any) -> None:
    whole = await create(stop=[" is", "never"])
    assert (whole.choices[0].message.content, whole.choices[0].finish_reason) == ("The result", "stop")
    chunks = [chunk async for chunk in await create(stop=" is", stream=True)]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "The result"
    assert chunks[-1].choices[0].finish_reason == "stop"


async def test_n_answers_are_turns_of_their_own(create: Any, served: Served) -> None:
    whole = await create(n=3, seed=7)
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    assert {choice.message.content for choice in whole.choices} == {"The result is 42."}
    turns = served.store.turns()
    assert {choice.whetstone["turn_id"] for choice in whole.choices} == {turn.id for turn in turns}
    assert len({turn.conversation_id for turn in turns}) == 3
    seeds = {request.sampling.seed for request in served.engine.requests}
    assert len(seeds) == 3
    assert whole.usage.prompt_tokens == len(turns[0].prompt_ids)
    own = [sum(map(sum, (step.mask for step in served.store.turn(turn.id).steps))) for turn in turns]
    assert whole.usage.completion_tokens == sum(own)

    texts, usage, ids = {0: "", 1: ""}, None, set()
    async for chunk in await create(n=2, stream=True, stream_options={"include_usage": True}):
        ids.add(chunk.id)
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == {0: "The result is 42.", 1: "The result is 42."}
    assert usage.completion_tokens * 3 == whole.usage.completion_tokens * 2
    assert len(ids) == 1


async def test_logprobs_are_those_of_the_text_whole_and_streamed(create: Any) -> None:
    whole = (await create(logprobs=True, top_logprobs=2)).choices[0]
    told = whole.logprobs.content
    assert bytes(byte for token in told for byte in token.bytes).decode() == whole.message.content
    assert told[0].logprob == -0.1
    assert [len(token.top_logprobs) for token in told] == [2] * len(told)
    streamed = [c.choices[0] async for c in await create(logprobs=True, stream=True)]
    tokens = [token for choice in streamed if choice.logprobs for token in choice.logprobs.content]
    assert [token.token for token in tokens] == [token.token for token in told]
    assert tokens[0].top_logprobs == []


async def test_parse_and_the_stream_helper(served: Served) -> None:
    served.engine.script = forecaster
    parsed = await served.client.chat.completions.parse(model="whetstone", messages=SUM, response_format=Report)
    assert parsed.choices[0].message.parsed == Report(city="Rome", degrees=21)
    async with served.client.chat.completions.stream(model="whetstone", messages=SUM, response_format=Report) as stream:
        kinds = [event.type async for event in stream]
        final = await stream.get_final_completion()
    assert final.choices[0].message.parsed == Report(city="Rome", degrees=21)
    assert {"content.delta", "content.done"} <= set(kinds)
    served.engine.script = calculator  # whose tool shows in the stream as an extension
    async with served.client.chat.completions.stream(model="whetstone", messages=SUM) as stream:
        text = "".join([event.delta async for event in stream if event.type == "content.delta"])
    assert text == "The result is 42."


async def test_the_clients_tool_goes_round(create: Any, served: Served) -> None:
    asked = await create(ROME, tools=[WEATHER])
    choice = asked.choices[0]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    (call,) = choice.message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "Rome"})
    turn = served.store.turn(asked.whetstone["turn_id"])
    assert (turn.status, turn.answer, turn.steps[-1].action) == ("tool_calls", "", "call")

    result = {"role": "tool", "tool_call_id": call.id, "content": "21 degrees"}
    messages = [*ROME, choice.message, result]
    answered = await create(messages, tools=[WEATHER], parallel_tool_calls=False)
    assert answered.choices[0].message.content == "It is 21 degrees."
    again = [*messages, answered.choices[0].message, *SUM]
    assert (await create(again, tools=[WEATHER])).choices[0].message.content == "The result is 42."
    recorded = served.store.turn(answered.whetstone["turn_id"])
    assert [message["role"] for message in recorded.messages] == ["user", "assistant", "tool"]


async def test_a_call_is_streamed_as_deltas(served: Served) -> None:
    served.engine.script = forecaster
    async with served.client.chat.completions.stream(model="whetstone", messages=ROME, tools=[WEATHER]) as stream:
        async for _ in stream:
            pass
        final = await stream.get_final_completion()
    assert final.choices[0].finish_reason == "tool_calls"
    (call,) = final.choices[0].message.tool_calls or ()
    assert json.loads(call.function.arguments) == {"city": "Rome"}


async def test_a_verdict_waits_for_the_answer_and_makes_no_task_of_the_clients_tools(create: Any) -> None:
    judged = {"metadata": {"verifier": "numeric", "gold": "21"}, "tools": [WEATHER]}
    asked = await create(ROME, **judged)
    assert asked.whetstone["outcome"] is None
    call = asked.choices[0].message.tool_calls[0]
    result = {"role": "tool", "tool_call_id": call.id, "content": "21 degrees"}
    outcome = (await create([*ROME, asked.choices[0].message, result], **judged)).whetstone["outcome"]
    assert outcome["task_id"] is None
    assert "client's own tools" in outcome["note"]


async def test_choices_of_tools(create: Any) -> None:
    report = {"type": "function", "function": {"name": "Report", "parameters": Report.model_json_schema()}}
    for choice in ("required", {"type": "function", "function": {"name": "Report"}}):
        forced = (await create(SUM, tools=[report], tool_choice=choice)).choices[0]
        assert forced.finish_reason == "tool_calls"
        assert json.loads(forced.message.tool_calls[0].function.arguments)["degrees"] == 21
    none = (await create(ROME, tools=[WEATHER], tool_choice="none")).choices[0]
    assert none.finish_reason == "stop"


def _named(name: str) -> Any:
    return {"type": "function", "function": {"name": name}}


async def test_the_servers_tools_can_be_left_out(create: Any, served: Served) -> None:
    await create(SUM, metadata={"server_tools": "none"})
    prompt = served.engine._tokenizer.decode(served.engine.requests[0].token_ids)  # type: ignore[attr-defined]
    assert "write Python" not in prompt


def _called(arguments: str) -> Any:
    return {"id": "x", "function": {"name": "a", "arguments": arguments}}


BAD: list[tuple[dict[str, Any], str]] = [
    ({"tools": [{"type": "function"}]}, "tools.0.function"),
    ({"tools": [_named("no good")]}, "tools.0.function.name"),
    ({"tools": [_named("search")]}, "tools.0.function.name"),
    ({"tools": [_named("a"), _named("a")]}, "tools.1.function.name"),
    ({"tools": [_named(f"t{i}") for i in range(129)]}, "tools"),
    ({"tools": [{"type": "function", "function": {"name": "a", "parameters": {"type": "object", "properties": 3}}}]},
     "tools.0.function.parameters.properties"),
    ({"tools": [{"type": "function", "function": {"name": "a", "parameters": {"type": "string"}}}]},
     "tools.0.function.parameters"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": [_named("a")], "tool_choice": {"type": "function", "function": {"name": "b"}}}, "tool_choice"),
    ({"tools": [_named("a")], "tool_choice": "perhaps"}, "tool_choice"),
    ({"functions": [{"name": "a"}]}, "functions"),
    ({"response_format": {"type": "xml"}}, "response_format"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}}, "response_format.json_schema.schema"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"anyOf": [{"not": {}}]}}}},
     "response_format.json_schema.schema.anyOf.0"),
    ({"messages": [*ROME, {"role": "tool", "tool_call_id": "x", "content": "y"}]}, "messages.1.tool_call_id"),
    ({"messages": [*ROME, {"role": "assistant", "tool_calls": [_called("{}")]}]},
     "messages"),
    ({"messages": [*ROME, {"role": "assistant", "tool_calls": [_called("7")]}]},
     "messages.1.tool_calls.0.function.arguments"),
    ({"metadata": {"server_tools": "some"}}, "metadata.server_tools"),
]  # fmt: skip


async def test_what_cannot_be_honoured_is_refused_by_its_path(served: Served) -> None:
    for change, param in BAD:
        with pytest.raises(openai.BadRequestError) as refused:
            await served.client.chat.completions.create(**{"model": "whetstone", "messages": ROME, **change})
        assert refused.value.param == param, (change, refused.value.message)
    assert served.store.stats()["turns"] == {}


async def test_langchain_binds_tools_and_gets_structures(served: Served) -> None:
    served.engine.script = forecaster
    model = ChatOpenAI(model="whetstone", base_url=served.url, api_key=SecretStr("any"), max_retries=0)

    def weather(city: str) -> str:
        """Weather of a city."""
        return f"21 degrees in {city}"

    bound = model.bind_tools([weather])
    asked = await bound.ainvoke("How is the weather in Rome?")
    assert [call["args"] for call in asked.tool_calls] == [{"city": "Rome"}]
    result = ToolMessage(weather("Rome"), tool_call_id=asked.tool_calls[0]["id"])
    told = await bound.ainvoke([HumanMessage("How is the weather in Rome?"), asked, result])
    assert told.content == "It is 21 degrees."
    for method in ("json_schema", "function_calling"):
        structured = model.with_structured_output(Report, method=method)
        assert await structured.ainvoke("The weather, please: 2 * 3") == Report(city="Rome", degrees=21)
    streamed = "".join([str(chunk.content) async for chunk in model.astream("What is 6 * 7?")])
    assert streamed == "The result is 42."
