"""Puts the parts together: base model, store, engine, version router, tools, agent. What `up` and `ask` run on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from copy import deepcopy
from functools import partial

from app.engines import open_engine
from app.keys import check_reach
from app.record import open_store
from app.service import Service
from app.settings import Settings
from app.tools import open_toolbox, tool_seconds
from app.tracing import open_tracing
from app.unclosed import Unclosed
from feedback_store import StoreError
from serving.agent import Agent, Limits
from serving.dialects import make_dialect
from serving.dialects.base import Dialect
from serving.engines.base import EngineError
from serving.model import ModelMissing
from serving.versions import VersionRouter, install_shipped
from tools.arguments import ToolSchema
from tools.workspace import Workspaces

Progress = Callable[[str], None]


class CantStart(RuntimeError):
    """Some part can't be had. The message is that part's own, with its way out."""


@asynccontextmanager
async def running_service(settings: Settings, progress: Progress = lambda _: None) -> AsyncIterator[Service]:
    """A service that answers, and is closed at the end of the block. `progress` hears each stage.

    Raises CantStart: the store, the model, the tools or every version failed.
    """
    async with AsyncExitStack() as stack:
        try:
            service = await _start(settings, progress, stack)
        except (StoreError, EngineError, ValueError, OSError, ModelMissing) as error:
            raise CantStart(str(error)) from error
        stack.push_async_callback(service.drain, settings.shutdown_seconds)
        yield service


async def _start(settings: Settings, progress: Progress, stack: AsyncExitStack) -> Service:
    tracing = open_tracing(settings)
    stack.push_async_callback(asyncio.to_thread, tracing.close)
    progress("Opening the store")
    store = await asyncio.to_thread(open_store, settings)
    stack.push_async_callback(asyncio.to_thread, store.close)
    await asyncio.to_thread(check_reach, store, settings)
    left = await asyncio.to_thread(store.recover)
    if left:
        progress(f"Closed {left} turn{'s' if left > 1 else ''} that an earlier process left open")
    unclosed = Unclosed(store)

    def each_time() -> None:
        unclosed.retry()
        store.recover()

    present = ExitStack()
    stack.push_async_callback(asyncio.to_thread, present.close)
    await asyncio.to_thread(present.enter_context, store.present(each_time))
    await asyncio.to_thread(install_shipped, store, settings.home)
    progress("Preparing the model (the first time, about half a minute)")
    engine, base = await open_engine(settings, store, progress, stack)
    progress("Preparing the tools")
    workspaces = Workspaces(settings.home / "files", settings.files_mb << 20)
    tools = ExitStack()
    stack.push_async_callback(asyncio.to_thread, tools.close)
    opening = open_toolbox(settings, workspaces=workspaces, audit=True, warm=True)
    toolbox = await asyncio.to_thread(tools.enter_context, opening)
    progress("Loading the version in service")
    router = VersionRouter(
        store,
        engine,
        base.fingerprint,
        idle_s=settings.version_idle_seconds,
        at_most=settings.max_loaded_versions,
    )
    stack.push_async_callback(router.close)
    await router.start()
    agent = Agent(
        engine,
        make_dialect(settings.dialect, base.tokenizer),
        toolbox,
        Limits(settings.max_turns, settings.observation_tokens, tool_seconds(settings), settings.answer_tokens),
    )
    own = make_dialect(settings.dialect, deepcopy(base.tokenizer))
    toolbox.admit_if(partial(_check_room, own, engine.context_length))
    return Service(
        store, router, agent, engine, settings.max_answers, workspaces, settings.key_tools, tracing, unclosed
    )


def _check_room(dialect: Dialect, context: int, tools: Sequence[ToolSchema]) -> None:
    """Refuse tools whose schemas leave no room: else every question would be called too long. Raises ValueError.

    An MCP server may bring its tools later, from another thread: the dialect has a tokenizer of its own.
    """
    tokens = len(dialect.render([{"role": "user", "content": ""}], tools))
    if 2 * tokens > context:
        raise ValueError(
            f"The prompt that lists {len(tools)} tools has {tokens} tokens, more than half of the context of "
            f"{context}: raise context, or bring fewer tools (tools, mcp_servers)."
        )
