"""How a run of learning, or an evaluation, gets an engine of its own, whichever kind the settings name."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Protocol

from serving.engines.base import Engine
from serving.engines.llamacpp import LlamaCppEngine
from serving.model import BaseModel


class OpenEngine(Protocol):
    def __call__(self, slots: int, context: int) -> AbstractAsyncContextManager[tuple[Engine, BaseModel]]:
        """An engine that works on `slots` answers of `context` tokens at once, and the model that it serves; closed at
        the end of the block. Its versions may be those of other users too, so the caller loads its own by names of its
        own. Raises EngineError, ModelMissing."""
        ...


def embedded(base: BaseModel) -> OpenEngine:
    """llama.cpp in this process."""

    @asynccontextmanager
    async def opened(slots: int, context: int) -> AsyncIterator[tuple[Engine, BaseModel]]:
        engine = LlamaCppEngine(base, slots=slots, context=context)
        try:
            yield engine, base
        finally:
            await engine.close()

    return opened
