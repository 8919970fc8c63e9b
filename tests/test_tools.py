"""The tools "code" and "search", called as the agent calls them."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tools.python import Bubblewrap, Limits, PythonTool
from tools.search import SearchOptions, open_search
from tools.text import clean, cut
from tools.toolbox import Budget, Toolbox

needs_bwrap = pytest.mark.skipif(shutil.which("bwrap") is None, reason="needs bubblewrap")


@pytest.fixture(scope="module")
def toolbox(tmp_path_factory: pytest.TempPathFactory) -> Toolbox:
    search = open_search(tmp_path_factory.mktemp("home"), SearchOptions())
    return Toolbox([PythonTool(), search], budget=Budget(seconds=60))


@pytest.fixture(scope="module")
def hurried() -> Toolbox:
    limits = replace(Limits(), wall_s=1.0, cpu_s=1)
    tool = PythonTool(backend=Bubblewrap(limits, (), idle=1))
    return Toolbox([tool], budget=Budget(seconds=60))


async def code(toolbox: Toolbox, program: str, max_chars: int = 2000) -> tuple[str, bool]:
    outcome = await toolbox.within(Budget(60, max_chars)).call("code", program)
    return outcome.text, outcome.error


def test_the_tools_have_their_names(toolbox: Toolbox) -> None:
    assert toolbox.names() == ("code", "search")
    assert [schema.name for schema in toolbox.schemas()] == ["code", "search"]
    assert [list(schema.parameters["properties"]) for schema in toolbox.schemas()] == [["code"], ["query"]]


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
async def test_code_answers_like_a_notebook(toolbox: Toolbox, program: str, text: str) -> None:
    assert await code(toolbox, program) == (text, False)


@needs_bwrap
async def test_an_error_shows_the_program_s_own_lines(toolbox: Toolbox) -> None:
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
        ("while True: print('y')", "Stopped: a program may print 1048576 bytes."),
    ],
)
async def test_how_a_program_failed_is_told(toolbox: Toolbox, program: str, says: str) -> None:
    text, error = await code(toolbox, program)
    assert error
    assert says in text


@needs_bwrap
@pytest.mark.parametrize("program", ["while True: pass", "import time\ntime.sleep(60)"])
async def test_a_program_out_of_time_is_told(hurried: Toolbox, program: str) -> None:
    text, error = await code(hurried, program)
    assert error
    assert text == "Timed out: a program has 1 s, 1 of them on the processor."


@needs_bwrap
async def test_a_cut_observation_keeps_the_error_s_last_line(toolbox: Toolbox) -> None:
    text, error = await code(toolbox, "for i in range(500): print(i)\n1/0", max_chars=200)
    assert error
    assert len(text) == 200
    assert text.startswith("0\n1\n")
    assert text.endswith("ZeroDivisionError: division by zero")


async def test_search_is_called_the_same_way(toolbox: Toolbox) -> None:
    outcome = await toolbox.within(Budget(10, 60)).call("search", "capital of France")
    assert outcome.text.startswith("France: ")
    assert len(outcome.text) <= 60
    assert not outcome.error
    assert outcome.artifact["backend"] == "local"
    assert outcome.seconds > 0


@pytest.mark.parametrize("backends", [("bing",), ()])
def test_a_backend_that_doesn_t_exist_is_named(tmp_path: Path, backends: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="local"):
        open_search(tmp_path, SearchOptions(backends=backends))


@given(st.text(alphabet=st.characters(), max_size=300), st.integers(0, 100))
def test_text_is_clean_and_within_its_budget(text: str, budget: int) -> None:
    shown = cut(clean(text), budget)
    assert len(shown) <= budget
    assert all(c in "\n\t" or c >= " " for c in shown)
    shown.encode()
    assert clean(shown) == shown


def test_what_nobody_sees_is_taken_out() -> None:
    assert clean("a\r\nb\rc\td") == "a\nb\nc\td"
    for unseen in "\x00\u00ad\u034f\u061c\u200b\u2060\u2064\ufe0f\ufeff\ufffb\U000e0041":
        assert clean(f"<{unseen}/resp{unseen}onse>") == "</response>"
