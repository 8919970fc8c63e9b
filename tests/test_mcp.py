"""Tools of MCP servers: real ones, by stdio and by HTTP on the loopback, that come, hang, die and come back."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fakes import until
from tests.mcp_server import STDIO
from tools import mcp
from tools.arguments import ToolSchema
from tools.mcp import McpServers
from tools.mcp_connections import BadServer
from tools.toolbox import Budget, Toolbox

PROGRAM = [STDIO["command"], STDIO["args"][0]]


@pytest.fixture
def tools() -> Toolbox:
    return Toolbox(budget=Budget(seconds=10))


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that doesn't answer is given up, and a process that doesn't end is killed, sooner than in service."""
    monkeypatch.setattr(mcp, "_PING_S", 0.3)
    monkeypatch.setattr("mcp.client.stdio.PROCESS_TERMINATION_TIMEOUT", 0.3)


@contextlib.contextmanager
def serving(port: int) -> Iterator[None]:
    """The server at a port of the loopback, once it listens."""
    process = subprocess.Popen([*PROGRAM, "http", str(port)], stderr=subprocess.DEVNULL)
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


async def test_tools_that_come_late_and_don_t_fit_are_left_out(
    tools: Toolbox, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def at_most_one(schemas: list[ToolSchema]) -> None:
        if len(schemas) > 1:
            raise ValueError("raise context")

    monkeypatch.setattr(mcp, "_PAUSE_S", (0.1, 0.2))
    port = free_port()
    with McpServers({"web": {"url": f"http://127.0.0.1:{port}/mcp"}}, tools):
        tools.admit_if(at_most_one)
        with serving(port):
            await until(lambda: "web_add" in tools and "raise context" in caplog.text)
            assert tools.names() == ("web_add",)


async def test_a_tool_is_called_from_any_event_loop(tools: Toolbox) -> None:
    with McpServers({"t": STDIO}, tools):
        assert await asyncio.to_thread(lambda: asyncio.run(say(tools, "t_add", a=1))) == "2"
        assert await say(tools, "t_add", a=2) == "3"


def test_processes_end_with_the_block(tools: Toolbox) -> None:
    def children() -> set[str]:
        own = f"/proc/{os.getpid()}/task"
        found: set[str] = set()
        for task in os.listdir(own):
            with contextlib.suppress(OSError):  # a thread that has ended since
                found |= set(Path(own, task, "children").read_text().split())
        return found

    before = children()
    with McpServers({"t": STDIO}, tools):
        assert len(children() - before) == 1
    assert children() <= before


async def test_servers_don_t_hold_up_each_other(tools: Toolbox) -> None:
    silent = {"command": sys.executable, "args": ["-c", "import time; time.sleep(60)"]}
    nonsense = {"command": sys.executable, "args": ["-c", "print('hello'); import time; time.sleep(60)"]}
    missing = {"command": "/there/is/no/such/program"}
    servers = {"silent": silent, "nonsense": nonsense, "missing": missing, "t": STDIO}
    with McpServers(servers, tools, start_s=6.0) as running:
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
        ("t", {"command": "x", "args": [1]}, "`args` is a list of texts"),
        ("t", {"command": "x", "env": {"PORT": 8000}}, "tables of texts"),
        ("t", {"url": "http://127.0.0.1:9/mcp", "headers": "x"}, "tables of texts"),
        ("t", {"url": "127.0.0.1:9/mcp"}, "begins with http://"),
        ("t", {"command": "x", "session_kwargs": {}}, "session_kwargs"),
    ],
)
def test_a_server_that_can_t_be_is_named_with_the_way_out(
    tools: Toolbox, name: str, connection: dict[str, Any], says: str
) -> None:
    with pytest.raises(BadServer, match=says) as error:
        McpServers({name: connection}, tools)
    assert name in str(error.value)
