"""The engine that the settings name, and the model that it serves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from app.settings import Settings
from feedback_store import Store
from serving.engines.base import Engine, EngineError
from serving.engines.llamacpp import LlamaCppEngine
from serving.engines.opening import OpenEngine, embedded
from serving.engines.sglang import SGLangEngine
from serving.engines.sglang_server import ServerConfig, running_server
from serving.engines.sglang_worker import Patience
from serving.fresh import install_fresh
from serving.model import BaseModel, folder_model, prepare_base

Progress = Callable[[str], None]


async def open_engine(
    settings: Settings, store: Store, progress: Progress, stack: AsyncExitStack, purpose: str = "serving"
) -> tuple[Engine, BaseModel]:
    """Started, and closed with the stack. Raises EngineError, ModelMissing.

    `purpose` keeps the logs of several supervised servers apart.
    A model that no version in the registry was made for gets one: a fresh adapter, which says what the bare model does.
    """
    if settings.engine == "embedded":
        base = await asyncio.to_thread(prepare_base, settings.home, progress)
        engine = LlamaCppEngine(base, settings.slots, settings.context, settings.threads)
        stack.push_async_callback(engine.close)
        return engine, base
    full = [v.id for v in await asyncio.to_thread(store.versions) if v.manifest.get("kind") == "weights"]
    served = await _open_sglang(settings, progress, stack, purpose, full)
    base = await asyncio.to_thread(_served_model, settings, served)
    await asyncio.to_thread(install_fresh, store, settings.home, base, settings.sglang_lora_rank)
    return served, base


def opener(settings: Settings, store: Store, progress: Progress, purpose: str) -> OpenEngine:
    """The engine of a run of learning or of an evaluation: llama.cpp with as many slots as it asks for, or, with
    servers, those of `engine_urls`, else one of its own beside the one that serves."""

    @asynccontextmanager
    async def opened(slots: int, context: int) -> AsyncIterator[tuple[Engine, BaseModel]]:
        async with AsyncExitStack() as stack:
            if settings.engine == "embedded":
                base = await asyncio.to_thread(prepare_base, settings.home, progress)
                yield await stack.enter_async_context(embedded(base)(slots, context))
            else:
                yield await open_engine(settings, store, progress, stack, purpose)

    return opened


async def _open_sglang(
    settings: Settings, progress: Progress, stack: AsyncExitStack, purpose: str, full: Collection[str]
) -> SGLangEngine:
    urls, key = settings.engine_urls, settings.engine_admin_key
    secret = key.get_secret_value() if key else None
    if not urls:
        model = settings.engine_model
        if model is None:
            model = str((await asyncio.to_thread(prepare_base, settings.home, progress)).hf_dir)
        config = ServerConfig(
            model,
            settings.home / "logs" / ("sglang.log" if purpose == "serving" else f"sglang-{purpose}.log"),
            python=str(settings.sglang_python),
            tensor_parallel=settings.sglang_tensor_parallel,
            max_lora_rank=settings.sglang_lora_rank,
            memory_fraction=settings.sglang_memory_fraction,
            memory_saver=settings.sglang_memory_saver,
            deterministic=settings.sglang_deterministic,
            key=secret,
            flags=tuple(settings.sglang_flags),
            env=settings.sglang_env,
        )
        progress("Starting SGLang")
        server = await stack.enter_async_context(running_server(config, progress))
        urls, secret = [server.url], server.key
    engine = SGLangEngine(urls, secret, settings.engine_router_url, Patience(silence=settings.engine_silence_seconds))
    stack.push_async_callback(engine.close)
    progress("Meeting SGLang")
    await engine.start(full)
    return engine


def _served_model(settings: Settings, engine: SGLangEngine) -> BaseModel:
    """The folder of what is served: its tokenizer renders the prompts, its hash says which versions fit."""
    folder = Path(settings.engine_model or engine.described.model_path).expanduser()
    if not (folder / "config.json").is_file():
        raise EngineError(
            f"SGLang serves {engine.described.model_path}, and {folder} is no model's folder on this machine, whose "
            "tokenizer is needed: set engine_model to a folder with the same model."
        )
    return folder_model(folder)
