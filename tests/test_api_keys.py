"""Keys, scopes, limits and origins, by the official client over a real port, and by the command line's own store."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import uvicorn
from openai.types.chat import ChatCompletionMessageParam

import app.keys
from app.api.app import create_app
from app.settings import Settings
from feedback_store import Store
from serving.model import BaseModel
from tests.fakes import ScriptedEngine, make_service

HELLO: list[ChatCompletionMessageParam] = [{"role": "user", "content": "hello"}]
SLOW: list[ChatCompletionMessageParam] = [{"role": "user", "content": "slow, please"}]


@dataclass
class Served:
    url: str
    store: Store
    engine: ScriptedEngine

    def client(self, key: str) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0)

    def http(self, key: str | None = None, **headers: str) -> httpx.AsyncClient:
        return httpx.AsyncClient(
            base_url=self.url, headers=({"Authorization": f"Bearer {key}"} if key else {}) | headers
        )


Serve = Callable[..., AbstractAsyncContextManager[Served]]


@pytest.fixture
def serve(base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Serve:
    monkeypatch.setattr(app.keys, "REFRESH_SECONDS", 0.0)

    @asynccontextmanager
    async def served(**knobs: Any) -> AsyncIterator[Served]:
        listening = socket.create_server(("127.0.0.1", 0))
        with Store.open(tmp_path / "store.db") as store:
            service, engine = make_service(base, store)
            config = uvicorn.Config(
                create_app(service, Settings(home=tmp_path, **knobs)), log_level="warning", timeout_graceful_shutdown=2
            )
            server = uvicorn.Server(config)
            serving = asyncio.create_task(server.serve([listening]))
            try:
                yield Served(f"http://127.0.0.1:{listening.getsockname()[1]}", store, engine)
            finally:
                server.should_exit = True
                await serving

    return served


async def test_a_key_of_the_store_opens_what_its_scopes_name(serve: Serve) -> None:
    async with serve() as served:
        key, secret = served.store.add_key("laptop", ["chat"])
        async with served.client(secret) as client, served.client("wsk-none") as stranger:
            answer = await client.chat.completions.create(model="whetstone", messages=HELLO)
            told: dict[str, Any] = (answer.model_extra or {})["whetstone"]
            assert served.store.conversation(told["conversation_id"]).owner == key.owner
            with pytest.raises(openai.AuthenticationError) as unknown:
                await stranger.models.list()
            assert unknown.value.code == "invalid_api_key"
            with pytest.raises(openai.PermissionDeniedError, match=r"laptop.*lacks the scope feedback") as lacking:
                await client.post("/feedback", body={"turn_id": told["turn_id"], "score": 1}, cast_to=dict)
            assert lacking.value.code == "missing_scope"
        assert served.store.api_keys()[0].last_used_at is not None or await _noted(served.store)


async def _noted(store: Store) -> bool:
    for _ in range(100):
        await asyncio.sleep(0.02)
        if store.api_keys()[0].last_used_at is not None:
            return True
    return False


async def test_a_revoked_and_an_expired_key_are_refused_and_open_nothing(serve: Serve) -> None:
    async with serve() as served:
        async with served.http() as nobody:
            assert (await nobody.get("/v1/models")).status_code == 200, "no key at all: this machine is served"
        _, secret = served.store.add_key("laptop", ["chat"])
        async with served.client(secret) as client, served.http() as nobody:
            await client.models.list()
            served.store.revoke_key("laptop")
            with pytest.raises(openai.AuthenticationError, match="was revoked"):
                await client.models.list()
            assert (await nobody.get("/v1/models")).status_code == 401, "the last key's end doesn't open the service"
            assert (await nobody.get("/healthz")).status_code == 200
            served.store.forget_keys("laptop")
            assert (await nobody.get("/v1/models")).status_code == 200


async def test_an_expired_key_says_so(serve: Serve, tmp_path: Path) -> None:
    async with serve() as served:
        past = datetime.now(UTC) - timedelta(days=9)
        with Store.open(tmp_path / "store.db", now=lambda: past) as then:
            _, secret = then.add_key("week", ["chat"], past + timedelta(days=7))
        async with served.client(secret) as client:
            with pytest.raises(openai.AuthenticationError, match="expired on"):
                await client.models.list()


async def test_keys_of_the_settings_chat_and_judge_and_do_no_more(serve: Serve) -> None:
    async with serve(api_keys="alice-secret") as served, served.client("alice-secret") as client:
        answer = await client.chat.completions.create(model="whetstone", messages=HELLO)
        turn_id = (answer.model_extra or {})["whetstone"]["turn_id"]
        await client.post("/feedback", body={"turn_id": turn_id, "score": 1}, cast_to=dict)


async def test_requests_a_minute_are_counted_by_key(serve: Serve) -> None:
    async with serve(requests_per_minute=3) as served:
        _, few = served.store.add_key("few", ["chat"])
        _, one = served.store.add_key("one", ["chat"], requests_per_minute=1)
        async with served.client(few) as client, served.client(one) as other:
            left = []
            for _ in range(3):
                answer = await client.models.with_raw_response.list()
                left.append(answer.headers["x-ratelimit-remaining-requests"])
            assert left == ["2", "1", "0"]
            with pytest.raises(openai.RateLimitError, match="its 3 requests") as refused:
                await client.models.list()
            assert refused.value.code == "rate_limit_exceeded"
            assert refused.value.type == "rate_limit_error"
            assert 1 <= int(refused.value.response.headers["retry-after"]) <= 60
            await other.models.list()
            with pytest.raises(openai.RateLimitError, match="its 1 requests"):
                await other.models.list()
            async with served.http(one) as watcher:
                assert (await watcher.get("/healthz")).status_code == 200


async def test_answers_at_once_are_counted_until_they_end(serve: Serve) -> None:
    async with serve(answers_per_key=1) as served:
        served.engine.delay = 0.01
        _, secret = served.store.add_key("one", ["chat"])
        _, more = served.store.add_key("two", ["chat"], answers_at_once=2)
        async with served.client(secret) as client, served.client(more) as other:
            stream = await client.chat.completions.create(model="whetstone", messages=SLOW, stream=True)
            with pytest.raises(openai.RateLimitError, match="1 answer under way") as refused:
                await client.chat.completions.create(model="whetstone", messages=HELLO)
            assert refused.value.code == "concurrency_limit_exceeded"
            assert refused.value.response.headers["retry-after"]
            with pytest.raises(openai.RateLimitError, match="1 answer under way"):
                await client.responses.create(model="whetstone", input="hello")
            await client.models.list()  # no answer: not held up
            both = [other.chat.completions.create(model="whetstone", messages=HELLO) for _ in range(2)]
            assert len(await asyncio.gather(*both)) == 2
            async for _ in stream:
                pass
            await client.chat.completions.create(model="whetstone", messages=HELLO)


async def test_each_of_several_answers_takes_a_place_of_its_keys(serve: Serve) -> None:
    async with serve(answers_per_key=3) as served:
        served.engine.delay = 0.01
        _, secret = served.store.add_key("three", ["chat"])
        async with served.client(secret) as client:
            create = client.chat.completions.create
            stream = await create(model="whetstone", messages=SLOW, stream=True)
            with pytest.raises(openai.RateLimitError, match="1 answer under way and asks for 3 more; its limit is 3"):
                await create(model="whetstone", messages=HELLO, n=3)
            assert len((await create(model="whetstone", messages=HELLO, n=2)).choices) == 2
            async for _ in stream:
                pass
            assert len((await create(model="whetstone", messages=HELLO, n=3)).choices) == 3
            with pytest.raises(openai.BadRequestError, match="may have 3 answers at once") as never:
                await create(model="whetstone", messages=HELLO, n=4)
            assert never.value.param == "n"


async def test_browsers_elsewhere_are_kept_out_unless_named(serve: Serve) -> None:
    asking = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    async with serve() as served, served.http(Origin="https://page.example") as page:
        closed = await page.options("/v1/chat/completions", headers=asking)
        assert closed.status_code == 403
        assert "access-control-allow-origin" not in (await page.get("/v1/models")).headers
    named = {"cors_origins": "https://page.example", "api_keys": "secret"}
    async with serve(**named) as served, served.http(Origin="https://page.example") as page:
        opened = await page.options("/v1/chat/completions", headers=asking)
        assert opened.headers["access-control-allow-origin"] == "https://page.example"
        refused = await page.get("/v1/models")
        assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, "https://page.example")
        other = await page.options("/v1/models", headers={**asking, "Origin": "https://evil.example"})
        assert "access-control-allow-origin" not in other.headers


async def test_any_origin_and_no_key_is_refused(serve: Serve) -> None:
    async with serve(cors_origins="*") as served, served.http() as page:
        assert (await page.get("/v1/models")).status_code == 401
