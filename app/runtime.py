"""Puts the parts together: base model, store, engine, version router, tools, agent. What `up` and `ask` run on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from app.service import Service
from app.settings import Settings
from feedback_store import Store

Progress = Callable[[str], None]


def open_store(settings: Settings) -> Store:
    """The record, migrated to this release; made if there is none. Raises StoreError."""
    settings.home.mkdir(parents=True, exist_ok=True)
    return Store.open(settings.store_path, max_pending=settings.queue_max)


@asynccontextmanager
async def running_service(settings: Settings, progress: Progress = lambda _: None) -> AsyncIterator[Service]:
    """A service that answers, and is closed at the end of the block. `progress` hears each stage.

    Raises StoreError, ModelMissing, EngineError (no version can be loaded), CorruptVersion.
    """
    # Imported here: they bring in the model libraries, which commands that only read the record can do without.
    from serving.agent import Agent, Limits
    from serving.dialects.tapo import TapoDialect
    from serving.engines.llamacpp import LlamaCppEngine
    from serving.model import prepare_base
    from serving.versions import VersionRouter, install_shipped
    from tools.registry import build_tools

    progress("Opening the store")
    store = await asyncio.to_thread(open_store, settings)
    try:
        left = await asyncio.to_thread(store.recover)
        if left:
            progress(f"Closed {left} turn{'s' if left > 1 else ''} that an earlier process left open")
        progress("Preparing the model (once, about half a minute)")
        base = await asyncio.to_thread(prepare_base, settings.home, progress)
        await asyncio.to_thread(install_shipped, store, settings.home)
        progress("Preparing the tools")
        tools = await asyncio.to_thread(
            build_tools,
            settings.home,
            settings.search_backends,
            unsafe=settings.unsafe_without_sandbox,
            code_timeout_s=settings.python_seconds,
            search_timeout_s=settings.search_seconds,
            documents=settings.documents,
        )
        progress("Starting the engine")
        engine = LlamaCppEngine(base, settings.slots, settings.context, settings.threads)
        router = VersionRouter(store, engine, base.fingerprint)
        try:
            await router.start()
            tool_seconds = max(settings.python_seconds, settings.search_seconds) * 2
            limits = Limits(settings.max_turns, settings.observation_tokens, tool_seconds)
            agent = Agent(engine, TapoDialect(base.tokenizer), tools, limits)
            service = Service(store, router, agent, engine, settings.max_answers)
            try:
                yield service
            finally:
                await service.drain(settings.shutdown_seconds)
        finally:
            await router.close()
            await engine.close()
    finally:
        await asyncio.to_thread(store.close)
