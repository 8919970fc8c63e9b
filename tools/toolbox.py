"""The one place where every tool is called from, and where all of them are held to the same rules.

A tool is one that the caller may use, gets arguments that fit its schema, has a budget of time (waiting for a place
counts) and of output, shares its owner's places with the owner's other calls, and leaves a line in the audit.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from langchain_core.tools import BaseTool

from tools.arguments import RESERVED, TOOL_NAME, BadArguments, ToolSchema, checked, schema_of
from tools.calling import ToolOutcome, call_tool, failed, guard
from tools.context import NOBODY, ToolContext, config_of
from tools.text import clean, cut

__all__ = ["Audit", "Budget", "ToolOutcome", "Toolbox"]

log = logging.getLogger(__name__)

Audit = Callable[[dict[str, Any]], None]
"""Takes one JSON-serialisable line. What it raises is logged, and costs nobody an answer."""


@dataclass(frozen=True)
class Budget:
    """Of one call. `fit` cuts a text to the tokens that the policy may read; `chars` goes first, since it is cheap."""

    seconds: float = 15.0
    chars: int = 2048
    fit: Callable[[str], str] = str


class Toolbox:
    """Tools by name, in the order in which prompts list them. One may be shared by agents and by event loops."""

    def __init__(
        self,
        tools: Iterable[BaseTool] = (),
        calls_per_owner: int = 8,
        audit: Audit | None = None,
        budget: Budget | None = None,
    ) -> None:
        """Raises ValueError, naming the tool, as `add` does."""
        self._kit = _Kit(calls_per_owner, audit)
        self._budget = budget or Budget()
        self.add(tools)

    def within(self, budget: Budget) -> Toolbox:
        """The same tools, places and audit, with another budget for each call."""
        box = Toolbox.__new__(Toolbox)
        box._kit, box._budget = self._kit, budget
        return box

    def add(self, tools: Iterable[BaseTool]) -> None:
        """More tools, or none of them: ValueError names one whose name is taken or unusable, or whose schema is.

        `admit_if` may have set a further condition.
        """
        more: dict[str, _Entry] = {}
        for tool in tools:
            if not TOOL_NAME.fullmatch(tool.name) or tool.name in RESERVED:
                raise ValueError(
                    f"A tool can't be called {tool.name[:80]!r}: a name has 1 to 64 of the characters A-Z, a-z, 0-9, _ "
                    f"and -, and isn't one of {', '.join(sorted(RESERVED))}."
                )
            if tool.name in more:
                raise ValueError(_taken(tool.name))
            more[tool.name] = _Entry(tool, schema_of(tool))
            guard(tool)
        self._kit.add(more)

    def admit_if(self, check: Callable[[list[ToolSchema]], None]) -> None:
        """From now on `add` raises the ValueError that `check` raises of all the schemas there would be then."""
        check(self.schemas())
        self._kit.check = check

    def discard(self, names: Collection[str]) -> None:
        """Take tools out; a call under way goes on."""
        self._kit.discard(names)

    def names(self, allowed: Collection[str] | None = None) -> tuple[str, ...]:
        """Those of the tools that are allowed; None allows all."""
        return tuple(name for name in self._kit.tools if allowed is None or name in allowed)

    def schemas(self, allowed: Collection[str] | None = None) -> list[ToolSchema]:
        """What a prompt says of the allowed tools."""
        tools = self._kit.tools
        return [entry.schema for name, entry in tools.items() if allowed is None or name in allowed]

    def __contains__(self, name: object) -> bool:
        return name in self._kit.tools

    def __getitem__(self, name: str) -> BaseTool:
        return self._kit.tools[name].tool

    async def call(
        self,
        name: str,
        arguments: str | Mapping[str, Any],
        context: ToolContext = NOBODY,
        allowed: Collection[str] | None = None,
    ) -> ToolOutcome:
        """Call a tool; a text is its only argument. Raises nothing but its own cancellation.

        `allowed` are the names that this caller may use, None for all; any other is as if it weren't there. Without an
        owner, as in training, calls wait for no place.
        """
        began = time.monotonic()
        outcome = failed("cancelled")  # unless it is replaced
        try:
            outcome = await self._call(name, arguments, context, allowed, began)
            return outcome
        finally:
            self._kit.write(name, arguments, context, replace(outcome, seconds=time.monotonic() - began))

    async def _call(
        self,
        name: str,
        arguments: str | Mapping[str, Any],
        context: ToolContext,
        allowed: Collection[str] | None,
        began: float,
    ) -> ToolOutcome:
        entry = self._kit.tools.get(name) if allowed is None or name in allowed else None
        if entry is None:
            return self._told(failed(_no_such_tool(name, self.names(allowed))))
        try:
            given = checked(entry.tool, entry.schema, arguments)
        except BadArguments as error:
            return self._told(failed(str(error), wrong_arguments=True))
        except Exception as error:  # a schema may hold code of the tool's own
            return self._told(failed(f"{type(error).__name__}: {error}", exception=type(error).__name__))
        seconds = self._budget.seconds
        async with self._kit.place(context.owner, seconds) as free:
            left = seconds - (time.monotonic() - began)
            if not free or left <= 0:
                return self._told(
                    failed(f"Too many tool calls at once: {self._kit.calls_per_owner} are running. Try again later.")
                )
            outcome = await call_tool(entry.tool, given, config_of(context), seconds, seconds - left)
        return self._told(outcome)

    def _told(self, outcome: ToolOutcome) -> ToolOutcome:
        text = cut(clean(outcome.text), self._budget.chars)
        return replace(outcome, text=self._budget.fit(text if text.strip() else "No output."))


@dataclass(frozen=True)
class _Entry:
    tool: BaseTool
    schema: ToolSchema


class _Kit:
    """What toolboxes of different budgets share."""

    def __init__(self, calls_per_owner: int, audit: Audit | None) -> None:
        self.tools: dict[str, _Entry] = {}
        self.calls_per_owner = calls_per_owner
        self.check: Callable[[list[ToolSchema]], None] = lambda schemas: None
        self._audit = audit
        self._places: dict[tuple[str, int], _Places] = {}
        self._lock = threading.Lock()

    def add(self, more: Mapping[str, _Entry]) -> None:
        with self._lock:
            if taken := more.keys() & self.tools.keys():
                raise ValueError(_taken(min(taken)))
            tools = {**self.tools, **more}  # a new dict: others may be reading the old one
            self.check([entry.schema for entry in tools.values()])
            self.tools = tools

    def discard(self, names: Collection[str]) -> None:
        with self._lock:
            self.tools = {name: entry for name, entry in self.tools.items() if name not in names}

    @asynccontextmanager
    async def place(self, owner: str, seconds: float) -> AsyncIterator[bool]:
        """Whether one of the owner's places came free in time; it is the caller's until the end of the block."""
        if not owner:
            yield True
            return
        key = (owner, id(asyncio.get_running_loop()))  # a semaphore belongs to one loop
        places = self._places.setdefault(key, _Places(asyncio.Semaphore(self.calls_per_owner)))
        places.users += 1
        try:
            try:
                async with asyncio.timeout(seconds):
                    await places.free.acquire()
            except TimeoutError:
                yield False
                return
            try:
                yield True
            finally:
                places.free.release()
        finally:
            places.users -= 1
            if not places.users:  # so that a million owners leave nothing behind
                self._places.pop(key, None)

    def write(self, name: str, arguments: str | Mapping[str, Any], context: ToolContext, outcome: ToolOutcome) -> None:
        if self._audit is None:
            return
        try:
            self._audit(_line(name, arguments, context, outcome))
        except Exception as error:  # a full disk mustn't cost the answer
            log.warning("a line of the audit is lost: %s: %s", type(error).__name__, error)


def _line(name: str, arguments: str | Mapping[str, Any], context: ToolContext, outcome: ToolOutcome) -> dict[str, Any]:
    text = arguments if isinstance(arguments, str) else json.dumps(dict(arguments), sort_keys=True, default=repr)
    return {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "owner": context.owner,
        "conversation_id": context.conversation_id,
        "turn_id": context.turn_id,
        "tool": clean(name)[:64],
        "input_sha256": hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest(),
        "input_chars": len(text),
        "output_chars": len(outcome.text),
        "error": outcome.error,
        "seconds": round(outcome.seconds, 3),
        "backend": outcome.artifact.get("backend"),
    }


@dataclass
class _Places:
    """The places of one owner, while any call of that owner is under way or waits."""

    free: asyncio.Semaphore
    users: int = 0


def _taken(name: str) -> str:
    return f"Two tools are called {name!r}: give one of them another name."


def _no_such_tool(name: str, names: tuple[str, ...]) -> str:
    if name in ("code", "search"):  # the policy's own words: it knows what they are
        return f"The tool {name} is off."
    known = f"The tools are: {', '.join(names)}." if names else "No tool is on."
    return f"There is no tool {clean(name)[:64]!r}. {known}"
