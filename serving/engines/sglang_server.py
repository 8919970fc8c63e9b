"""Starts an SGLang server, waits until it answers, starts it again when it crashes, and ends it.

It runs in a process group of its own, so that Ctrl-C reaches Whetstone first, and `_tied.py` kills that group when
Whetstone ends in whatever way. A crash loses the adapters;
`SGLangEngine` gives them back when the server answers again.
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
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from serving.engines.base import EngineError
from serving.model import LORA_TARGETS

log = logging.getLogger(__name__)

_TAIL = 15  # lines of its log that an error shows
_STEADY_S = 300.0  # up for so long, a server's next crash is a first one again
_LONGEST_PAUSE_S = 60.0
_TERM_S = 15.0  # what it may take to end by itself


@dataclass(frozen=True)
class ServerConfig:
    """`model`: a transformers folder or a name on the hub. `max_lora_rank` 0: no LoRA. `python`: the interpreter of
    the environment where SGLang is installed. `flags` go to the command as they are and win over the rest, as the last
    ones do. `log`: a file for what it prints; the last start's is kept beside it."""

    model: str
    log: Path
    python: str = sys.executable
    port: int = 0
    tensor_parallel: int = 1
    context: int | None = None
    max_lora_rank: int = 16
    lora_targets: tuple[str, ...] = LORA_TARGETS
    max_loras: int = 4
    memory_fraction: float | None = None
    memory_saver: bool = False
    deterministic: bool = False
    metrics: bool = True
    key: str | None = None
    flags: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    start_seconds: float = 1800.0

    def command(self, port: int, keys: Path) -> list[str]:
        """`keys`: a file with the secrets, which a command line would show to every user of the machine."""
        options: list[tuple[str, object]] = [
            ("--model-path", self.model), ("--host", "127.0.0.1"), ("--port", port), ("--config", keys),
            ("--tp-size", self.tensor_parallel), ("--context-length", self.context),
            ("--mem-fraction-static", self.memory_fraction),
            ("--enable-memory-saver", self.memory_saver), ("--enable-metrics", self.metrics),
            ("--enable-deterministic-inference", self.deterministic), ("--incremental-streaming-output", True),
            # JSON schemas are checked by this library, and a small policy may write blanks for ever.
            ("--grammar-backend", "llguidance"), ("--constrained-json-disable-any-whitespace", True),
        ]  # fmt: skip
        if self.max_lora_rank:
            options += [("--enable-lora", True), ("--max-lora-rank", self.max_lora_rank),
                        ("--max-loras-per-batch", self.max_loras)]  # fmt: skip
        command = [self.python, "-m", "sglang.launch_server"]
        for name, value in options:
            command += [name] if value is True else [] if value is None or value is False else [name, str(value)]
        if self.max_lora_rank:
            command += ["--lora-target-modules", *self.lora_targets]
        return [*command, *self.flags]


class SGLangServer:
    """One supervised server, at `url`, with `key` as its API key and admin key."""

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
        self._watcher = asyncio.create_task(self._watch(), name="SGLang watcher")

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
            keys.write(f"api-key: {self.key}\nadmin-api-key: {self.key}\n")
        environment = {"SGLANG_RETURN_ORIGINAL_LOGPROB": "1", **os.environ, **config.env}
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
                raise EngineError(f"SGLang can't be started: {error}") from error

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
                progress(f"SGLang, {time.monotonic() - began:.0f} s: {(self._tail(1) or ['starting'])[-1][:100]}")
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
        return f"SGLang ({self.config.python}) {what}. The end of {self.config.log}:\n  {lines}"

    def _tail(self, count: int) -> list[str]:
        with contextlib.suppress(OSError), self.config.log.open("rb") as file:
            file.seek(max(0, self.config.log.stat().st_size - 16_384))
            return [line for line in file.read().decode(errors="replace").splitlines() if line.strip()][-count:]
        return []


@contextlib.asynccontextmanager
async def running_server(
    config: ServerConfig, progress: Callable[[str], None] = lambda _: None
) -> AsyncIterator[SGLangServer]:
    """A server that answers, supervised until the block ends. Raises EngineError when it can't be started."""
    server = SGLangServer(config)
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
