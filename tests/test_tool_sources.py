"""Where tools come from: entries of the settings, MCP servers that come and go, and the two together."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from langchain_core.runnables import RunnableConfig
from langchain_core.tools import tool

from app.service import Finished, Question
from app.settings import Settings
from app.tools import open_toolbox, tool_seconds
from feedback_store import Store
from serving.engines.base import Sampling
from serving.model import BaseModel
from tests.fakes import make_service, until
from tools import mcp
from tools.context import context_of
from tools.custom import BadTool, load_tools
from tools.mcp import BadServer, McpServers
from tools.toolbox import Budget, Toolbox

SERVER = str(Path(__file__).with_name("mcp_server.py"))

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
        ("mine_for_a_test:five", "has no 'five': mend the name. It has .*two"),
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


# -- MCP


@pytest.fixture
def tools() -> Toolbox:
    return Toolbox(budget=Budget(seconds=10))


STDIO = {"command": sys.executable, "args": [SERVER, "stdio"]}


@contextlib.contextmanager
def serving(port: int) -> Iterator[None]:
    """The server at a port of the loopback, once it listens."""
    process = subprocess.Popen([sys.executable, SERVER, "http", str(port)], stderr=subprocess.DEVNULL)
    try:
        for _ in range(500):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=0.1):
                break
            process.poll()
            assert process.returncode is None, "the server ended"
            time.sleep(0.02)
        yield
    finally:
        process.kill()
        process.wait()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


async def say(tools: Toolbox, name: str, **arguments: Any) -> str:
    return (await tools.call(name, arguments)).text


async def test_a_server_that_is_a_program(tools: Toolbox, caplog: pytest.LogCaptureFixture) -> None:
    with McpServers({"t": STDIO}, tools):
        assert set(tools.names()) == {
            f"t_{n}" for n in ("add", "echo", "fail", "picture", "die", "hang", "environment")
        }
        assert "a tool of the MCP server t is left out" in caplog.text  # its name can't be used
        assert "t_bad name!" in caplog.text
        assert tools.schemas({"t_add"})[0].description == "Add two numbers."
        assert list(tools.schemas({"t_add"})[0].parameters["properties"]) == ["a", "b"]
        assert await say(tools, "t_add", a=1, b=2) == "3"
        assert await say(tools, "t_add", b=2) == (
            "Wrong arguments for t_add: arguments: 'a' is a required property. It takes: a, b."
        )
        assert await say(tools, "t_echo", config="one", runtime="two", self="three") == "one two three"
        failed = await tools.call("t_fail", {})
        assert failed.error
        assert "it is broken" in failed.text
        assert await say(tools, "t_picture") == "drawn\n[image]"
        assert "WHETSTONE" not in await say(tools, "t_environment")
        together = await asyncio.gather(*(say(tools, "t_add", a=n) for n in range(5)))
        assert together == ["1", "2", "3", "4", "5"]


async def test_a_server_that_dies_is_told_and_started_again(tools: Toolbox) -> None:
    with McpServers({"t": STDIO}, tools):
        died = await tools.call("t_die", {})
        assert died.error
        assert died.text.startswith("The MCP server t is down (McpError: Connection closed). It is tried again")
        assert await say(tools, "t_add", a=1) == "2"


async def test_a_call_that_hangs_costs_its_time_and_no_more(tools: Toolbox) -> None:
    with McpServers({"t": STDIO}, tools):
        outcome = await tools.within(Budget(seconds=0.3)).call("t_hang", {"seconds": 60})
        assert outcome.text == "Timed out: t_hang has 0.3 s."
        assert await say(tools, "t_add", a=1) == "2"  # in a new process, since the old one doesn't answer


async def test_a_server_by_url_comes_and_goes(
    tools: Toolbox, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(mcp, "_PAUSE_S", (0.1, 0.2))
    monkeypatch.setattr(mcp, "_FRESH_S", 0.0)
    port = free_port()
    with McpServers({"web": {"url": f"http://127.0.0.1:{port}/mcp"}}, tools) as servers:
        assert tools.names() == ()
        assert "the MCP server web is down, and is tried again later" in caplog.text
        assert list(servers.down()) == ["web"]
        with serving(port):
            await until(lambda: "web_add" in tools)
            assert await say(tools, "web_add", a=1) == "2"
            assert servers.down() == {}
        assert (await say(tools, "web_add", a=1)).startswith("The MCP server web is down (")
        with serving(port):
            assert await say(tools, "web_add", a=2) == "3"


async def test_a_tool_is_called_from_any_event_loop(tools: Toolbox) -> None:
    with McpServers({"t": STDIO}, tools):
        assert await asyncio.to_thread(lambda: asyncio.run(say(tools, "t_add", a=1))) == "2"
        assert await say(tools, "t_add", a=2) == "3"


def test_processes_end_with_the_block(tools: Toolbox) -> None:
    def children() -> set[str]:
        own = f"/proc/{os.getpid()}/task"
        return {pid for task in os.listdir(own) for pid in Path(own, task, "children").read_text().split()}

    before = children()
    with McpServers({"t": STDIO}, tools):
        assert len(children() - before) == 1
    assert children() <= before


async def test_servers_don_t_hold_up_each_other(tools: Toolbox) -> None:
    silent = {"command": sys.executable, "args": ["-c", "import time; time.sleep(60)"]}
    nonsense = {"command": sys.executable, "args": ["-c", "print('hello'); import time; time.sleep(60)"]}
    missing = {"command": "/there/is/no/such/program"}
    servers = {"silent": silent, "nonsense": nonsense, "missing": missing, "t": STDIO}
    with McpServers(servers, tools, start_s=2.0) as running:
        assert await say(tools, "t_add", a=1) == "2"
        assert set(running.down()) == {"silent", "nonsense", "missing"}
        assert "No such file" in running.down()["missing"]


@pytest.mark.parametrize(
    ("name", "connection", "says"),
    [
        ("a b", STDIO, "a server's name"),
        ("t", {}, "give it `command`"),
        ("t", {"transport": "pigeon", "url": "x"}, "'pigeon'"),
        ("t", {"command": "x", "arguments": []}, "'arguments'; a stdio server takes args"),
        ("t", {"command": 7}, "needs `command`"),
        ("t", {"url": ""}, "needs `url`"),
        ("t", {"command": "x", "args": "y"}, "`args` is a list"),
        ("t", {"command": "x", "session_kwargs": {}}, "session_kwargs"),
    ],
)
def test_a_server_that_can_t_be_is_named_with_the_way_out(
    tools: Toolbox, name: str, connection: dict[str, Any], says: str
) -> None:
    with pytest.raises(BadServer, match=says) as error:
        McpServers({name: connection}, tools)
    assert name in str(error.value)


# -- a deployment's


async def test_a_deployment_has_all_its_tools(mine: None, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = Settings(
        home=tmp_path / "home",
        search_backends=["local"],
        tools=["mine_for_a_test:several"],
        mcp_servers={"t": STDIO, "gone": {"command": "/there/is/no/such/program"}},
        key_tools={"ann": ["code", "searhc"]},
        python_pool=0,
    )
    with caplog.at_level(logging.WARNING), open_toolbox(settings, audit=True) as tools:
        assert tools.names()[:2] == ("code", "search")
        assert {"one", "two", "t_add"} <= set(tools.names())
        assert (await tools.call("one", {"x": 3})).text == "3"
        assert (await tools.call("t_add", {"a": 3})).text == "4"
    assert "the MCP server gone is down" in caplog.text
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
