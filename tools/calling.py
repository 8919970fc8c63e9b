"""One call of one tool, whatever the tool does: never an exception but its own cancellation, never past its time."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from langchain_core.messages import ToolMessage
from langchain_core.runnables import RunnableConfig
from langchain_core.tools import BaseTool, StructuredTool, Tool, ToolException

from tools.artifact import as_artifact, as_text

_GRACE_S = 1.0  # a cancelled tool may tidy up for this long; then it is left behind
_MAX_STUCK = 8  # calls of one blocking tool that may be left behind before it is refused


@dataclass(frozen=True)
class ToolOutcome:
    """What came of a call: `text` is for the policy; `artifact` (sources, exit code, backend) is for people."""

    text: str
    error: bool
    artifact: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


def failed(text: str, began: float | None = None, **artifact: Any) -> ToolOutcome:
    """An outcome that says what went wrong; `began` is when, by time.monotonic()."""
    return ToolOutcome(text, True, artifact, 0.0 if began is None else time.monotonic() - began)


async def call_tool(
    tool: BaseTool, arguments: dict[str, Any], config: RunnableConfig, timeout_s: float, waited_s: float = 0.0
) -> ToolOutcome:
    """Call a tool with checked arguments. Raises nothing but its own cancellation, which the tool shares.

    `waited_s` of the time are gone already. A tool that can't be called in an async way runs in a thread of its own,
    which is left behind when it is out of time: Python can't end a thread.
    """
    began = time.monotonic()
    artifact: dict[str, Any]
    task = asyncio.create_task(_invoke(tool, arguments, config))
    try:
        await asyncio.wait({task}, timeout=max(timeout_s - waited_s, 0.0))
        if task.cancelled():  # by itself: a cancelled call never gets here
            text, error, artifact = f"CancelledError: {tool.name} gave up.", True, {"exception": "CancelledError"}
        elif task.done():
            text, error, artifact = task.result()
        else:
            text, error, artifact = f"Timed out: {tool.name} has {timeout_s:g} s.", True, {"timed_out": True}
    finally:
        if not task.done():
            task.cancel()
            await asyncio.wait({task}, timeout=_GRACE_S)
    return ToolOutcome(text, error, artifact, time.monotonic() - began)


async def _invoke(
    tool: BaseTool, arguments: dict[str, Any], config: RunnableConfig
) -> tuple[str, bool, dict[str, Any]]:
    """(text, error, artifact) of a call, with every exception made into text."""
    call: dict[str, Any] = {"type": "tool_call", "name": tool.name, "id": "1", "args": arguments}
    try:
        if _blocks(tool):
            message = await _in_thread(tool.name, lambda: tool.invoke(call, config))
        else:
            message = await tool.ainvoke(call, config)
        if not isinstance(message, ToolMessage):  # a tool may answer with what it likes
            return str(message), False, {}
        artifact = as_artifact(message.artifact)
        error = message.status == "error" or bool(artifact.get("error"))
        return as_text(message.content), error, artifact
    except ToolException as error:  # LangChain's own way to tell the policy something
        return _words(error) or "ToolException", True, {"exception": "ToolException"}
    except asyncio.CancelledError:
        raise
    except BaseException as error:  # a panic of a Rust library, for one
        return f"{type(error).__name__}: {_words(error)}", True, {"exception": type(error).__name__}


def guard(tool: BaseTool) -> None:
    """Turn what would end the event loop into an exception, in the tool itself.

    LangChain calls it in a task of its own, and out of any task SystemExit and KeyboardInterrupt go straight to the
    loop.
    """
    arun = tool._arun
    if _blocks(tool) or getattr(arun, "guarded", False):
        return

    @functools.wraps(arun)
    async def guarded(*args: Any, **kwargs: Any) -> Any:
        try:
            return await arun(*args, **kwargs)
        except (SystemExit, KeyboardInterrupt) as error:
            raise RuntimeError(f"{type(error).__name__}: {_words(error)}") from error

    guarded.guarded = True  # type: ignore[attr-defined]
    object.__setattr__(tool, "_arun", guarded)  # no field of the model's


def _words(error: BaseException) -> str:
    try:
        return str(error)
    except BaseException:  # an exception is the tool's own code
        return "(it can't be written)"


def _blocks(tool: BaseTool) -> bool:
    """Whether the tool has no async way of its own, and LangChain would take a thread of the loop's pool for it."""
    if isinstance(tool, StructuredTool | Tool):
        return tool.coroutine is None
    return type(tool)._arun is BaseTool._arun


_stuck: dict[str, int] = {}  # calls whose caller has gone, by tool
_stuck_lock = threading.Lock()


async def _in_thread(name: str, function: Callable[[], Any]) -> Any:
    """A daemon thread a call: a hanging one may neither fill the loop's pool nor keep the process from ending."""
    with _stuck_lock:
        if _stuck.get(name, 0) >= _MAX_STUCK:
            raise ToolException(f"{name} is stuck: {_MAX_STUCK} earlier calls haven't ended. Do without it.")
    loop = asyncio.get_running_loop()
    done: asyncio.Future[Any] = loop.create_future()
    context = contextvars.copy_context()
    ended = threading.Event()

    def deliver(result: Any, error: BaseException | None) -> None:
        if not done.done():
            if error is None:
                done.set_result(result)
            else:
                done.set_exception(error)

    def run() -> None:
        result, error = None, None
        try:
            result = context.run(function)
        except BaseException as raised:
            error = raised
            if not isinstance(raised, Exception) or isinstance(raised, StopIteration):  # a future refuses these
                error = RuntimeError(f"{type(raised).__name__}: {_words(raised)}")
        with _stuck_lock:
            ended.set()
            if left:
                _stuck[name] -= 1
        try:
            loop.call_soon_threadsafe(deliver, result, error)
        except RuntimeError:
            return  # the loop has closed: nobody waits any more

    left: list[bool] = []
    threading.Thread(target=run, name=f"tool {name}", daemon=True).start()
    try:
        return await done
    except asyncio.CancelledError:
        with _stuck_lock:
            if not ended.is_set():
                left.append(True)
                _stuck[name] = _stuck.get(name, 0) + 1
        raise
