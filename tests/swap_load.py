"""A served tiny policy, its versions, and clients that stream from it while versions are swapped under them."""

from __future__ import annotations

import asyncio
import itertools
import json
import socket
import traceback
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import torch
import uvicorn

from app.api.app import create_app
from app.server import uvicorn_config
from app.service import Service
from app.settings import Settings
from feedback_store import Store
from online_rl.adapters import fresh_adapter, save_adapter, save_version
from serving.agent import Agent, Limits
from serving.dialects.native import NativeDialect
from serving.engines.llamacpp import LlamaCppEngine
from serving.model import BaseModel, export
from serving.versions import VersionRouter
from tests.tiny_model import tiny_model, tiny_tokenizer
from tools.toolbox import Toolbox

VERSIONS = ("v0", "v1", "v2", "v3")
ANSWER_TOKENS = 180  # a text is streamed from its 160th character on, a token is one at most
TURNS = 3  # of one conversation


def make_versions(folder: Path) -> tuple[BaseModel, dict[str, Any]]:
    """A random base and versions of it that differ as much as strangers, as {id: the trainer's model}."""
    base = export(tiny_model(), tiny_tokenizer(), "tiny", folder)
    models = {}
    for seed, version in enumerate(VERSIONS):
        model = fresh_adapter(base, 8, 16, "float32").eval()
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
        save_version(
            lambda work, model=model: save_adapter(model, work), folder / "versions" / version, base, parent=None
        )
        models[version] = model
    return base, models


@dataclass
class Answer:
    """What a client saw of one answer: the versions named in the header and in the chunks."""

    conversation: str
    turn: str
    header: str
    chunks: set[str]
    whole: bool


@dataclass
class Seen:
    answers: list[Answer] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    @property
    def versions(self) -> set[str]:
        return {answer.header for answer in self.answers}


@asynccontextmanager
async def serving(
    base: BaseModel, home: Path, slots: int, idle_s: float
) -> AsyncIterator[tuple[str, Store, Service, VersionRouter]]:
    """The endpoint on a port of its own: (URL, store, service, router)."""
    with Store.open(home / "whetstone.db") as store:
        for version in VERSIONS:
            folder = base.hf_dir.parent / "versions" / version
            store.add_version(version, None, str(folder), {}, "published")
        store.set_current("v0", "test")
        engine = LlamaCppEngine(base, slots=slots, context=512, threads=1)
        router = VersionRouter(store, engine, base.fingerprint, poll_s=0.2, idle_s=idle_s)
        await router.start()
        limits = Limits(max_turns=0, answer_tokens=ANSWER_TOKENS)
        agent = Agent(engine, NativeDialect(base.tokenizer), Toolbox([]), limits)
        service = Service(store, router, agent, engine, max_answers=64)
        listening = socket.create_server(("127.0.0.1", 0))
        app = create_app(service, Settings(home=home))
        server = uvicorn.Server(uvicorn_config(app, Settings(home=home, shutdown_seconds=5)))
        running = asyncio.create_task(server.serve([listening]))
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}", store, service, router
        finally:
            server.should_exit = True
            await running
            await router.close()
            await engine.close()


async def clients(url: str, count: int, go_on: Callable[[], bool], seen: Seen) -> None:
    """`count` clients that hold one conversation after the other; each ends the answer that it has begun."""
    limits = httpx.Limits(max_connections=count)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
        await asyncio.gather(*(_converse(client, number, go_on, seen) for number in range(count)))


async def swaps(store: Store, every_s: float, go_on: Callable[[], bool]) -> int:
    """Put another version in service again and again, as a run in another process does it; returns how often."""
    done = 0
    for version in itertools.cycle(VERSIONS[1:] + VERSIONS[:1]):
        await asyncio.sleep(every_s)
        if not go_on():
            break
        await asyncio.to_thread(store.set_current, version, "swap test")
        done += 1
    return done


async def _converse(client: httpx.AsyncClient, number: int, go_on: Callable[[], bool], seen: Seen) -> None:
    for conversation in itertools.count():
        going_on: str | None = None
        for turn in range(TURNS):
            if not go_on():
                return
            try:
                answer = await _ask(client, f"{number}.{conversation}.{turn}", going_on)
            except Exception as error:
                seen.failures.append("".join(traceback.format_exception(error)))
                return
            seen.answers.append(answer)
            going_on = answer.conversation


async def _ask(client: httpx.AsyncClient, question: str, conversation: str | None) -> Answer:
    body: dict[str, Any] = {
        "model": "whetstone", "messages": [{"role": "user", "content": question}], "stream": True, "temperature": 1,
    }  # fmt: skip
    if conversation is not None:
        body["metadata"] = {"conversation_id": conversation}
    chunks: list[dict[str, Any]] = []
    ended = False
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.status_code != 200:
            raise AssertionError(f"{response.status_code}: {(await response.aread()).decode()}")
        async for line in response.aiter_lines():
            if line == "data: [DONE]":
                ended = True
            elif line:
                chunk = json.loads(line.removeprefix("data: "))
                if "error" in chunk:
                    raise AssertionError(chunk["error"]["message"])
                chunks.append(chunk)
        header = response.headers["x-whetstone-version"]
    ids = chunks[0]["whetstone"]
    named = {chunk["model"] for chunk in chunks} | {c["whetstone"]["version"] for c in (chunks[0], chunks[-1])}
    return Answer(ids["conversation_id"], ids["turn_id"], header, named, ended)
