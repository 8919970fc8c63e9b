"""One engine's server over HTTP: patience with it, its streams, and what goes wrong on the way.

An engine's own worker says which routes there are and what a refusal means.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Awaitable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import httpx

from serving.engines.base import EngineError, trace_headers

T = TypeVar("T")


class WorkerFailed(EngineError):
    """A server can't be reached, hangs or answers nonsense. Another one may answer instead."""


class Silent(WorkerFailed):
    """A server took a request and doesn't answer it: it hangs, or is paused."""


class Refused(EngineError):
    """A server understood the request and won't do it."""


class AdapterGone(Refused):
    """A server doesn't know an adapter that it had been given: it was started anew."""


@dataclass(frozen=True)
class Patience:
    """Seconds: to connect, for a server to say nothing in mid-answer, for it to load weights, between two looks."""

    connect: float = 5.0
    silence: float = 120.0
    control: float = 600.0
    look: float = 5.0


@dataclass(frozen=True)
class Description:
    """What a server says that it is. `context`: tokens of prompt and answer together. `seeded`: seeds have effect.

    `max_lora_rank` None: it takes no adapters. `lora_targets`: the modules that adapters may change, none: any.
    """

    model_path: str
    context: int
    seeded: bool
    max_lora_rank: int | None
    lora_targets: frozenset[str]


class HttpWorker(ABC):
    """`problem` says why it gets no requests; empty when it does.

    `paused` is set while its weights are being changed: silence is then no failure.
    """

    name: ClassVar[str]
    version: ClassVar[str]  # that this was written against

    def __init__(self, url: str, key: str | None = None, patience: Patience | None = None) -> None:
        self.url = url.rstrip("/")
        self.problem = "it hasn't been asked yet"
        self.in_flight = 0
        self.paused = False
        self.missed = 0  # looks in a row that it didn't answer
        self._patience = patience or Patience()
        self._client = httpx.AsyncClient(
            base_url=self.url,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(self._patience.connect, read=None, pool=None),
            # A connection is let go before the server does it, after five seconds: a request may be on its way then.
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=2),
            trust_env=False,  # an engine is reached directly, never through a proxy for the web
        )

    async def close(self) -> None:
        await self._client.aclose()

    async def look(self) -> None:
        """Ask whether it is well. Raises WorkerFailed when it doesn't say so."""
        await self._call("GET", "/health", seconds=30)

    async def wake(self) -> bool:
        """Let one go on that was left paused, where a server can be; whether it was asked to."""
        return False

    async def adapters(self) -> dict[str, str]:
        """The adapters that it holds: path by name."""
        with self._failures():
            models = await self._call("GET", "/v1/models")
            return {card["id"]: card["root"] for card in models["data"] if card.get("parent")}

    @abstractmethod
    async def load_adapter(self, name: str, path: str) -> None:
        """One that is there already, from an earlier Whetstone, is well. Raises Refused when it can't be used,
        WorkerFailed when the server doesn't then report it."""

    @abstractmethod
    async def unload_adapter(self, name: str) -> None:
        """One that isn't there is well too."""

    @abstractmethod
    async def probe(self, temperature: float) -> list[float]:
        """Logprobs of the bare model after a fixed prompt, of the same tokens whatever the temperature."""

    @abstractmethod
    def refusal(self, status: int, text: str) -> EngineError:
        """What an answer of this status means."""

    async def stream(self, route: str, body: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """The events of a streamed answer. Raises WorkerFailed, and what `refusal` makes of an error."""
        stack = contextlib.AsyncExitStack()
        async with stack:
            with self._failures():
                traced = dict(trace_headers.get() or {})
                sending = stack.enter_async_context(self._client.stream("POST", route, json=body, headers=traced))
                response = await self._soon(sending)
                if response.status_code != 200:
                    raise self.refusal(response.status_code, (await self._soon(response.aread())).decode("utf8"))
                pieces = response.aiter_bytes()
                rest = b""
                while piece := await self._soon(anext(pieces, b"")):
                    # Not by aiter_lines: it splits at every Unicode line break, which JSON may hold as it is.
                    *lines, rest = (rest + piece).split(b"\n")
                    for line in lines:
                        if line.startswith(b"data: ") and line != b"data: [DONE]":
                            event = json.loads(line[6:])
                            if "error" in event:
                                raise self.refusal(event["error"].get("code", 400), event["error"]["message"])
                            yield event

    async def _soon(self, step: Awaitable[T]) -> T:
        """Its result, unless the server says nothing for too long while it isn't paused."""
        task = asyncio.ensure_future(step)
        try:
            while not (await asyncio.wait({task}, timeout=self._patience.silence))[0]:
                if not self.paused:
                    raise Silent(f"{self.name} at {self.url} has said nothing for {self._patience.silence:g} s.")
            return task.result()
        finally:
            if not task.done():
                task.cancel()
                await asyncio.wait({task})

    async def _call(
        self, method: str, route: str, body: dict[str, Any] | None = None, seconds: float = 20
    ) -> dict[str, Any]:
        timeout = httpx.Timeout(self._patience.connect, read=seconds, pool=None)
        with self._failures():
            response = await self._client.request(method, route, json=body, timeout=timeout)
            if response.status_code != 200:
                raise self.refusal(response.status_code, response.text)
            try:
                answer = response.json()
            except ValueError:
                return {}  # some routes answer with a line for people
            return answer if isinstance(answer, dict) else {}

    @contextlib.contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            yield
        except httpx.ReadTimeout as error:
            raise Silent(f"{self.name} at {self.url} says nothing (ReadTimeout). Does it hang?") from error
        except httpx.HTTPError as error:
            told = str(error) or type(error).__name__
            raise WorkerFailed(f"{self.name} at {self.url} can't be used ({told}). Is it running?") from error
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise WorkerFailed(
                f"{self.name} at {self.url} answers what {self.name} {self.version} doesn't: {error!r}"
            ) from error


def message(text: str) -> str:
    """What an answer says, out of the several shapes in which servers say it."""
    with contextlib.suppress(ValueError):
        said = json.loads(text)
        for key in ("error", "message", "error_message", "detail"):
            if isinstance(said, dict) and said.get(key):
                said = said[key]
        text = said if isinstance(said, str) else json.dumps(said)
    return text.strip()[:500]
