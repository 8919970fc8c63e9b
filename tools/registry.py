"""The two functions that the rest of the product uses tools by: `build_tools` makes them, `call_tool` calls one.

`call_tool` holds every tool, these and an operator's own, to one contract: text and an artifact within a budget of
time and of characters, and never an exception.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from langchain_core.messages import ToolMessage
from langchain_core.tools import BaseTool

from tools.python import Limits, PythonTool
from tools.search import DdgsBackend, SearchBackend, SearchTool, open_library
from tools.text import clean, cut

BACKENDS = ("ddgs", "local")
_GRACE_S = 1.0  # a cancelled tool may tidy up for this long; then it is left behind


@dataclass(frozen=True)
class ToolOutcome:
    """What came of a call: `text` is for the policy; `artifact` (sources, exit code, backend) is for people."""

    text: str
    error: bool
    artifact: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


def build_tools(
    home: Path,
    search_backends: Sequence[str] = ("local",),
    unsafe: bool = False,
    code_timeout_s: float = 8.0,
    search_timeout_s: float = 6.0,
    documents: Path | None = None,
    max_results: int = 1,
    max_chars: int = 600,
) -> dict[str, BaseTool]:
    """The tools "code" and "search". Blocks for a second or two when the local index must be built under `home`.

    `search_backends` are asked in order, each "ddgs" (the web) or "local" (the bundled corpus and the .txt and .md
    files under `documents`). `unsafe` runs Python without a sandbox where bubblewrap doesn't work. `max_results` and
    `max_chars` bound a search's observation. ValueError names a backend that doesn't exist.
    """
    if unknown := [name for name in search_backends if name not in BACKENDS]:
        raise ValueError(f"There is no search backend {unknown[0]!r}; use one or more of {', '.join(BACKENDS)}.")
    if not search_backends:
        raise ValueError(f"No search backend is named; use one or more of {', '.join(BACKENDS)}.")
    backends: list[SearchBackend] = [
        DdgsBackend(timeout_s=search_timeout_s) if name == "ddgs" else open_library(home, documents)
        for name in search_backends
    ]
    limits = replace(Limits(), wall_s=code_timeout_s, cpu_s=max(1, min(Limits.cpu_s, round(code_timeout_s))))
    return {
        "code": PythonTool(limits=limits, unsafe_without_sandbox=unsafe),
        "search": SearchTool(backends=backends, max_results=max_results, max_chars=max_chars),
    }


async def call_tool(tool: BaseTool, input: str, timeout_s: float, max_chars: int) -> ToolOutcome:
    """Call a tool of one text argument. Raises nothing but its own cancellation, which the tool shares.

    `timeout_s` counts everything, waiting for a free sandbox too: leave it above the tool's own limit. A tool's
    artifact may say `error`; what isn't a dict is kept under `value`. `text` has at most `max_chars` characters and
    no control characters but line feeds and tabs.
    """
    began = time.monotonic()
    artifact: dict[str, Any]
    task = asyncio.create_task(_invoke(tool, input))
    try:
        await asyncio.wait({task}, timeout=timeout_s)
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
    return ToolOutcome(cut(clean(text), max_chars), error, artifact, time.monotonic() - began)


async def _invoke(tool: BaseTool, input: str) -> tuple[str, bool, dict[str, Any]]:
    """(text, error, artifact) of a call, with every exception made into text."""
    try:
        if len(tool.args) != 1:
            raise TypeError(f"The tool {tool.name} takes {len(tool.args)} arguments; a policy's action gives one.")
        (argument,) = tool.args
        call = {"type": "tool_call", "name": tool.name, "id": "1", "args": {argument: input}}
        message = await tool.ainvoke(call)
    except Exception as error:
        return f"{type(error).__name__}: {error}", True, {"exception": type(error).__name__}
    if not isinstance(message, ToolMessage):  # a tool may answer with what it likes
        return str(message), False, {}
    found = message.artifact
    artifact = found if isinstance(found, dict) else {} if found is None else {"value": found}
    return str(message.text), message.status == "error" or bool(artifact.get("error")), artifact
