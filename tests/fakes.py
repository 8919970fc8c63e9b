"""An engine that says what a test wants, a router of one version, and a service around them with real other parts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from langchain_core.tools import BaseTool

from app.service import Service
from app.tracing import Tracing
from feedback_store import Store
from serving.agent import Agent
from serving.dialects.tapo import TapoDialect
from serving.engines.base import EngineError, GenerateRequest, TokenChunk, UnknownVersion
from serving.model import BaseModel
from tools.python import PythonTool
from tools.search import SearchTool, open_library
from tools.toolbox import Toolbox
from tools.workspace import Workspaces

Script = Callable[[str], str]  # the context's text -> what the policy writes next


class ScriptedEngine:
    """Writes `script(context)`, a few tokens a chunk. `delay`: seconds between chunks; `dead`: every request fails."""

    def __init__(self, tokenizer: object, script: Script, context: int = 2048) -> None:
        self._tokenizer = tokenizer
        self._context = context
        self._loaded = ["v0"]
        self.script = script
        self.delay = 0.0
        self.dead = False
        self.dies_after: int | None = None  # chunks
        self.aborted = 0
        self.chunks = 0
        self.requests: list[GenerateRequest] = []
        self.weights: str | None = None
        self.can_swap = True

    @property
    def context_length(self) -> int:
        return self._context

    async def generate(self, request: GenerateRequest) -> AsyncIterator[TokenChunk]:
        if self.dead:
            raise EngineError("The engine has stopped: restart it with `whetstone up`.")
        if request.version not in self._loaded:
            raise UnknownVersion(f"Version {request.version!r} isn't loaded.")
        self.requests.append(request)
        text = self.script(self._tokenizer.decode(request.token_ids))  # type: ignore[attr-defined]
        ids = self._tokenizer.encode(text, add_special_tokens=False)  # type: ignore[attr-defined]
        cut = ids[: request.sampling.max_tokens]
        finished = False
        try:
            for number, start in enumerate(range(0, len(cut), 3)):
                if self.dies_after is not None and number >= self.dies_after:
                    raise EngineError("The engine died in the middle of an answer: restart it with `whetstone up`.")
                await asyncio.sleep(self.delay)
                part = cut[start : start + 3]
                self.chunks += 1
                tops = [[(id_, -0.1), (0, -5.0)][: request.top_logprobs] for id_ in part]
                told = None if request.top_logprobs is None else tops
                yield TokenChunk(part, [-0.1] * len(part), request.version, None, told)
            finished = True
            stopped = any(text.endswith(tag) for tag in request.stop)
            reason = "length" if len(cut) < len(ids) else "stop" if stopped else "eos"
            yield TokenChunk([], [], request.version, reason)
        finally:
            self.aborted += not finished

    async def load(self, version: str, path: Path | None) -> None:
        self._loaded.append(version)

    async def swap(self, version: str | None, path: Path | None) -> None:
        if version and not self.can_swap:
            raise EngineError("this engine can't")
        self.weights = version
        self._loaded = [version] if version else []

    async def unload(self, version: str) -> None:
        self._loaded.remove(version)

    def loaded(self) -> list[str]:
        return list(self._loaded)

    async def health(self) -> dict[str, object]:
        return {"ok": not self.dead, "engine": "scripted"}

    async def close(self) -> None:
        self._loaded.clear()


class FixedRouter:
    """Always the same version, and the others that the engine has by name."""

    def __init__(self, engine: ScriptedEngine, current: str = "v0") -> None:
        self._engine = engine
        self.current = current
        self.leases = 0

    def loaded(self) -> list[str]:
        return self._engine.loaded()

    @asynccontextmanager
    async def lease(
        self, version: str | None = None, owner: str = "", conversation_id: str | None = None
    ) -> AsyncIterator[str]:
        version = version or self.current
        if version not in self._engine.loaded():
            raise UnknownVersion(f"Version {version!r} isn't loaded.")
        self.leases += 1
        try:
            yield version
        finally:
            self.leases -= 1


async def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    """Wait for something that another task or process does; fails when it never comes."""
    for _ in range(int(seconds / 0.02)):
        if condition():
            return
        await asyncio.sleep(0.02)
    raise AssertionError(f"it didn't happen within {seconds} s")


def calculator(context: str) -> str:
    """A policy that multiplies in Python, and otherwise greets."""
    tail = context[context.rfind("<|im_start|>user") :]
    if "<response>" in tail:
        if "Mongolia" in tail:
            return "<think>It says so.</think><answer>Ulaanbaatar <img src=x onerror=alert(1)></answer>"
        result = tail[tail.rfind("<response>") + len("<response>") :].split("</response>")[0].strip()
        return f"<think>Python says so.</think><answer>The result is {result}.</answer>"
    if "Mongolia" in tail:
        return "<think>I will look it up.</think><search>capital of Mongolia</search>"
    if "slow" in tail:
        return "<think>Counting.</think><answer>" + "one two three four five " * 40 + "</answer>"
    if "*" in tail:
        return "<think>I will multiply.</think><code>print(6 * 7)</code>"
    return "<think>A greeting.</think><answer>Hello! How can I help?</answer>"


def make_service(
    base: BaseModel,
    store: Store,
    max_answers: int = 8,
    documents: Path | None = None,
    workspaces: Workspaces | None = None,
    code: BaseTool | None = None,
    more: Sequence[BaseTool] = (),
    key_tools: Mapping[str, Sequence[str]] | None = None,
    tracing: Tracing | None = None,
) -> tuple[Service, ScriptedEngine]:
    """`documents`: a folder for the index of the search tool; without it the agent has Python only, or `code`."""
    engine = ScriptedEngine(base.tokenizer, calculator)
    tools: list[BaseTool] = [code or PythonTool(), *more]
    if documents is not None:
        tools.append(SearchTool(backends=[open_library(documents)]))
    agent = Agent(engine, TapoDialect(base.tokenizer), Toolbox(tools))
    router = FixedRouter(engine)
    service = Service(store, router, agent, engine, max_answers, workspaces, key_tools, tracing)  # type: ignore[arg-type]
    return service, engine
