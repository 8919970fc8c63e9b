"""The seam between the product and whatever runs the model. A new engine is one file that fills this in."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

FinishReason = Literal["stop", "eos", "length", "abort"]

trace_headers: ContextVar[Mapping[str, str] | None] = ContextVar("trace_headers", default=None)
"""W3C trace context of what is asked of the engine, where traces are on: one over HTTP sends it along."""


class EngineError(RuntimeError):
    """The engine can't serve a request. The message names the version and the way out."""


class UnknownVersion(EngineError):
    """A request named a version that isn't loaded."""


class PromptTooLong(EngineError):
    """The prompt, or the prompt and the tokens asked for, exceed the context."""


class WeightsRefused(EngineError):
    """The engine can't serve a version because of the weights that it needs, or that are in service."""


class GrammarFailed(EngineError):
    """The engine can't hold what it draws to a JSON schema, or didn't."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. Logprobs are the policy's own, before temperature and truncation."""

    temperature: float = 0.7
    top_p: float = 1.0
    max_tokens: int = 512
    seed: int | None = None


@dataclass(frozen=True)
class GenerateRequest:
    """`token_ids`: the whole context. `stop`: generation ends with the token that completes one of these strings.

    `top_logprobs`: how many of the likeliest tokens each chunk tells beside those drawn. `json_schema`: what may be
    drawn is then a JSON text of this schema, and after it the end of the turn; logprobs stay the policy's own.
    """

    token_ids: list[int]
    version: str
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    top_logprobs: int | None = None
    json_schema: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class TokenChunk:
    """New tokens with one natural logprob each. The last chunk of a request has a `finish_reason`.

    `version`: of the weights that drew them; where full weights were changed under a request, not the one it asked for.
    What the policy drew is all there, exactly: the tokens that complete a stop string, and the end-of-turn token
    (`finish_reason` "eos"), which learning must see too. `top_logprobs`, where they were asked for, has for each token
    the likeliest ones (id, logprob), the likeliest first.
    """

    token_ids: list[int]
    logprobs: list[float]
    version: str
    finish_reason: FinishReason | None = None
    top_logprobs: list[list[tuple[int, float]]] | None = None


class Engine(Protocol):
    """Closing the iterator that `generate` returned (`aclose`) aborts the request."""

    @property
    def context_length(self) -> int: ...

    @property
    def can_swap(self) -> bool:
        """Whether it can put full weights in place while it serves."""
        ...

    @property
    def weights(self) -> str | None:
        """The full-weight version that is in place of the base model's own weights, if one is."""
        ...

    def generate(self, request: GenerateRequest) -> AsyncIterator[TokenChunk]: ...

    async def load(self, version: str, path: Path | None) -> None:
        """Make a version answer: `path` is its folder of adapter files, or None for the bare base model."""
        ...

    async def unload(self, version: str) -> None:
        """Forget a version; its requests in flight end first."""
        ...

    async def swap(self, version: str | None, path: Path | None) -> None:
        """Put full weights, a transformers folder, in place of those that are there; by None the base model's own.

        No adapter may be loaded. Only the new version is loaded afterwards, or none. Requests in flight go on under the
        new weights, and their chunks name them; so do those that still ask by the name of a full-weight version that
        was replaced. Raises WeightsRefused by an engine that can't, EngineError when it fails: then the old weights
        are there as before.
        """
        ...

    def loaded(self) -> list[str]: ...

    async def health(self) -> dict[str, object]: ...

    async def close(self) -> None: ...
