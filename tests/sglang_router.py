"""sglang-router itself, from the environment of SGLang, in front of servers of a test."""

from __future__ import annotations

import asyncio
import functools
import os
import socket
import subprocess
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import httpx

PYTHON = os.environ.get("WHETSTONE_SGLANG_PYTHON", "")


@functools.cache
def has_router() -> bool:
    if not PYTHON:
        return False
    return subprocess.run([PYTHON, "-c", "import sglang_router"], capture_output=True, check=False).returncode == 0


@asynccontextmanager
async def running_router(urls: Sequence[str], key: str, log: Path, *flags: str) -> AsyncIterator[str]:
    """Its URL, once it has taken all the workers."""
    ports = []
    for _ in range(2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            ports.append(str(free.getsockname()[1]))
    command = [
        PYTHON, "-m", "sglang_router.launch_router", "--host", "127.0.0.1", "--port", ports[0],
        "--prometheus-port", ports[1], "--api-key", key, "--worker-startup-check-interval", "1",
        "--worker-urls", *urls, *flags,
    ]  # fmt: skip
    url = f"http://127.0.0.1:{ports[0]}"
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(*command, stdout=output, stderr=output)
    try:
        headers = {"Authorization": f"Bearer {key}"}
        async with (
            asyncio.timeout(120),
            httpx.AsyncClient(base_url=url, headers=headers, trust_env=False) as client,
        ):
            while await _fit(client) < len(urls):
                assert process.returncode is None, f"the router has ended: see {log}"
                await asyncio.sleep(0.2)
        yield url
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def _fit(client: httpx.AsyncClient) -> int:
    try:
        workers = (await client.get("/workers")).json()["workers"]
    except (httpx.HTTPError, ValueError, KeyError):
        return 0
    return sum(worker["is_healthy"] for worker in workers)
