"""Many connections, slow ones and ones that are left, on a real port: nobody hangs, and the record is complete."""

from __future__ import annotations

import asyncio
import json
import socket
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from app.api.app import create_app
from app.connections import KEEP_ALIVE_SECONDS, PatientH11, raise_open_files
from app.server import uvicorn_config
from app.settings import Settings
from feedback_store import Store
from serving.model import BaseModel
from tests.fakes import ScriptedEngine, make_service, until

HELLO = {"model": "whetstone", "messages": [{"role": "user", "content": "hello"}]}
MANY = 1000
WITHIN = 120  # seconds, of anything here, on a busy machine


class Impatient(PatientH11):
    seconds = 0.5
    bytes_per_second = 1000.0
    reading_seconds = 0.5


@dataclass
class Served:
    port: int
    store: Store
    engine: ScriptedEngine


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes


@asynccontextmanager
async def serving(
    base: BaseModel,
    home: Path,
    http: type[PatientH11] = PatientH11,
    max_answers: int = 64,
    kernel_holds: int | None = None,
) -> AsyncIterator[Served]:
    settings = Settings(home=home, shutdown_seconds=5)
    listening = socket.create_server(("127.0.0.1", 0), backlog=2048)
    if kernel_holds is not None:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, kernel_holds)  # each connection has it from here
    with Store.open(home / "store.db") as store:
        service, engine = make_service(base, store, max_answers)
        config = uvicorn_config(create_app(service, settings), settings)
        assert config.http is PatientH11
        config.http = http
        server = uvicorn.Server(config)
        running = asyncio.create_task(server.serve([listening]))
        await until(lambda: server.started)
        yield Served(listening.getsockname()[1], store, engine)
        server.should_exit = True
        await running


async def connect(served: Served) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection("127.0.0.1", served.port)


async def small_buffered(served: Served) -> socket.socket:
    """A connection that holds little of what isn't read."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    client.setblocking(False)
    await asyncio.get_running_loop().sock_connect(client, ("127.0.0.1", served.port))
    return client


def asking(body: dict[str, Any]) -> bytes:
    payload = json.dumps(body).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(payload)}\r\n\r\n".encode() + payload


async def answered(reader: asyncio.StreamReader) -> Answer:
    """One whole answer. Raises IncompleteReadError where the connection ends in it."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode().splitlines()
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:] if line)}
    if "content-length" in headers:
        body = await reader.readexactly(int(headers["content-length"]))
    else:
        body = b""
        while size := int(await reader.readline(), 16):
            body += (await reader.readexactly(size + 2))[:-2]
        await reader.readline()
    return Answer(int(head[0].split()[1]), headers, body)


async def ask(served: Served, body: dict[str, Any]) -> Answer:
    reader, writer = await connect(served)
    try:
        writer.write(asking(body))
        return await answered(reader)
    finally:
        writer.close()


async def healthy(served: Served, seen: list[int], go_on: asyncio.Event) -> None:
    while not go_on.is_set():
        reader, writer = await connect(served)
        writer.write(b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        seen.append((await answered(reader)).status)
        writer.close()
        await asyncio.sleep(0.05)


async def test_a_thousand_connections_idle_and_asking(base: BaseModel, tmp_path: Path) -> None:
    if raise_open_files() < 2 * MANY + 500:
        pytest.skip("this machine doesn't let a process open so many files")
    async with asyncio.timeout(WITHIN), serving(base, tmp_path) as served:
        idle = [await connect(served) for _ in range(MANY // 2)]
        served.engine.delay = 0.01
        health: list[int] = []
        over = asyncio.Event()
        watching = asyncio.create_task(healthy(served, health, over))
        bodies = [{**HELLO, "stream": n % 2 == 0} for n in range(MANY // 2)]
        answers = await asyncio.gather(*(ask(served, body) for body in bodies))
        over.set()
        await watching
        statuses = Counter(answer.status for answer in answers)
        assert set(statuses) <= {200, 429}
        assert statuses[200] >= 64
        assert statuses[429] > 0
        for body, answer in zip(bodies, answers, strict=True):
            if answer.status == 429:
                assert int(answer.headers["retry-after"]) > 0
                assert json.loads(answer.body)["error"]["code"] == "overloaded"
            elif body["stream"]:
                assert answer.body.endswith(b"data: [DONE]\n\n")
            else:
                assert json.loads(answer.body)["choices"][0]["message"]["content"] == "Hello! How can I help?"
        assert set(health) == {200}
        assert served.store.stats()["turns"] == {"done": statuses[200]}, (
            "one turn each, all closed, none of refused ones"
        )
        for reader, writer in idle:  # they were left alone, and are served now
            writer.write(b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            assert (await answered(reader)).status == 200
            writer.close()


@pytest.mark.parametrize(
    ("begun", "status"),
    [
        (b"", None),
        (b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Slow: ", 408),
        (asking(HELLO)[:-5], 408),
    ],
    ids=["says nothing", "half a head", "half a body"],
)
async def test_one_who_asks_too_slowly_is_let_go(
    base: BaseModel, tmp_path: Path, begun: bytes, status: int | None
) -> None:
    async with asyncio.timeout(WITHIN), serving(base, tmp_path, Impatient) as served:
        reader, writer = await connect(served)
        writer.write(begun)
        told = await reader.read()
        assert told == b"" if status is None else told.startswith(b"HTTP/1.1 408 ")
        writer.close()
        assert (await ask(served, HELLO)).status == 200, "others are served"
        assert served.store.stats()["turns"] == {"done": 1}


async def test_a_steady_client_has_the_time_that_it_takes(base: BaseModel, tmp_path: Path) -> None:
    """Longer than the limit in all, on a kept connection too; and no limit falls on how long the answer takes."""
    async with asyncio.timeout(WITHIN), serving(base, tmp_path, Impatient) as served:
        reader, writer = await connect(served)
        served.engine.delay = 0.1
        for _ in range(2):
            request = asking({**HELLO, "messages": [{"role": "user", "content": "hello " * 400}]})
            for start in range(0, len(request), 400):
                writer.write(request[start : start + 400])
                await asyncio.sleep(0.12)
            assert (await answered(reader)).status == 200
        writer.close()


async def test_those_who_do_not_read_lose_their_places(base: BaseModel, tmp_path: Path) -> None:
    """Two clients with all places and full buffers are cut off; whoever reads, at its pace, gets the whole answer."""
    body = {**HELLO, "stream": True, "n": 2, "logprobs": True, "top_logprobs": 2, "max_tokens": 1500}
    async with asyncio.timeout(WITHIN), serving(base, tmp_path, Impatient, max_answers=4, kernel_holds=4096) as served:
        served.engine.script = lambda _: "<answer>" + "word " * 1200 + "</answer>"
        stuck = [await small_buffered(served) for _ in range(2)]
        for client in stuck:
            await asyncio.get_running_loop().sock_sendall(client, asking(body))
        await until(lambda: served.store.stats()["turns"] == {"cancelled": 4}, WITHIN)
        reader, writer = await asyncio.open_connection(sock=await small_buffered(served), limit=4096)
        writer.write(asking(body))
        read = b""
        while piece := await reader.read(32_768):
            read += piece
            if read.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n"):
                break
            await asyncio.sleep(0.005)
        assert len(read) > 100_000
        writer.close()
        for client in stuck:
            client.close()


async def test_too_large_a_head_is_refused(base: BaseModel, tmp_path: Path) -> None:
    async with asyncio.timeout(WITHIN), serving(base, tmp_path) as served:
        reader, writer = await connect(served)
        writer.write(b"GET / HTTP/1.1\r\n" + b"".join(b"X-%d: %b\r\n" % (n, b"x" * 1000) for n in range(100)))
        assert (await reader.readline()).startswith(b"HTTP/1.1 400")
        writer.close()


def test_connections_are_kept_longer_than_clients_keep_them() -> None:
    import httpx

    assert (httpx.Limits().keepalive_expiry or 0) + 60 < KEEP_ALIVE_SECONDS
