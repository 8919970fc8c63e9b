"""Starts an engine's server, waits until it answers, starts it again when it crashes, and ends it.

It runs in a process group of its own, so that Ctrl-C reaches Whetstone first, and `_tied.py` kills that group when
Whetstone ends in whatever way. A crash loses the adapters; the engine gives them back when the server answers again.
What is particular to an engine's server is its `ServerConfig`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import signal
import socket
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import httpx

from serving.engines.base import EngineError

log = logging.getLogger(__name__)

_TAIL = 15  # lines of its log that an error shows
_STEADY_S = 300.0  # up for so long, a server's next crash is a first one again
_LONGEST_PAUSE_S = 60.0
_TERM_S = 15.0  # what it may take to end by itself


@dataclass(frozen=True)
class ServerConfig(ABC):
    """`model`: a transformers folder or a name on the hub. `max_lora_rank` 0: no LoRA; `max_loras`: in one batch.
    `python`: the interpreter of the environment where the engine is installed. `memory_fraction`: of the GPU's. `flags`
    go to the command as they are and win over the rest, as the last ones do. `log`: a file for what it prints; the last
    start's is kept beside it."""

    model: str
    log: Path
    python: str = sys.executable
    port: int = 0
    tensor_parallel: int = 1
    context: int | None = None
    max_lora_rank: int = 16
    max_loras: int = 4
    memory_fraction: float | None = None
    key: str | None = None
    flags: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    start_seconds: float = 1800.0

    name: ClassVar[str]  # of the engine, as people write it
    defaults: ClassVar[Mapping[str, str]] = {}  # its environment, over which that of Whetstone and `env` win

    @abstractmethod
    def command(self, port: int, keys: Path) -> list[str]:
        """`keys`: a file with the secrets, which a command line would show to every user of the machine."""

    @abstractmethod
    def keys(self, key: str) -> str:
        """What stands in that file. The server must take `key` for every route that it guards."""


def options(named: Sequence[tuple[str, object]]) -> list[str]:
    """As a command line: True is a flag alone, None and False are left out."""
    line: list[str] = []
    for name, value in named:
        line += [name] if value is True else [] if value is None or value is False else [name, str(value)]
    return line


class SupervisedServer:
    """One supervised server, at `url`; `key` is what its routes want."""

    def __init__(self, config: ServerConfig) -> None:
        self.config = config
        self.key = config.key or secrets.token_urlsafe(24)
        self.port = config.port or _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.starts = 0
        self.process: asyncio.subprocess.Process | None = None
        self._keys = config.log.with_suffix(".keys.yaml")
        self._watcher: asyncio.Task[None] | None = None

    async def start(self, progress: Callable[[str], None] = lambda _: None) -> None:
        """Start it and wait until it answers; `progress` hears what it prints meanwhile.

        Raises EngineError with the last lines of its log when it ends before, or isn't ready in time.
        """
        try:
            await self._spawn()
            await self._ready(progress)
        except BaseException:
            await self._end()
            raise
        self._watcher = asyncio.create_task(self._watch(), name=f"{self.config.name} watcher")

    async def stop(self) -> None:
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.wait({self._watcher})
        await self._end()

    async def _spawn(self) -> None:
        config = self.config
        config.log.parent.mkdir(parents=True, exist_ok=True)
        if config.log.exists():
            os.replace(config.log, config.log.with_suffix(".previous.log"))
        self._keys.unlink(missing_ok=True)
        with os.fdopen(os.open(self._keys, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as keys:
            keys.write(config.keys(self.key))
        environment = {**config.defaults, **os.environ, **config.env}
        command = config.command(self.port, self._keys)
        tied = [sys.executable, "-I", "-S", str(Path(__file__).with_name("_tied.py"))]
        self.starts += 1
        with config.log.open("wb") as output:
            try:
                self.process = await asyncio.create_subprocess_exec(
                    *tied, *command, stdin=asyncio.subprocess.PIPE, stdout=output, stderr=output,
                    env=environment, start_new_session=True, cwd=config.log.parent,
                )  # fmt: skip
            except OSError as error:
                raise EngineError(f"{config.name} can't be started: {error}") from error

    async def _ready(self, progress: Callable[[str], None]) -> None:
        assert self.process is not None
        began = time.monotonic()
        headers = {"Authorization": f"Bearer {self.key}"}
        async with httpx.AsyncClient(base_url=self.url, headers=headers, timeout=30, trust_env=False) as client:
            while True:
                if self.process.returncode is not None:
                    raise EngineError(self._failed(f"ended while it started (status {self.process.returncode})"))
                with contextlib.suppress(httpx.HTTPError):
                    if (await client.get("/health")).status_code == 200:
                        return
                if time.monotonic() - began > self.config.start_seconds:
                    raise EngineError(self._failed(f"wasn't ready after {self.config.start_seconds:g} s"))
                said = (self._tail(1) or ["starting"])[-1][:100]
                progress(f"{self.config.name}, {time.monotonic() - began:.0f} s: {said}")
                await asyncio.sleep(0.5)

    async def _watch(self) -> None:
        """Start it again after each crash, later each time, until it is stopped."""
        crashes = 0
        while True:
            assert self.process is not None
            began = time.monotonic()
            status = await self.process.wait()
            crashes = 1 if time.monotonic() - began > _STEADY_S else crashes + 1
            pause = min(2.0 ** (crashes - 1), _LONGEST_PAUSE_S)
            log.error("%s; it is started again in %g s", self._failed(f"crashed (status {status})"), pause)
            await self._end()
            await asyncio.sleep(pause)
            try:
                await self._spawn()
                await self._ready(lambda _: None)
            except EngineError as error:
                log.error("%s", error)
                await self._end()

    async def _end(self) -> None:
        """End the whole process group: asked first, then killed."""
        process = self.process
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGTERM)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(process.wait(), _TERM_S)
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
        self._keys.unlink(missing_ok=True)

    def _failed(self, what: str) -> str:
        lines = "\n  ".join(self._tail(_TAIL))
        return f"{self.config.name} ({self.config.python}) {what}. The end of {self.config.log}:\n  {lines}"

    def _tail(self, count: int) -> list[str]:
        with contextlib.suppress(OSError), self.config.log.open("rb") as file:
            file.seek(max(0, self.config.log.stat().st_size - 16_384))
            return [line for line in file.read().decode(errors="replace").splitlines() if line.strip()][-count:]
        return []


@contextlib.asynccontextmanager
async def running_server(
    config: ServerConfig, progress: Callable[[str], None] = lambda _: None
) -> AsyncIterator[SupervisedServer]:
    """A server that answers, supervised until the block ends. Raises EngineError when it can't be started."""
    server = SupervisedServer(config)
    await server.start(progress)
    try:
        yield server
    finally:
        await server.stop()


def _free_port() -> int:
    """The kernel gives it again to nobody else for a while; the server binds it within seconds."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])
