"""What rollouts are drawn from: the trainer's weights as of a step, served by the engine as a version."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import Any

from online_rl.adapters import save_adapter
from serving.engines.base import Engine


class Sampler:
    """One version at a time in `engine`, named `prefix`-step<n>; its adapter lies in a folder of its own."""

    def __init__(self, engine: Engine, folder: Path, prefix: str) -> None:
        self._engine = engine
        self._folder = folder
        self._prefix = prefix
        self._version: str | None = None

    @property
    def version(self) -> str:
        assert self._version is not None, "sync comes before the first rollout"
        return self._version

    async def sync(self, model: Any, step: int) -> str:
        """Serve the model's adapter as of `step` to the rollouts that come next; returns the version's name."""
        name = f"{self._prefix}-step{step}"
        folder = self._folder / f"step-{step}"
        await asyncio.to_thread(save_adapter, model, folder)
        (folder / "adapter.gguf").unlink(missing_ok=True)
        await self._engine.load(name, folder)
        await self.end()
        for old in folder.parent.iterdir():
            if old != folder:
                shutil.rmtree(old)
        self._version = name
        return name

    async def end(self) -> None:
        """Unload what is served, if anything is."""
        version, self._version = self._version, None
        if version is not None:
            await self._engine.unload(version)
