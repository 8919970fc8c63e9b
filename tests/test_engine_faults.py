"""What goes wrong with an engine, as a client of the endpoint meets it: a status that fits, a reason, and a way out.

The product as `whetstone up` puts it together, attached to servers that answer as SGLang does. Other requests are
unharmed, and the record tells what happened.
"""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from app.api.app import create_app
from app.runtime import running_service
from app.server import bind, uvicorn_config
from app.service import Service
from app.settings import Settings
from tests.fakes import until
from tests.recorded_server import served
from tests.sglang_contract import RecordedSGLang
from tests.tiny_model import save_tiny_model

SILENCE_S = 2.0
WITHIN = 60.0  # seconds, of anything here, on a busy machine
CLOSED = {"done", "no_answer", "length"}


@dataclass
class World:
    client: httpx.AsyncClient
    service: Service
    servers: list[RecordedSGLang]
    home: Path

    def body(self, **more: Any) -> dict[str, Any]:
        return {"model": "whetstone", "messages": [{"role": "user", "content": "Hi"}], "seed": 1} | more

    async def ask(self, **more: Any) -> httpx.Response:
        return await self.client.post("/v1/chat/completions", json=self.body(**more))

    def last_turn(self) -> Any:
        return self.service.store.turns()[0]

    def publish(self, name: str, **manifest: Any) -> Path:
        """A copy of the version in service, under another name."""
        source = Path(self.service.store.version(self.service.router.current).path)
        folder = self.home / "versions" / name
        shutil.copytree(source, folder)
        told = json.loads((folder / "manifest.json").read_text()) | {"id": name} | manifest
        (folder / "manifest.json").write_text(json.dumps(told))
        self.service.store.add_version(name, None, str(folder), told, "published")
        return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny_model(tmp_path_factory.mktemp("tiny") / "model", 1)
    config = json.loads((folder / "config.json").read_text()) | {"max_position_embeddings": 8192}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@asynccontextmanager
async def world(model: Path, home: Path, workers: int = 1) -> AsyncIterator[World]:
    servers = [RecordedSGLang(model, incremental=True) for _ in range(workers)]
    async with AsyncExitStack() as stack:
        urls = [stack.enter_context(served(server.app())) for server in servers]
        settings = Settings(
            home=home, engine="sglang", engine_urls=urls, engine_admin_key="secret", python_pool=0,
            search_backends=["local"], max_tokens=48, max_turns=0, dialect="native",
            engine_silence_seconds=SILENCE_S, shutdown_seconds=2,
        )  # fmt: skip
        service = await stack.enter_async_context(running_service(settings))
        listening = bind("127.0.0.1", 0)
        server = uvicorn.Server(uvicorn_config(create_app(service, settings), settings))
        running = asyncio.create_task(server.serve([listening]))
        await until(lambda: server.started)
        base_url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        async with httpx.AsyncClient(base_url=base_url, timeout=WITHIN) as client:
            yield World(client, service, servers, home)
        server.should_exit = True
        await running


async def streamed(response: httpx.Response) -> list[Any]:
    lines = [line.removeprefix("data: ") async for line in response.aiter_lines() if line]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


async def test_one_that_hangs_is_told_in_time_before_and_amid_an_answer(model: Path, tmp_path: Path) -> None:
    async with asyncio.timeout(2 * WITHIN), world(model, tmp_path) as here:
        [server] = here.servers
        server.silent = True
        refused = await here.ask()
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "engine_unavailable"
        assert "has said nothing for 2 s" in refused.json()["error"]["message"]
        assert int(refused.headers["retry-after"]) > 0
        assert here.last_turn().status == "error"
        assert "has said nothing" in here.last_turn().error
        assert (await here.client.get("/healthz")).status_code == 503
        server.silent = False
        await until(lambda: not here.service.engine.workers[0].problem, WITHIN)  # type: ignore[attr-defined]
        assert (await here.client.get("/healthz")).status_code == 200
        assert (await here.ask()).status_code == 200

        at = server.generated
        hanging = asyncio.create_task(here.ask(stream=True))
        await until(lambda: server.generated > at + 3, WITHIN)
        server.silent = True  # before there is text to show, so that it still has a status of its own
        refused = await hanging
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_unavailable")
        assert here.last_turn().status == "error"
        assert here.service.in_flight == 0


async def _stream(here: World) -> list[Any]:
    async with here.client.stream("POST", "/v1/chat/completions", json=here.body(stream=True)) as response:
        assert response.status_code == 200
        return await streamed(response)


async def test_one_of_two_that_dies_costs_the_answer_that_it_wrote_and_no_other(model: Path, tmp_path: Path) -> None:
    async with asyncio.timeout(2 * WITHIN), world(model, tmp_path, workers=2) as here:
        here.servers[0].die_after = 3
        answers = await asyncio.gather(*(here.ask() for _ in range(4)))
        failed = [answer for answer in answers if answer.status_code != 200]
        assert 1 <= len(failed) < 4
        assert all(answer.json()["error"]["code"] == "engine_unavailable" for answer in failed)
        here.servers[0].die_after = None  # whoever runs it has started it again
        for _ in range(3):
            assert (await here.ask()).status_code == 200
        turns = here.service.store.turns()
        assert sum(turn.status == "error" for turn in turns) == len(failed)
        assert sum(turn.status in CLOSED for turn in turns) == 7 - len(failed)


async def test_one_with_other_weights_than_it_should_have_answers_nobody(model: Path, tmp_path: Path) -> None:
    async with asyncio.timeout(2 * WITHIN), world(model, tmp_path) as here:
        [server] = here.servers
        server.weight_version = "somebody's"
        refused = await here.ask()
        assert refused.status_code == 503
        assert "answers with weights" in here.last_turn().error
        assert (await here.ask(stream=True)).status_code == 503, "it stays drained"
        assert {turn.status for turn in here.service.store.turns()} == {"error"}
        server.weight_version = "default"
        await until(lambda: not here.service.engine.workers[0].problem, WITHIN)  # type: ignore[attr-defined]
        assert (await here.ask()).status_code == 200


async def test_a_swap_to_a_corrupt_or_a_foreign_adapter_changes_nothing(model: Path, tmp_path: Path) -> None:
    async with asyncio.timeout(2 * WITHIN), world(model, tmp_path) as here:
        router = here.service.router
        current = router.current
        (here.publish("rotten") / "adapter_model.safetensors").write_bytes(b"rot")
        here.publish("foreign", base="0" * 64)
        streaming = asyncio.create_task(_stream(here))
        for version, why in (("rotten", "was altered"), ("foreign", "was trained on base")):
            here.service.store.set_current(version, "test")
            await until(lambda version=version: version in router.refused, WITHIN)  # type: ignore[misc]
            assert why in router.refused[version]
            by_name = await here.ask(model=version)
            assert (by_name.status_code, by_name.json()["error"]["code"]) == (503, "version_corrupt")
            assert str(tmp_path) not in by_name.text
            others = await here.ask()
            assert (others.status_code, others.json()["model"]) == (200, current)
        assert (await streaming)[-1] == "[DONE]"
        assert set(here.servers[0].adapters) == {current}
        turns = here.service.store.turns()
        assert {turn.version for turn in turns} == {current}
        assert {turn.status for turn in turns} <= CLOSED


async def test_a_client_that_leaves_closes_its_turn_and_others_go_on(model: Path, tmp_path: Path) -> None:
    async with asyncio.timeout(2 * WITHIN), world(model, tmp_path) as here:
        [server] = here.servers
        server.may_run.clear()
        staying = asyncio.create_task(_stream(here))
        await until(lambda: server.running == 1, WITHIN)
        leaving = asyncio.create_task(_stream(here))
        await until(lambda: server.running == 2, WITHIN)
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)
        server.may_run.set()
        assert (await staying)[-1] == "[DONE]"
        await until(lambda: here.service.in_flight == 0 and server.running == 0, WITHIN)
        left, stayed = here.service.store.turns()
        assert stayed.status in CLOSED
        assert left.status in CLOSED | {
            "cancelled"
        }  # one that leaves before there is anything to send may be unnoticed
