"""One SGLang server over HTTP: what its routes take and answer, and what goes wrong on the way.

Written against SGLang 0.5.23. `serving/engines/sglang.py` makes an engine of one or several of these.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Awaitable
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx

from serving.engines.base import EngineError, GrammarFailed, PromptTooLong

T = TypeVar("T")

_PROBE = [3, 5, 7, 11]  # token ids that every vocabulary has
_TOO_LONG = ("context length", "too long", "longer than", "maximum allowed length")
_ANY_TOKEN_ID = 1 << 30


class WorkerFailed(EngineError):
    """A server can't be reached, hangs or answers nonsense. Another one may answer instead."""


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
    """What a server says that it is. `context`: tokens of prompt and answer together. `seeded`: seeds have effect."""

    model_path: str
    tokenizer_path: str
    weight_version: str
    context: int
    seeded: bool
    max_lora_rank: int | None
    lora_targets: frozenset[str]


class Worker:
    """`problem` says why it gets no requests; empty when it does. `label` is the weight version that it should report.

    `paused` is set while its weights are being changed: silence is then no failure.
    """

    def __init__(self, url: str, key: str | None = None, patience: Patience | None = None) -> None:
        self.url = url.rstrip("/")
        self.problem = "it hasn't been asked yet"
        self.label = ""
        self.in_flight = 0
        self.paused = False
        self.missed = 0  # looks in a row that it didn't answer
        self._patience = patience or Patience()
        self._client = httpx.AsyncClient(
            base_url=self.url,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(self._patience.connect, read=None, pool=None),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=64),
            trust_env=False,  # an engine is reached directly, never through a proxy for the web
        )

    async def close(self) -> None:
        await self._client.aclose()

    async def look(self) -> None:
        """Have it generate a token. Raises WorkerFailed when it doesn't."""
        await self._call("GET", "/health", seconds=30)

    async def describe(self) -> Description:
        with self._failures():
            info = await self._call("GET", "/model_info")
            server = await self._call("GET", "/server_info")
            models = await self._call("GET", "/v1/models")
            lengths = [card["max_model_len"] for card in models["data"] if card.get("max_model_len")]
            pool = server.get("max_total_num_tokens") or _ANY_TOKEN_ID
            if not lengths:
                raise WorkerFailed(f"SGLang at {self.url} tells no max_model_len in /v1/models: is it SGLang 0.5.23?")
            return Description(
                info["model_path"],
                info["tokenizer_path"],
                info["weight_version"],
                min(*lengths, pool),
                bool(server.get("enable_deterministic_inference")),
                server.get("max_lora_rank") if server.get("enable_lora") else None,
                frozenset(server.get("lora_target_modules") or ()),
            )

    async def adapters(self) -> dict[str, str]:
        """The adapters that it holds: path by name."""
        with self._failures():
            models = await self._call("GET", "/v1/models")
            return {card["id"]: card["root"] for card in models["data"] if card.get("parent")}

    async def load_adapter(self, name: str, path: str) -> None:
        """One that is there already, from an earlier Whetstone, is well. Raises Refused when it can't be used,
        WorkerFailed when the server doesn't then report it."""
        if (await self.adapters()).get(name) == path:
            return
        answer = await self._control("/load_lora_adapter", {"lora_name": name, "lora_path": path})
        if (answer.get("loaded_adapters") or {}).get(name) != path:
            raise WorkerFailed(f"SGLang at {self.url} took adapter {name!r} and doesn't report it: {answer}")

    async def unload_adapter(self, name: str) -> None:
        with contextlib.suppress(Refused):  # it isn't there, which is what is wanted
            await self._control("/unload_lora_adapter", {"lora_name": name})

    async def pause(self) -> None:
        """Stop generating; what is in flight waits, its KV cache dropped."""
        await self._control("/pause_generation", {"mode": "retract"})

    async def resume(self) -> None:
        await self._control("/continue_generation", {})

    async def update_weights(self, path: str, label: str) -> None:
        await self._control(
            "/update_weights_from_disk", {"model_path": path, "weight_version": label, "flush_cache": True}
        )

    async def probe(self, temperature: float = 1.0, prompt: list[int] | None = None) -> list[float]:
        """The bare model's logprobs of fixed tokens after a fixed prompt: a fingerprint of the weights."""
        body = {
            "input_ids": prompt or _PROBE,
            "sampling_params": {"max_new_tokens": 1, "temperature": temperature, "ignore_eos": True},
            "return_logprob": True,
            "token_ids_logprob": _PROBE,
        }
        answer = await self._call("POST", "/generate", body, self._patience.silence)
        try:
            return [float(logprob) for logprob, *_ in answer["meta_info"]["output_token_ids_logprobs"][0]]
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise WorkerFailed(f"SGLang at {self.url} gives no logprobs: {str(answer)[:300]}") from error

    async def abort(self, rid: str) -> None:
        with contextlib.suppress(EngineError):  # gone, or unreachable: nothing generates any more
            await self._call("POST", "/abort_request", {"rid": rid}, seconds=10)

    async def stream(self, body: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """The events of a streamed `/generate`. Raises PromptTooLong, AdapterGone, Refused, WorkerFailed."""
        stack = contextlib.AsyncExitStack()
        async with stack:
            with self._failures():
                sending = stack.enter_async_context(self._client.stream("POST", "/generate", json=body))
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
                    raise WorkerFailed(f"SGLang at {self.url} has said nothing for {self._patience.silence:g} s.")
            return task.result()
        finally:
            if not task.done():
                task.cancel()
                await asyncio.wait({task})

    async def _control(self, route: str, body: dict[str, Any]) -> dict[str, Any]:
        answer = await self._call("POST", route, body, self._patience.control)
        if answer.get("success") is False:
            raise Refused(f"SGLang at {self.url} refused {route}: {answer.get('error_message') or answer}")
        return answer

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
    def _failures(self) -> Any:
        try:
            yield
        except httpx.HTTPError as error:
            told = str(error) or type(error).__name__
            raise WorkerFailed(f"SGLang at {self.url} can't be used ({told}). Is it running?") from error
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise WorkerFailed(f"SGLang at {self.url} answers what SGLang 0.5.23 doesn't: {error!r}") from error

    def refusal(self, status: int, text: str) -> EngineError:
        """What a refused request means."""
        told = _message(text)
        if status == 401:
            return Refused(f"SGLang at {self.url} doesn't take the key: set engine_admin_key to its --admin-api-key.")
        if status >= 500 or status == 404:
            return WorkerFailed(f"SGLang at {self.url} failed ({status}): {told}")
        if "never been loaded" in told or "not loaded" in told:
            return AdapterGone(f"SGLang at {self.url}: {told}")
        if "grammar" in told.lower():
            return GrammarFailed(f"SGLang at {self.url} can't hold to the JSON schema: {told}")
        if any(sign in told for sign in _TOO_LONG):
            return PromptTooLong(f"{told} Shorten it.")
        return Refused(f"SGLang at {self.url} refused the request ({status}): {told}")


def _message(text: str) -> str:
    """What an answer says, out of the several shapes in which SGLang says it."""
    with contextlib.suppress(ValueError):
        said = json.loads(text)
        for key in ("error", "message", "error_message", "detail"):
            if isinstance(said, dict) and said.get(key):
                said = said[key]
        text = said if isinstance(said, str) else json.dumps(said)
    return text.strip()[:500]
