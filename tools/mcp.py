"""Tools of MCP servers: they come into a toolbox as their servers come up, and say so when their server is down.

All sessions live on one event loop in a thread of its own, since a session can't leave the loop that began it, and
tools are called from the server's loop, from a training run's, and from others. A server that can't be reached costs
a warning. It is tried again, later and later, and at once when one of its tools is called.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Literal, cast

from langchain_core.tools import BaseTool, StructuredTool, ToolException
from langchain_mcp_adapters.sessions import Connection, create_session
from langchain_mcp_adapters.tools import convert_mcp_tool_to_langchain_tool
from mcp import ClientSession
from mcp.shared.exceptions import McpError
from mcp.types import CONNECTION_CLOSED, CallToolResult
from mcp.types import Tool as Definition

from tools.mcp_connections import connection_of
from tools.toolbox import Toolbox

log = logging.getLogger(__name__)
# It writes a traceback for each connection that ends; what that means for a call is said in the call's result.
logging.getLogger("mcp.client.streamable_http").setLevel(logging.CRITICAL)

_PAUSE_S = (1.0, 300.0)  # before a server is tried again: at first, and at most
_STOP_S = 8.0  # for all servers to end: the library asks a process for 2 s, then with a signal, then kills it
_FRESH_S = 1.0  # a session that answered so lately isn't asked whether it lives
_PING_S = 2.0
_SESSION_TERMINATED = 32600  # as the library's HTTP client says it
_MAX_TOOLS = 200  # of one server


class McpServers:
    """Use as a context manager: the tools are in the toolbox from then on, and the servers' processes end with it.

    A tool is called `server_tool`, so that its name doesn't depend on what else is on; one whose name or schema can't
    be used is left out, with a warning. Entering blocks until each server is up or has failed, `start_s` seconds at
    most. Raises BadServer.
    """

    def __init__(self, connections: Mapping[str, Mapping[str, Any]], toolbox: Toolbox, start_s: float = 15.0) -> None:
        checked = {name: connection_of(name, given) for name, given in connections.items()}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="mcp", daemon=True)
        self._servers = [_Server(name, given, self._loop, toolbox, start_s) for name, given in checked.items()]
        self._start_s = start_s

    def __enter__(self) -> McpServers:
        if self._servers:
            self._thread.start()
            asyncio.run_coroutine_threadsafe(self._start(), self._loop).result()
        return self

    def __exit__(self, *_: object) -> None:
        if self._servers:
            stopping = asyncio.run_coroutine_threadsafe(self._stop(), self._loop)
            with suppress(TimeoutError):
                stopping.result(_STOP_S + 2.0)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(5.0)
        if not self._thread.is_alive():
            self._loop.close()

    def down(self) -> dict[str, str]:
        """The servers that can't be reached now, and why."""
        return {server.name: server.why for server in self._servers if not server.is_up}

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    async def _start(self) -> None:
        self._tasks = [asyncio.create_task(server.serve()) for server in self._servers]
        with suppress(TimeoutError):
            async with asyncio.timeout(self._start_s):
                for server in self._servers:
                    await server.settled()
        for server in self._servers:  # in the order of the settings, so that prompts are the same each time
            server.publish()
            if not server.is_up:
                log.warning("the MCP server %s is down, and is tried again later: %s", server.name, server.why)

    async def _stop(self) -> None:
        for server in self._servers:
            server.stop()
        _, left = await asyncio.wait(self._tasks, timeout=_STOP_S)
        for task in left:
            task.cancel()


class McpTool(BaseTool):
    """One tool of a server. What the server reports as an error, and that it is down, are ToolExceptions."""

    response_format: Literal["content", "content_and_artifact"] = "content_and_artifact"
    server: Any
    definition: Any

    async def _arun(self, /, **arguments: Any) -> Any:
        # The adapter takes arguments by keyword, where some names would clash with its own: bound here, none can.
        bound = cast(ClientSession, _Bound(self.server, arguments))
        adapted = cast(StructuredTool, convert_mcp_tool_to_langchain_tool(bound, self.definition))
        assert adapted.coroutine is not None
        return await adapted.coroutine()

    def _run(self, /, **arguments: Any) -> Any:
        raise NotImplementedError("A tool of an MCP server is called with `ainvoke`.")


class _Bound:
    """What the adapter takes for a session: it makes one call, with the arguments that it was given."""

    def __init__(self, server: _Server, arguments: dict[str, Any]) -> None:
        self._server = server
        self._arguments = arguments

    async def call_tool(self, name: str, _: Any, **__: Any) -> CallToolResult:
        call = asyncio.run_coroutine_threadsafe(self._server.call(name, self._arguments), self._server.loop)
        return await asyncio.wrap_future(call)


class _Server:
    """One server: a task that keeps a session open, and calls that use it. Only `publish` is for other threads."""

    def __init__(
        self, name: str, connection: Connection, loop: asyncio.AbstractEventLoop, toolbox: Toolbox, start_s: float
    ) -> None:
        self.name = name
        self.why = f"it didn't answer within {start_s:g} s"
        self.loop = loop
        self._connection = connection
        self._toolbox = toolbox
        self._start_s = start_s
        self._session: ClientSession | None = None
        self._definitions: list[Definition] = []
        self._published: list[Definition] | None = None  # None until the toolbox wants them
        self._names: list[str] = []
        self._heard = 0.0
        self._stopping = False
        self._opening: asyncio.Timeout | None = None
        self._lost = asyncio.Event()
        self._wanted = asyncio.Event()
        self._settled = asyncio.Event()  # the last attempt has ended, well or not

    @property
    def is_up(self) -> bool:
        return self._session is not None

    async def settled(self) -> None:
        await self._settled.wait()

    async def serve(self) -> None:
        """Open the session, keep it until it is lost, and open it again; until stopped."""
        pause = _PAUSE_S[0]
        while not self._stopping:
            was_up = False
            try:
                async with create_session(self._connection) as session:
                    async with asyncio.timeout(self._start_s) as self._opening:
                        await session.initialize()
                        self._definitions = await _list(session)
                    self._opening = None
                    self._lost.clear()
                    self._session, self._heard = session, time.monotonic()
                    was_up, pause = True, _PAUSE_S[0]
                    if self._published is not None:
                        self.publish()
                    self._settled.set()
                    if not self._stopping:
                        await self._lost.wait()
            except (Exception, BaseExceptionGroup) as error:
                self.why = _words(error)
            finally:
                self._opening = None
                self._session = None
                self._lost.set()
            if not was_up:
                self._settled.set()
            else:
                self._settled.clear()  # who waits wants to know of the next attempt
            with suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._wanted.wait()
            self._wanted.clear()
            self._settled.clear()  # from here on, who waits wants to know of this attempt
            pause = min(2 * pause, _PAUSE_S[1])

    def stop(self) -> None:
        """Let `serve` end. Cancelling it in the middle of its clean-up would leave a process behind."""
        self._stopping = True
        self._lost.set()
        self._wanted.set()
        if self._opening is not None and not self._opening.expired():  # expired: it ends by itself
            self._opening.reschedule(self.loop.time())

    async def call(self, tool: str, arguments: dict[str, Any]) -> CallToolResult:
        """Raises ToolException when the server can't be reached, or goes away meanwhile."""
        session = await self._live()
        answer = asyncio.ensure_future(session.call_tool(tool, arguments))
        lost = asyncio.ensure_future(self._lost.wait())
        try:
            await asyncio.wait({answer, lost}, return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                raise self._down()
            result = answer.result()
        except McpError as error:
            if _is_alive(error):
                raise ToolException(f"The MCP server {self.name} refused the call: {error}") from error
            raise self._drop(session, error) from error
        except ToolException:
            raise
        except RuntimeError as error:  # the result isn't what the server's own schema says
            raise ToolException(f"The MCP server {self.name} answered nonsense: {error}") from error
        except Exception as error:
            raise self._drop(session, error) from error
        finally:
            self._heard = time.monotonic() if answer.done() and not answer.cancelled() else 0.0
            for task in (answer, lost):
                task.cancel()
        return result

    async def _live(self) -> ClientSession:
        """A session that answers, opened anew if need be. Raises ToolException when there is none."""
        session = self._session
        if session is not None:
            if time.monotonic() - self._heard < _FRESH_S:
                return session
            try:
                async with asyncio.timeout(_PING_S):
                    await session.send_ping()
                self._heard = time.monotonic()
                return session
            except McpError as error:
                if _is_alive(error):
                    return session
                self._drop(session, error)
            except Exception as error:
                self._drop(session, error)
        if self._session is None:
            self._wanted.set()
            self._settled.clear()
            await self._settled.wait()
        if self._session is None:
            raise self._down()
        return self._session

    def _drop(self, session: ClientSession, error: BaseException) -> ToolException:
        if self._session is session:  # else it was opened anew meanwhile
            self.why = _words(error)
            self._session = None
            self._settled.clear()
            self._lost.set()
        return self._down()

    def _down(self) -> ToolException:
        return ToolException(f"The MCP server {self.name} is down ({self.why}). It is tried again later.")

    def publish(self) -> None:
        """Put the server's tools as they are now into the toolbox."""
        if self._published == self._definitions:
            return
        self._published = list(self._definitions)
        self._toolbox.discard(self._names)
        self._names = []
        for definition in self._published:
            name = f"{self.name}_{definition.name}"
            try:
                tool = McpTool(
                    name=name,
                    description=definition.description or definition.title or definition.name,
                    args_schema={"type": "object", "properties": {}} | definition.inputSchema,
                    server=self,
                    definition=definition,
                )
                self._toolbox.add([tool])
            except ValueError as error:
                log.warning("a tool of the MCP server %s is left out: %s", self.name, error)
            else:
                self._names.append(name)


async def _list(session: ClientSession) -> list[Definition]:
    found: list[Definition] = []
    cursor: str | None = None
    while True:
        page = await session.list_tools(cursor=cursor)
        found += page.tools
        cursor = page.nextCursor
        if not cursor or len(found) >= _MAX_TOOLS:
            return found[:_MAX_TOOLS]


def _is_alive(error: McpError) -> bool:
    """Whether an error is a server's own answer, rather than the library's word that the session has ended."""
    closed = error.error.code == CONNECTION_CLOSED and error.error.message == "Connection closed"
    return not closed and error.error.code != _SESSION_TERMINATED


def _words(error: BaseException) -> str:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return f"{type(error).__name__}: {error}"[:300] if str(error) else type(error).__name__
