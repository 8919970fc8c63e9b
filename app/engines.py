"""The engine that the settings name, and the model that it serves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from app.settings import Settings
from feedback_store import Store
from serving.engines.base import Engine, EngineError
from serving.engines.http_worker import Patience
from serving.engines.llamacpp import LlamaCppEngine
from serving.engines.opening import OpenEngine, embedded
from serving.engines.sglang import SGLangEngine
from serving.engines.sglang_server import SGLangConfig
from serving.engines.supervised import ServerConfig, running_server
from serving.engines.vllm import VLLMEngine
from serving.engines.vllm_server import VLLMConfig
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
    urls, secret = await _servers(settings, progress, stack, purpose)
    patience = Patience(silence=settings.engine_silence_seconds)
    served: SGLangEngine | VLLMEngine
    if settings.engine == "sglang":
        served, rank = SGLangEngine(urls, secret, settings.engine_router_url, patience), settings.sglang_lora_rank
    else:
        served, rank = VLLMEngine(urls, secret, patience=patience), settings.vllm_lora_rank
    stack.push_async_callback(served.close)
    progress(f"Meeting {served.name}")
    full = [v.id for v in await asyncio.to_thread(store.versions) if v.manifest.get("kind") == "weights"]
    await served.start(full)
    base = await asyncio.to_thread(_served_model, settings, served)
    await asyncio.to_thread(install_fresh, store, settings.home, base, rank)
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


async def _servers(
    settings: Settings, progress: Progress, stack: AsyncExitStack, purpose: str
) -> tuple[list[str], str | None]:
    """Where they are, and the key to them: those that are named, or one that is started."""
    key = settings.engine_admin_key
    secret = key.get_secret_value() if key else None
    if settings.engine_urls:
        return settings.engine_urls, secret
    model = settings.engine_model
    if model is None:
        model = str((await asyncio.to_thread(prepare_base, settings.home, progress)).hf_dir)
    config = server_config(settings, model, secret, purpose)
    progress(f"Starting {config.name}")
    server = await stack.enter_async_context(running_server(config, progress))
    return [server.url], server.key


def server_config(settings: Settings, model: str, key: str | None, purpose: str = "serving") -> ServerConfig:
    """How the engine that the settings name is started; each purpose has a log of its own."""
    log = settings.home / "logs" / f"{settings.engine}{'' if purpose == 'serving' else f'-{purpose}'}.log"
    if settings.engine == "sglang":
        return SGLangConfig(
            model,
            log,
            python=str(settings.sglang_python),
            tensor_parallel=settings.sglang_tensor_parallel,
            max_lora_rank=settings.sglang_lora_rank,
            memory_fraction=settings.sglang_memory_fraction,
            max_loras=settings.max_loaded_versions,
            memory_saver=settings.sglang_memory_saver,
            deterministic=settings.sglang_deterministic,
            key=key,
            flags=tuple(settings.sglang_flags),
            env=settings.sglang_env,
        )
    return VLLMConfig(
        model,
        log,
        python=str(settings.vllm_python),
        tensor_parallel=settings.vllm_tensor_parallel,
        max_lora_rank=settings.vllm_lora_rank,
        max_loras=settings.max_loaded_versions,
        memory_fraction=settings.vllm_memory_fraction,
        key=key,
        flags=tuple(settings.vllm_flags),
        env=settings.vllm_env,
    )


def _served_model(settings: Settings, engine: SGLangEngine | VLLMEngine) -> BaseModel:
    """The folder of what is served: its tokenizer renders the prompts, its hash says which versions fit."""
    folder = Path(settings.engine_model or engine.described.model_path).expanduser()
    if not (folder / "config.json").is_file():
        raise EngineError(
            f"{engine.name} serves {engine.described.model_path}, and {folder} is no model's folder on this machine, "
            "whose tokenizer is needed: set engine_model to a folder with the same model."
        )
    return folder_model(folder)
