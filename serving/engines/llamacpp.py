"""The embedded engine: llama.cpp's own server, in process (xllamacpp), one server a version.

A version's server maps the same base file, so a second version costs its KV cache and its adapter. Requests are
batched continuously over `slots`; what exceeds them waits its turn here. Chosen by measurement, see docs/engines.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from safetensors import SafetensorError

from serving.engines.base import (
    EngineError,
    FinishReason,
    GenerateRequest,
    PromptTooLong,
    TokenChunk,
    UnknownVersion,
    WeightsRefused,
)
from serving.engines.gguf_export import UnsupportedModel, write_adapter
from serving.engines.users import Users
from serving.model import BaseModel

_TRIES = 3  # to begin a generation
# How often its threads look for each other before they sleep. By default they look for milliseconds, and on a machine
# with other work so keep the one they wait for from running: 4 tokens in 24 s, where this makes over a hundred in 12.
_SPINS = "2000"
_TOP_P_AMONG = 1024  # top_p sorts its candidates: the whole vocabulary takes longer than the model itself
# Of JSON under a grammar: else a small policy may write blanks for ever.
_SPACING = {"whitespace_flexible": False, "key_separator": ": ", "item_separator": ", "}
_FINISH: dict[str, FinishReason] = {"eos": "eos", "word": "stop", "limit": "length", "none": "abort"}


@dataclass
class _Served:
    """One version's server. `free` has the slots that no request uses and the tokens in each one's KV cache, the one
    that has waited longest first; `room` counts them."""

    server: Any
    client: httpx.AsyncClient
    free: dict[int, list[int]]
    room: asyncio.Semaphore
    users: Users = field(default_factory=Users)

    def take_slot(self, token_ids: list[int]) -> int:
        """The slot that this request continues, else the one idle for longest.

        llama.cpp's own choice, the most similar prompt, often takes the slot of an answer whose tool is running, which
        must then be read again from its start.
        """
        continued = (s for s, cached in self.free.items() if cached and token_ids[: len(cached)] == cached)
        slot = next(continued, next(iter(self.free)))
        del self.free[slot]
        return slot


class LlamaCppEngine:
    """`context`: tokens a request may hold, prompt and answer. Memory a version: about 23 kB x slots x context
    for SmolLM2-135M (its KV cache in float16): 190 MB at the defaults."""

    def __init__(self, base: BaseModel, slots: int = 4, context: int = 2048, threads: int | None = None) -> None:
        self.base = base
        self.slots = slots
        self._context = context
        self._threads = threads or _cores()
        self._served: dict[str, _Served] = {}
        self._loading = asyncio.Lock()

    @property
    def context_length(self) -> int:
        return self._context

    @property
    def can_swap(self) -> bool:
        return False

    @property
    def weights(self) -> None:
        return None

    async def swap(self, version: str | None, path: Path | None) -> None:
        if version is None:
            return
        raise WeightsRefused(
            f"Version {version!r} is full weights, which the embedded engine can't change while it serves: serve them "
            "with engine = sglang."
        )

    def loaded(self) -> list[str]:
        return list(self._served)

    async def load(self, version: str, path: Path | None) -> None:
        """Start the version's server (about half a second). Loading a loaded version does nothing.

        Raises EngineError when the adapter is corrupt or of another base; versions already loaded are unharmed.
        """
        async with self._loading:
            if version not in self._served:
                self._served[version] = await asyncio.to_thread(self._start, version, path)

    async def unload(self, version: str) -> None:
        served = self._served.pop(version, None)
        if served is not None:
            await served.users.idle.wait()
            await served.client.aclose()
            await asyncio.to_thread(served.__dict__.pop, "server")  # its destructor joins the server's threads

    async def close(self) -> None:
        for version in self.loaded():
            await self.unload(version)

    async def health(self) -> dict[str, object]:
        answers = {}
        for version, served in list(self._served.items()):
            try:
                answers[version] = (await served.client.get("/health", timeout=5)).status_code == 200
            except httpx.HTTPError:
                answers[version] = False
        return {"ok": bool(answers) and all(answers.values()), "engine": "llama.cpp", "versions": answers}

    async def generate(self, request: GenerateRequest) -> AsyncIterator[TokenChunk]:
        served = self._served.get(request.version)
        if served is None:
            raise UnknownVersion(f"Version {request.version!r} isn't loaded; loaded are: {', '.join(self._served)}.")
        room = self._context - len(request.token_ids)
        if room < 1:
            raise PromptTooLong(
                f"The prompt has {len(request.token_ids)} tokens; the context holds {self._context}. Shorten it."
            )
        if not request.token_ids:
            raise EngineError("The prompt is empty.")
        with served.users.one():
            async with served.room:
                slot, context = served.take_slot(request.token_ids), list(request.token_ids)
                try:
                    async for chunk in self._stream(served, request, slot, min(request.sampling.max_tokens, room)):
                        context += chunk.token_ids
                        yield chunk
                finally:
                    served.free[slot] = context

    async def _stream(
        self, served: _Served, request: GenerateRequest, slot: int, limit: int
    ) -> AsyncIterator[TokenChunk]:
        sampling = request.sampling
        body = {
            "prompt": request.token_ids, "n_predict": limit, "stop": list(request.stop), "stream": True,
            "samplers": ["top_k", "top_p", "temperature"] if sampling.top_p < 1 else ["temperature"],
            "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": _TOP_P_AMONG,
            "seed": sampling.seed if sampling.seed is not None else secrets.randbits(31),
            "return_tokens": True, "n_probs": max(1, request.top_logprobs or 0), "cache_prompt": True, "id_slot": slot,
        }  # fmt: skip
        if request.json_schema is not None:
            body["json_schema"] = {**request.json_schema, "x-guidance": _SPACING}
        try:
            async with contextlib.AsyncExitStack() as stack:
                response = await _asked(served, body, stack)
                if response.status_code != 200:
                    raise _refused(request, response.status_code, (await response.aread()).decode(errors="replace"))
                async for event in _events(response):
                    if "error" in event:
                        raise EngineError(f"Version {request.version!r} failed: {event['error']}")
                    drawn = event.get("completion_probabilities", [])
                    yield TokenChunk(
                        event.get("tokens", []),
                        [entry["logprob"] for entry in drawn],
                        request.version,
                        _FINISH[event["stop_type"]] if event.get("stop") else None,
                        None if request.top_logprobs is None else [_likeliest(entry) for entry in drawn],
                    )
                    if event.get("stop"):
                        return
        except httpx.HTTPError as error:
            raise EngineError(f"The engine of version {request.version!r} doesn't answer: {error!r}") from error
        raise EngineError(f"The engine of version {request.version!r} stopped in mid-answer.")

    def _start(self, version: str, path: Path | None) -> _Served:
        if "OMP_WAIT_POLICY" not in os.environ:
            os.environ.setdefault("GOMP_SPINCOUNT", _SPINS)  # read when the library is loaded
        import xllamacpp

        key = secrets.token_urlsafe(16)  # its port is on loopback, but other users of the machine share that
        params = xllamacpp.CommonParams()
        params.model.path = str(self.base.gguf)
        params.n_parallel = self.slots
        params.n_ctx = self.slots * self._context
        params.kv_unified = False  # measured: a fifth slower when slots share one cache
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = self._threads
        params.n_threads_http = self.slots + 2
        params.cache_ram_mib = 0
        params.verbosity = -1
        params.warmup = False
        params.api_keys = [key]
        try:
            if path is not None:
                adapter = xllamacpp.CommonAdapterLoraInfo(str(adapter_gguf(path, self.base)), 1.0)
                params.lora_adapters = [adapter]
            server = xllamacpp.Server(params)
        except (RuntimeError, ValueError, OSError, KeyError, SafetensorError) as error:
            raise EngineError(f"Version {version!r} can't be loaded from {path or self.base.gguf}: {error}") from error
        client = httpx.AsyncClient(
            base_url=server.listening_address,
            headers={"Authorization": f"Bearer {key}"},
            timeout=httpx.Timeout(10, read=None),
            # The server closes idle connections without a word; a fresh one a request costs well under a millisecond.
            limits=httpx.Limits(max_keepalive_connections=0),
        )
        return _Served(server, client, {slot: [] for slot in range(self.slots)}, asyncio.Semaphore(self.slots))


async def _asked(served: _Served, body: dict[str, Any], stack: contextlib.AsyncExitStack) -> httpx.Response:
    """The server lets go of a connection on which nothing comes for five seconds. On a machine so busy that a request
    takes longer to be sent it is made again: nothing was drawn yet."""
    for left in reversed(range(_TRIES)):
        try:
            return await stack.enter_async_context(served.client.stream("POST", "/completion", json=body))
        except (httpx.ReadError, httpx.WriteError, httpx.RemoteProtocolError):
            if not left:
                raise
    raise AssertionError("the last try returns or raises")


def adapter_gguf(path: Path, base: BaseModel) -> Path:
    """The version folder's adapter as GGUF, written beside it on first use."""
    gguf = path / "adapter.gguf"
    if not gguf.exists():
        if not (path / "adapter_model.safetensors").exists():
            raise UnsupportedModel(f"{path} holds no adapter_model.safetensors")
        with contextlib.suppress(PermissionError):  # a read-only installation: fall through to the cache
            write_adapter(path, base.hf_dir, gguf)
            return gguf
        gguf = base.gguf.parent / f"{path.name}.gguf"
        write_adapter(path, base.hf_dir, gguf)
    return gguf


def _likeliest(entry: dict[str, Any]) -> list[tuple[int, float]]:
    return [(other["id"], other["logprob"]) for other in entry["top_logprobs"]]


def _refused(request: GenerateRequest, status: int, text: str) -> EngineError:
    if "context size" in text or "exceed_context" in text:
        return PromptTooLong(f"The prompt has {len(request.token_ids)} tokens, more than the context holds.")
    return EngineError(f"The engine of version {request.version!r} refused the request ({status}): {text[:300]}")


async def _events(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    rest = b""
    async for piece in response.aiter_bytes():
        # Not by aiter_lines: it splits at every Unicode line break, which JSON may hold as it is.
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data: ") and line.strip() != b"data: [DONE]":
                yield json.loads(line[6:])
            elif line.startswith(b"error: "):
                yield {"error": line[7:].decode(errors="replace")}


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
