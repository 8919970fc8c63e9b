"""The contract that `call_tool` holds every tool to, and the tools that `build_tools` makes."""

from __future__ import annotations

import asyncio
import shutil
import time
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from langchain_core.tools import BaseTool, tool

from tools.registry import build_tools, call_tool
from tools.text import clean, cut

needs_bwrap = pytest.mark.skipif(shutil.which("bwrap") is None, reason="needs bubblewrap")


@pytest.fixture(scope="module")
def toolbox(tmp_path_factory: pytest.TempPathFactory) -> dict[str, BaseTool]:
    return build_tools(tmp_path_factory.mktemp("home"), code_timeout_s=30.0)


@pytest.fixture(scope="module")
def hurried(tmp_path_factory: pytest.TempPathFactory) -> dict[str, BaseTool]:
    return build_tools(tmp_path_factory.mktemp("hurried"), code_timeout_s=1.0)


async def code(toolbox: dict[str, BaseTool], program: str, max_chars: int = 2000) -> tuple[str, bool]:
    outcome = await call_tool(toolbox["code"], program, timeout_s=60, max_chars=max_chars)
    return outcome.text, outcome.error


def test_the_tools_have_their_names(toolbox: dict[str, BaseTool]) -> None:
    assert {name: tool.name for name, tool in toolbox.items()} == {"code": "code", "search": "search"}


@needs_bwrap
@pytest.mark.parametrize(
    ("program", "text"),
    [
        ("2+2", "4"),
        ("print(17 * 23)", "391"),
        ("x = 5\nx ** 2", "25"),
        ("print('a')\n'b'", "a\n'b'"),
        ("None", "No output. Print the result."),
        ("x = 3", "No output. Print the result."),
        ("", "No output. Print the result."),
        ("import math\nmath.sqrt(2)", "1.4142135623730951"),
        ("for i in range(3): print(i)", "0\n1\n2"),
        ("from __future__ import annotations\nf'{1 + 1}'", "'2'"),
        ("def main():\n    return 7\nif __name__ == '__main__':\n    print(main())", "7"),
        ("import asyncio\nasyncio.run(asyncio.sleep(0, 'awake'))", "'awake'"),
        ("from dataclasses import dataclass\n@dataclass\nclass P:\n    x: int\nP(1)", "P(x=1)"),
        ("print('\\x1b[31mred\\x00')", "[31mred"),
        ("print('日本')\n'é'", "日本\n'é'"),
    ],
)
async def test_code_answers_like_a_notebook(toolbox: dict[str, BaseTool], program: str, text: str) -> None:
    assert await code(toolbox, program) == (text, False)


@needs_bwrap
async def test_an_error_shows_the_program_s_own_lines(toolbox: dict[str, BaseTool]) -> None:
    text, error = await code(toolbox, "import json\ndef load(s):\n    return json.loads(s)\n\nload('{')")
    assert error
    lines = text.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert [line for line in lines if "File" in line] == [
        '  File "<code>", line 5, in <module>',
        '  File "<code>", line 3, in load',
    ]
    assert lines[-1].startswith("json.decoder.JSONDecodeError: Expecting property name")


@needs_bwrap
@pytest.mark.parametrize(
    ("program", "says"),
    [
        ("1 +", "SyntaxError: invalid syntax"),
        ("input()", "EOFError"),
        ("undefined", "NameError: name 'undefined' is not defined"),
        ("import sys\nsys.exit(3)", "No output, exit code 3"),
        ("raise SystemExit('bye')", "bye"),
        ("import os\nos.abort()", "Killed by SIGABRT."),
        ("while True: print('y')", "Stopped: a program may print 16384 bytes."),
    ],
)
async def test_how_a_program_failed_is_told(toolbox: dict[str, BaseTool], program: str, says: str) -> None:
    text, error = await code(toolbox, program)
    assert error
    assert says in text


@needs_bwrap
@pytest.mark.parametrize("program", ["while True: pass", "import time\ntime.sleep(60)"])
async def test_a_program_out_of_time_is_told(hurried: dict[str, BaseTool], program: str) -> None:
    text, error = await code(hurried, program)
    assert error
    assert text == "Timed out: a program has 1 s, 1 of them on the processor."


@needs_bwrap
async def test_a_cut_observation_keeps_the_error_s_last_line(toolbox: dict[str, BaseTool]) -> None:
    text, error = await code(toolbox, "for i in range(500): print(i)\n1/0", max_chars=200)
    assert error
    assert len(text) == 200
    assert text.startswith("0\n1\n")
    assert text.endswith("ZeroDivisionError: division by zero")


async def test_code_without_a_sandbox_says_how_to_get_one(
    toolbox: dict[str, BaseTool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tools.python.sandbox.shutil.which", lambda name: None)
    text, error = await code(toolbox, "2+2")
    assert error
    assert text.startswith("SandboxUnavailable: ")
    assert "apt install bubblewrap" in text
    assert "unsafe_without_sandbox" in text


async def test_the_unsafe_option_is_the_operator_s_to_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tools.python.sandbox.shutil.which", lambda name: None)
    assert await code(build_tools(tmp_path, unsafe=True), "2+2") == ("4", False)


async def test_search_is_called_the_same_way(toolbox: dict[str, BaseTool]) -> None:
    outcome = await call_tool(toolbox["search"], "capital of France", timeout_s=10, max_chars=60)
    assert outcome.text.startswith("France: ")
    assert len(outcome.text) <= 60
    assert not outcome.error
    assert outcome.artifact["backend"] == "local"
    assert outcome.seconds > 0


@pytest.mark.parametrize("backends", [("bing",), ()])
def test_a_backend_that_doesn_t_exist_is_named(tmp_path: Path, backends: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="ddgs, local"):
        build_tools(tmp_path, backends)


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


async def test_a_hanging_tool_is_cancelled() -> None:
    cancelled = asyncio.Event()

    async def hang(query: str) -> Any:
        try:
            await asyncio.sleep(60)
        finally:
            cancelled.set()

    outcome = await call_tool(Plain(does=hang), "x", timeout_s=0.2, max_chars=100)
    assert outcome.error
    assert outcome.text == "Timed out: plain has 0.2 s."
    assert outcome.seconds < 1
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

    outcome = await call_tool(Plain(does=stubborn), "x", timeout_s=0.2, max_chars=100)
    assert outcome.error
    assert outcome.seconds < 2


async def test_cancelling_the_call_cancels_the_tool() -> None:
    ended = asyncio.Event()

    async def hang(query: str) -> Any:
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()

    call = asyncio.create_task(call_tool(Plain(does=hang), "x", timeout_s=60, max_chars=100))
    await asyncio.sleep(0.05)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert ended.is_set()


@pytest.mark.parametrize(
    "error", [ValueError("bad\x00 value"), KeyError(), TimeoutError("slow"), asyncio.CancelledError()]
)
async def test_an_exception_is_an_observation(error: BaseException) -> None:
    async def fail(query: str) -> Any:
        raise error

    outcome = await call_tool(Plain(does=fail), "x", timeout_s=5, max_chars=100)
    assert outcome.error
    assert outcome.text.startswith(type(error).__name__)
    assert "\x00" not in outcome.text


async def test_what_a_tool_returns_is_made_to_fit() -> None:
    async def talk(query: str) -> Any:
        return "a\x00\x1b[1m\u202e\tb\r\n\ud800" + "c" * 1000, [1, 2]

    outcome = await call_tool(Plain(does=talk), "x", timeout_s=5, max_chars=100)
    assert outcome.text.startswith("a[1m\tb\n\ufffdccc")
    assert len(outcome.text) == 100
    assert outcome.artifact == {"value": [1, 2]}
    assert not outcome.error


async def test_a_tool_of_two_arguments_is_refused_in_words() -> None:
    @tool
    async def add(a: int, b: int) -> int:
        """Add two numbers."""
        return a + b

    outcome = await call_tool(add, "1", timeout_s=5, max_chars=200)
    assert outcome.error
    assert "add" in outcome.text


@given(st.text(alphabet=st.characters(), max_size=300), st.integers(0, 100))
def test_text_is_clean_and_within_its_budget(text: str, budget: int) -> None:
    shown = cut(clean(text), budget)
    assert len(shown) <= budget
    assert all(c in "\n\t" or c >= " " for c in shown)
    shown.encode()
    assert clean(shown) == shown
