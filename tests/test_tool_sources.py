"""Where tools come from: entries of the settings, and all that a deployment has, per owner."""

from __future__ import annotations

import contextlib
import logging
import sys
from pathlib import Path

import pytest
from langchain_core.runnables import RunnableConfig
from langchain_core.tools import tool

from app.service import Finished, Question
from app.settings import Settings
from app.tools import open_toolbox, tool_seconds
from feedback_store import Store
from serving.engines.base import Sampling
from serving.model import BaseModel
from tests.fakes import make_service
from tests.mcp_server import STDIO
from tools.context import context_of
from tools.custom import BadTool, load_tools
from tools.toolbox import Toolbox

MINE = '''
from langchain_core.tools import BaseTool, BaseToolkit, StructuredTool, tool

@tool
def one(x: int) -> int:
    "One."
    return x

def two(x: int, y: str = "") -> str:
    """Two."""
    return y * x

async def three(x: str) -> str:
    """Three."""
    return x

class Kit(BaseToolkit):
    def get_tools(self):
        return [one, StructuredTool.from_function(two)]

class Four(BaseTool):
    name: str = "four"
    description: str = "Four."
    def _run(self, x: str) -> str:
        return x

class Group:
    inner = one

class Needy(Four):
    key: str

def undocumented(x):
    return x

several = [one, two]
kit = Kit()
nothing = []
number = 7
'''


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine_for_a_test.py").write_text(MINE)
    (tmp_path / "broken_for_a_test.py").write_text("1 / 0")
    (tmp_path / "needy_for_a_test.py").write_text("import there_is_no_such_package")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in list(sys.modules):
        if name.endswith("_for_a_test"):
            monkeypatch.delitem(sys.modules, name)


@pytest.mark.parametrize(
    ("attribute", "names"),
    [
        ("one", ["one"]),
        ("two", ["two"]),
        ("three", ["three"]),
        ("several", ["one", "two"]),
        ("kit", ["one", "two"]),
        ("Kit", ["one", "two"]),
        ("Four", ["four"]),
        ("Group.inner", ["one"]),
    ],
)
def test_an_entry_is_any_kind_of_tool(mine: None, attribute: str, names: list[str]) -> None:
    assert [tool.name for tool in load_tools([f"mine_for_a_test:{attribute}"])] == names


async def test_what_was_loaded_works(mine: None) -> None:
    tools = Toolbox(load_tools(["mine_for_a_test:two", "mine_for_a_test:three", "mine_for_a_test:Four"]))
    assert (await tools.call("two", {"x": 2, "y": "ab"})).text == "abab"
    assert (await tools.call("three", {"x": "ab"})).text == "ab"
    assert (await tools.call("four", "ab")).text == "ab"


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ("lookup", "module:name"),
        (":lookup", "module:name"),
        ("there_is_no_such_module:x", "no module 'there_is_no_such_module': install"),
        ("needy_for_a_test:x", "no module 'there_is_no_such_package': install"),
        ("broken_for_a_test:x", "ZeroDivisionError"),
        ("mine_for_a_test:five", "has no 'five': mend the name. It has .*one, .*two"),
        ("mine_for_a_test:number", "is a int: it must be a LangChain tool"),
        ("mine_for_a_test:nothing", "holds no tool"),
        ("mine_for_a_test:undocumented", "docstring"),
        ("mine_for_a_test:Needy", "name an instance"),
    ],
)
def test_an_entry_that_brings_no_tool_is_named_with_the_way_out(mine: None, entry: str, says: str) -> None:
    with pytest.raises(BadTool, match=says) as error:
        load_tools([entry])
    assert repr(entry) in str(error.value)


# -- a deployment's


async def test_a_deployment_has_all_its_tools(mine: None, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = Settings(
        home=tmp_path / "home",
        search_backends=["local"],
        tools=["mine_for_a_test:several"],
        mcp_servers={"t": STDIO, "gone": {"command": "/there/is/no/such/program"}},
        key_tools={"ann": ["code", "searhc"]},
        open_pages=True,
        python_pool=0,
    )
    with caplog.at_level(logging.WARNING), open_toolbox(settings, audit=True) as tools:
        assert tools.names()[:3] == ("code", "search", "fetch")
        assert {"one", "two", "t_add"} <= set(tools.names())
        assert (await tools.call("one", {"x": 3})).text == "3"
        assert (await tools.call("t_add", {"a": 3})).text == "4"
    with open_toolbox(settings, only=settings.training_tools) as tools:
        assert tools.names() == ("code", "search")
    with open_toolbox(settings, only=["code", "one", "t_add"]) as tools:
        assert set(tools.names()) == {"code", "one", "t_add"}
    assert caplog.text.count("the MCP server gone is down") == 1
    assert "key_tools of ann names 'searhc'" in caplog.text
    assert len((settings.home / "audit.jsonl").read_text().splitlines()) == 2


@tool
async def whoami(query: str, config: RunnableConfig) -> str:
    """Say who asks."""
    context = context_of(config)
    return f"{context.owner} {bool(context.conversation_id)} {context.turn_id}"


async def test_an_owner_s_answers_use_the_tools_of_the_key(base: BaseModel, tmp_path: Path) -> None:
    with Store.open(tmp_path / "store.db") as store:
        service, engine = make_service(base, store, more=[whoami], key_tools={"ann": ["code"], "eve": []})
        contexts: list[str] = []

        def script(context: str) -> str:
            contexts.append(context)
            if "</response>\n" in context:
                return "<think>So.</think><answer>done</answer>"
            return '<think>Who?</think><call>{"name": "whoami", "arguments": {"query": "x"}}</call>'

        engine.script = script
        for owner, listed, says in (
            ("bob", True, "bob True turn"),
            ("ann", False, "There is no tool 'whoami'. The tools are: code."),
            ("eve", False, "There is no tool 'whoami'. No tool is on."),
        ):
            question = Question(owner, [{"role": "user", "content": "who am I?"}], Sampling())
            async with contextlib.aclosing(service.answer(question)) as events:
                finished = [event async for event in events][-1]
            assert isinstance(finished, Finished)
            step = finished.trajectory.steps[0]
            assert step.observation is not None
            assert step.observation.text.startswith(says)
            prompt = base.tokenizer.decode(finished.trajectory.prompt_ids)
            assert ("whoami" in prompt) == listed
            assert ("<code>" in prompt) == (owner != "eve")
            turn = store.turn(finished.started.turn_id)
            assert turn.prompt_ids == finished.trajectory.prompt_ids
            assert turn.steps[0].action == "call"
            kept = turn.steps[0].observation
            assert kept is not None
            assert kept.tool == "whoami"
        judged = await service.feedback(turn.id, "eve", "client", verifier="exact", gold="done")
        assert judged.score == 1.0


def test_a_tool_whose_name_is_taken_is_refused_at_start(mine: None, tmp_path: Path) -> None:
    settings = Settings(home=tmp_path, search_backends=["local"], tools=["mine_for_a_test:one"] * 2, python_pool=0)
    with pytest.raises(ValueError, match="Two tools are called 'one'"), open_toolbox(settings):
        pass


def test_the_time_of_a_call_is_set_or_follows_the_tools() -> None:
    assert tool_seconds(Settings(python_seconds=8, search_seconds=6)) == 16
    assert tool_seconds(Settings(open_pages=True, fetch_seconds=10)) == 20
    assert tool_seconds(Settings(tool_seconds=60)) == 60
