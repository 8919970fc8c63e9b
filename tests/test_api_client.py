"""The endpoint over a real port, by the official client: what a user's program meets."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import openai
import pytest
import uvicorn

from app.api.app import create_app
from app.settings import Settings
from feedback_store import Store
from serving.model import BaseModel
from tests.fakes import ScriptedEngine, make_service, until

SUM: list[openai.types.chat.ChatCompletionMessageParam] = [{"role": "user", "content": "What is 6 * 7?"}]
SLOW: list[openai.types.chat.ChatCompletionMessageParam] = [{"role": "user", "content": "slow, please"}]


@dataclass
class Served:
    client: openai.AsyncOpenAI
    store: Store
    engine: ScriptedEngine
    url: str


@pytest.fixture
async def served(base: BaseModel, tmp_path: Path) -> AsyncIterator[Served]:
    listening = socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
    with Store.open(tmp_path / "store.db") as store:
        service, engine = make_service(base, store)
        app = create_app(service, Settings(home=tmp_path))
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2))
        serving = asyncio.create_task(server.serve([listening]))
        async with openai.AsyncOpenAI(base_url=url, api_key="any", max_retries=0) as client:
            yield Served(client, store, engine, url)
        server.should_exit = True
        await serving


async def test_whole_and_streamed_answers(served: Served) -> None:
    whole = await served.client.chat.completions.create(model="whetstone", messages=SUM)
    assert whole.choices[0].message.content == "The result is 42."
    assert whole.model == "v0"
    assert whole.usage is not None
    assert whole.usage.completion_tokens > 0
    assert (whole.model_extra or {})["whetstone"]["steps"][0]["action"] == "code"

    stream = await served.client.chat.completions.create(
        model="whetstone", messages=SUM, stream=True, stream_options={"include_usage": True}
    )
    text, usage = "", None
    async for chunk in stream:
        text += "".join(choice.delta.content or "" for choice in chunk.choices)
        usage = chunk.usage or usage
    assert text == "The result is 42."
    assert usage == whole.usage


async def test_text_arrives_while_it_is_written(served: Served) -> None:
    served.engine.delay = 0.02
    stream = await served.client.chat.completions.create(model="whetstone", messages=SLOW, stream=True)
    async for chunk in stream:
        if chunk.choices[0].delta.content:
            break
    assert served.store.turns()[0].status == "running"
    await stream.close()


async def test_models_and_metadata(served: Served) -> None:
    models = await served.client.models.list()
    assert models.data[0].id == "whetstone"
    judged = await served.client.chat.completions.create(
        model="whetstone", messages=SUM, metadata={"verifier": "numeric", "gold": "42"}
    )
    assert (judged.model_extra or {})["whetstone"]["outcome"]["score"] == 1.0


async def test_errors_are_the_clients_own_exceptions(served: Served) -> None:
    create = served.client.chat.completions.create
    with pytest.raises(openai.NotFoundError) as unknown:
        await create(model="gpt-5", messages=SUM)
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as long:
        await create(model="whetstone", messages=[{"role": "user", "content": "word " * 5000}])
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as tools:
        await create(model="whetstone", messages=SUM, n=9)
    assert tools.value.param == "n"
    served.engine.dead = True
    with pytest.raises(openai.InternalServerError) as dead:
        await create(model="whetstone", messages=SUM)
    assert dead.value.status_code == 503


async def test_an_error_midway_is_raised_by_the_client(served: Served) -> None:
    served.engine.dies_after = 6
    stream = await served.client.chat.completions.create(model="whetstone", messages=SUM, stream=True)
    with pytest.raises(openai.APIError, match="died in the middle"):
        async for _ in stream:
            pass


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_goes_away_cancels_and_leaves_a_closed_turn(served: Served, stream: bool) -> None:
    served.engine.delay = 0.05
    asking = asyncio.create_task(_ask(served, stream))
    await until(lambda: served.engine.chunks > 8)
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    await until(lambda: served.store.turns()[0].status != "running")
    turn = served.store.turns()[0]
    assert turn.status == "cancelled"
    assert turn.answer.startswith("one")
    assert served.engine.aborted == 1


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_goes_away_before_the_first_token_cancels_at_once(served: Served, stream: bool) -> None:
    served.engine.delay = 3600  # no event will come
    asking = asyncio.create_task(_ask(served, stream))
    await until(lambda: len(served.engine.requests) == 1)
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    await until(lambda: served.store.turns()[0].status == "cancelled")
    assert served.engine.aborted == 1


async def _ask(served: Served, stream: bool) -> None:
    if stream:
        async for _ in await served.client.chat.completions.create(model="whetstone", messages=SLOW, stream=True):
            pass
    else:
        await served.client.chat.completions.create(model="whetstone", messages=SLOW)
