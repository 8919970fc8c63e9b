"""What the toolbox promises of any tool: budgets, places, arguments that fit, an audit, and never an exception."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import threading
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from langchain_core.runnables import RunnableConfig
from langchain_core.tools import BaseTool, InjectedToolArg, StructuredTool, ToolException, tool

from tools.arguments import ToolSchema
from tools.artifact import MAX_CHARS, as_artifact
from tools.audit import audit_file
from tools.context import ToolContext, context_of
from tools.toolbox import Budget, Toolbox

ANN = ToolContext("ann", "conversation-1", "turn-1")


class Plain(BaseTool):
    """Answers as its function tells it to."""

    name: str = "plain"
    description: str = "answers"
    response_format: Literal["content", "content_and_artifact"] = "content_and_artifact"
    does: Any

    async def _arun(self, query: str) -> Any:
        return await self.does(query)

    def _run(self, query: str) -> Any:
        raise AssertionError("the agent is async")


def box(*tools: BaseTool, seconds: float = 5.0, chars: int = 400, **options: Any) -> Toolbox:
    return Toolbox(tools, budget=Budget(seconds, chars), **options)


@tool
async def add(a: int, b: int = 1) -> int:
    """Add two numbers."""
    return a + b


# -- time


async def test_a_hanging_tool_is_cancelled() -> None:
    cancelled = asyncio.Event()

    async def hang(query: str) -> Any:
        try:
            await asyncio.sleep(60)
        finally:
            cancelled.set()

    outcome = await box(Plain(does=hang), seconds=0.2).call("plain", "x")
    assert outcome.error
    assert outcome.text == "Timed out: plain has 0.2 s."
    assert outcome.seconds < 10
    assert cancelled.is_set()


async def test_a_tool_that_won_t_be_cancelled_is_left_behind() -> None:
    async def stubborn(query: str) -> Any:
        until = time.monotonic() + 3
        while time.monotonic() < until:
            try:
                await asyncio.sleep(3)
            except asyncio.CancelledError:
                continue
        return "late", {}

    outcome = await box(Plain(does=stubborn), seconds=0.2).call("plain", "x")
    assert outcome.error
    assert outcome.seconds < 2


async def test_cancelling_the_call_cancels_the_tool_and_leaves_a_line() -> None:
    ended = asyncio.Event()
    lines: list[dict[str, Any]] = []

    async def hang(query: str) -> Any:
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()

    call = asyncio.create_task(box(Plain(does=hang), audit=lines.append).call("plain", "x", ANN))
    await asyncio.sleep(0.05)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert ended.is_set()
    assert lines[0]["error"] is True


async def test_a_blocking_tool_holds_up_nobody_and_is_refused_when_it_is_stuck() -> None:
    release = threading.Event()

    def block(query: str) -> str:
        """Block."""
        release.wait(30)
        return "late"

    tools = box(StructuredTool.from_function(block, name="block_here"), seconds=0.1)
    began = time.monotonic()
    outcomes = await asyncio.gather(*(tools.call("block_here", "x") for _ in range(8)))
    assert time.monotonic() - began < 3
    assert {outcome.text for outcome in outcomes} == {"Timed out: block_here has 0.1 s."}
    assert await asyncio.to_thread(lambda: "free") == "free"  # the loop's own threads aren't used up
    assert "is stuck" in (await tools.call("block_here", "x")).text
    release.set()
    for _ in range(100):
        await asyncio.sleep(0.02)
        if (outcome := await tools.call("block_here", "x")).text == "late":
            break
    assert outcome.text == "late"


# -- places


async def test_calls_of_one_owner_share_its_places_and_waiting_counts() -> None:
    running = most = 0

    async def slow(query: str) -> Any:
        nonlocal running, most
        running += 1
        most = max(most, running)
        try:
            await asyncio.sleep(0.3)
        finally:
            running -= 1
        return "done", {}

    tools = box(Plain(does=slow), seconds=0.5, calls_per_owner=2)
    outcomes = await asyncio.gather(*(tools.call("plain", "x", ANN) for _ in range(8)))
    assert most == 2
    assert [outcome.text for outcome in outcomes[:2]] == ["done", "done"]
    late = [outcome for outcome in outcomes if outcome.text != "done"]
    assert late
    assert all(outcome.error for outcome in late)
    assert any("Too many tool calls at once: 2" in outcome.text for outcome in late)
    most = 0
    await asyncio.gather(*(tools.call("plain", "x") for _ in range(8)))  # training has no owner
    assert most == 8
    assert (await tools.call("plain", "x", ANN)).text == "done"


async def test_one_owner_doesn_t_hold_up_another() -> None:
    async def slow(query: str) -> Any:
        await asyncio.sleep(0.3)
        return "done", {}

    tools = box(Plain(does=slow), seconds=0.5, calls_per_owner=1)
    outcomes = await asyncio.gather(*(tools.call("plain", "x", ToolContext(owner)) for owner in "abcdef"))
    assert [outcome.text for outcome in outcomes] == ["done"] * 6


# -- arguments


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({}, "a: Field required"),
        ({"a": "many"}, "a: Input should be a valid integer"),
        ({"a": 1, "c": 2}, "c: no such argument"),
        ({"a": None}, "a: "),
        ("many", "a: Input should be a valid integer"),
    ],
)
async def test_wrong_arguments_are_named(arguments: Any, says: str) -> None:
    outcome = await box(add).call("add", arguments)
    assert outcome.error
    assert outcome.text.startswith("Wrong arguments for add: ")
    assert says in outcome.text
    assert outcome.text.endswith("It takes: a, b.")


async def test_arguments_that_fit_arrive() -> None:
    assert (await box(add).call("add", {"a": "2", "b": 3})).text == "5"
    assert (await box(add).call("add", "2")).text == "3"


async def test_an_argument_that_the_caller_injects_is_not_the_policy_s() -> None:
    @tool
    async def greet(name: str, secret: Annotated[str, InjectedToolArg] = "kept") -> str:
        """Greet."""
        return f"{name} {secret}"

    tools = box(greet)
    assert list(tools.schemas()[0].parameters["properties"]) == ["name"]
    assert (await tools.call("greet", {"name": "Ann"})).text == "Ann kept"
    assert (await tools.call("greet", {"name": "Ann", "secret": "told"})).error


async def test_a_json_schema_is_checked_without_patterns_and_references() -> None:
    async def run(**arguments: Any) -> str:
        return json.dumps(arguments)

    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer"}, "s": {"type": "string", "pattern": "^(a+)+$"}},
        "required": ["n"],
    }
    tools = box(StructuredTool(name="far", description="far", args_schema=schema, coroutine=run))
    assert "n: 'x' is not of type 'integer'" in (await tools.call("far", {"n": "x"})).text
    assert (await tools.call("far", {"n": 1, "s": "a" * 40 + "!"})).text == json.dumps({"n": 1, "s": "a" * 40 + "!"})


# -- what comes back


@pytest.mark.parametrize(
    "error",
    [
        ValueError("bad\x00 value"),
        KeyError(),
        TimeoutError("slow"),
        asyncio.CancelledError(),
        RecursionError(),
        SystemExit(3),
        KeyboardInterrupt(),
        GeneratorExit(),
        BaseException("panic"),
    ],
)
async def test_an_exception_is_an_observation(error: BaseException) -> None:
    async def fail(query: str) -> Any:
        raise error

    outcome = await box(Plain(does=fail)).call("plain", "x")
    assert outcome.error
    assert type(error).__name__ in outcome.text
    assert "\x00" not in outcome.text


@pytest.mark.parametrize(
    "error",
    [
        SystemExit(3),
        KeyboardInterrupt(),
        StopIteration(),
        ToolException("no such city"),
        asyncio.CancelledError(),
        GeneratorExit(),
        BaseException("panic"),
    ],
)
async def test_a_blocking_tool_may_raise_anything(error: BaseException) -> None:
    @tool
    def fails(query: str) -> str:
        """Fail."""
        raise error

    tools = box(fails, seconds=20.0)
    for _ in range(10):  # more often than calls may be left behind
        outcome = await tools.call("fails", "x")
        assert outcome.error
        assert type(error).__name__ in outcome.text or outcome.text == "no such city"


def test_tools_that_the_prompt_has_no_room_for_aren_t_added() -> None:
    def at_most_two(schemas: list[ToolSchema]) -> None:
        if len(schemas) > 2:
            raise ValueError(f"{len(schemas)} tools are too many")

    tools = box(add)
    tools.admit_if(at_most_two)
    tools.add([Plain(does=None)])
    with pytest.raises(ValueError, match="3 tools are too many"):
        tools.within(Budget()).add([Plain(does=None, name="third")])
    assert tools.names() == ("add", "plain")
    with pytest.raises(ValueError, match="3 tools are too many"):
        box(add, Plain(does=None), Plain(does=None, name="third")).admit_if(at_most_two)


async def test_what_a_tool_returns_is_made_to_fit() -> None:
    async def talk(query: str) -> Any:
        return "a\x00\x1b[1m\u202e\tb\r\n\ud800" + "c" * 1000, [1, 2]

    outcome = await box(Plain(does=talk), chars=100).call("plain", "x")
    assert outcome.text.startswith("a[1m\tb\n\ufffdccc")
    assert len(outcome.text) == 100
    assert outcome.artifact == {"value": [1, 2]}
    assert not outcome.error


async def test_the_token_budget_is_the_toolbox_s() -> None:
    async def talk(query: str) -> Any:
        return "one two three four", {}

    tools = Toolbox([Plain(does=talk)], budget=Budget(fit=lambda text: " ".join(text.split()[:2])))
    assert (await tools.call("plain", "x")).text == "one two"
    assert (await tools.call("nothing", "x")).text == "There is"


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ("plain", "plain"),
        ("", "No output."),
        ({"city": "Oslo"}, '{"city": "Oslo"}'),
        ([1, 2], "[1, 2]"),
        (None, "null"),
        ([{"type": "text", "text": "one"}, {"type": "image", "base64": "AAAA"}], "one\n[image]"),
        ([{"type": "file", "url": "https://example.org/a"}], "[file: https://example.org/a]"),
        (object, "<class 'object'>"),
    ],
)
async def test_a_tool_may_answer_with_what_it_likes(answer: Any, text: str) -> None:
    @tool
    async def answers(query: str) -> Any:
        """Answer."""
        return answer

    outcome = await box(answers).call("answers", "x")
    assert (outcome.text, outcome.error) == (text, False)


async def test_a_tool_says_by_its_artifact_that_it_failed() -> None:
    async def talk(query: str) -> Any:
        return "nothing found", {"error": True, "backend": "local"}

    lines: list[dict[str, Any]] = []
    outcome = await box(Plain(does=talk), audit=lines.append).call("plain", "x")
    assert outcome.error
    assert lines[0]["backend"] == "local"


class Odd:
    def __repr__(self) -> str:
        raise RuntimeError("no repr")


def test_an_artifact_is_json_of_bounded_size() -> None:
    deep: Any = []
    for _ in range(10_000):
        deep = [deep]
    circle: dict[str, Any] = {}
    circle["self"] = circle
    odd = {"x" * 300_000: 1, 1: {2}, (1, 2): b"bytes", "deep": deep, "circle": circle, "odd": Odd(), "huge": 10**5000,
           "nan": float("nan"), "lone": "\ud800\x00", "many": list(range(100_000)), "model": add}  # fmt: skip
    text = json.dumps(as_artifact(odd), allow_nan=False)
    text.encode()
    assert len(text) < 4 * MAX_CHARS
    assert as_artifact(None) == {}
    assert as_artifact({"text": "x" * 900_000, "error": True})["error"] is True


json_like = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(st.characters()) | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.integers(), inner) | st.tuples(inner),
    max_leaves=20,
)


@given(json_like)
def test_any_artifact_can_be_kept(value: Any) -> None:
    json.dumps(as_artifact(value), allow_nan=False).encode()


# -- who may, and who asks


async def test_a_tool_that_isn_t_allowed_is_as_if_it_weren_t_there() -> None:
    async def talk(query: str) -> Any:
        raise AssertionError("it ran")

    tools = box(add, Plain(does=talk))
    assert [schema.name for schema in tools.schemas({"add"})] == ["add"]
    outcome = await tools.call("plain", "x", ANN, allowed={"add"})
    assert outcome.error
    assert outcome.text == "There is no tool 'plain'. The tools are: add."
    assert (await tools.call("nonsense\x00" * 50, "x", allowed=())).text.endswith("No tool is on.")
    assert (await tools.call("search", "x")).text == "The tool search is off."


async def test_any_kind_of_tool_learns_who_it_works_for() -> None:
    @tool
    async def of_async(query: str, config: RunnableConfig) -> str:
        """Say who."""
        return context_of(config).owner

    @tool
    def of_sync(query: str, config: RunnableConfig) -> str:
        """Say who."""
        return context_of(config).owner

    class Class(BaseTool):
        name: str = "of_class"
        description: str = "Say who."

        async def _arun(self, query: str, config: RunnableConfig) -> str:
            return context_of(config).conversation_id

        def _run(self, query: str) -> str:
            raise AssertionError("the agent is async")

    tools = box(of_async, of_sync, Class())
    assert (await tools.call("of_async", "x", ANN)).text == "ann"
    assert (await tools.call("of_sync", "x", ANN)).text == "ann"
    assert (await tools.call("of_class", "x", ANN)).text == "conversation-1"


@pytest.mark.parametrize("name", ["two words", "x" * 65, "naïve", "answer", "call", "a</call>"])
def test_a_name_that_can_t_be_used_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="can't be called"):
        box(StructuredTool.from_function(coroutine=add.coroutine, name=name, description="x"))  # type: ignore[attr-defined]


def test_a_name_that_is_taken_is_refused_and_nothing_changes() -> None:
    tools = box(add)
    with pytest.raises(ValueError, match="Two tools are called 'add'"):
        tools.add([StructuredTool.from_function(coroutine=add.coroutine, name="other", description="x"), add])  # type: ignore[attr-defined]
    assert tools.names() == ("add",)
    tools.discard(["add"])
    assert tools.names() == ()


# -- the audit


async def test_each_call_leaves_a_line(tmp_path: Path) -> None:
    path = tmp_path / "home" / "audit.jsonl"
    with audit_file(path) as write:
        tools = box(add, audit=write)
        await tools.call("add", {"a": 1}, ANN)
        await tools.call("add", {"b": "\ud800"}, ANN)
        await tools.call("gone\n", "x")
        await tools.call("add", {1: {2}}, ANN)  # type: ignore[dict-item]
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["tool"] for line in lines] == ["add", "add", "gone\n", "add"]
    assert [line["error"] for line in lines] == [False, True, True, True]
    first = lines[0]
    assert first.keys() == {
        "time", "owner", "conversation_id", "turn_id", "tool", "input_sha256", "input_chars", "output_chars", "error",
        "seconds", "backend",
    }  # fmt: skip
    assert (first["owner"], first["conversation_id"], first["turn_id"]) == ("ann", "conversation-1", "turn-1")
    assert (first["input_chars"], first["output_chars"]) == (len('{"a": 1}'), 1)
    assert len(first["input_sha256"]) == 64


async def test_the_audit_rotates(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    with audit_file(path, max_bytes=2_000, kept=2) as write:
        tools = box(add, audit=write)
        for _ in range(40):
            await tools.call("add", {"a": 1}, ANN)
    assert sorted(os.listdir(tmp_path)) == ["audit.jsonl", "audit.jsonl.1", "audit.jsonl.2"]
    assert all(entry.stat().st_size <= 2_000 for entry in os.scandir(tmp_path))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
async def test_a_full_disk_costs_the_line_and_not_the_answer(caplog: pytest.LogCaptureFixture) -> None:
    with audit_file(Path("/dev/full")) as write, caplog.at_level(logging.WARNING):
        outcome = await box(add, audit=write).call("add", {"a": 1})
    assert outcome.text == "2"
    assert "a line of the audit is lost" in caplog.text
