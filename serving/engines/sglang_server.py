"""How Whetstone starts SGLang: `python -m sglang.launch_server` with these flags. Written against 0.5.23."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from serving.engines.supervised import ServerConfig, options
from serving.model import LORA_TARGETS


@dataclass(frozen=True)
class SGLangConfig(ServerConfig):
    """`memory_saver`: it can give its memory away for training. `deterministic`: seeds have effect; on GPUs alone."""

    lora_targets: tuple[str, ...] = LORA_TARGETS
    memory_saver: bool = False
    deterministic: bool = False
    metrics: bool = True

    name: ClassVar[str] = "SGLang"
    defaults: ClassVar = {"SGLANG_RETURN_ORIGINAL_LOGPROB": "1"}

    def command(self, port: int, keys: Path) -> list[str]:
        command = [self.python, "-m", "sglang.launch_server"]
        command += options([
            ("--model-path", self.model), ("--host", "127.0.0.1"), ("--port", port), ("--config", keys),
            ("--tp-size", self.tensor_parallel), ("--context-length", self.context),
            ("--mem-fraction-static", self.memory_fraction),
            ("--enable-memory-saver", self.memory_saver), ("--enable-metrics", self.metrics),
            ("--enable-deterministic-inference", self.deterministic), ("--incremental-streaming-output", True),
            # JSON schemas are checked by this library, and a small policy may write blanks for ever.
            ("--grammar-backend", "llguidance"), ("--constrained-json-disable-any-whitespace", True),
        ])  # fmt: skip
        if self.max_lora_rank:
            lora = [("--enable-lora", True), ("--max-lora-rank", self.max_lora_rank),
                    ("--max-loras-per-batch", self.max_loras)]  # fmt: skip
            command += [*options(lora), "--lora-target-modules", *self.lora_targets]
        return [*command, *self.flags]

    def keys(self, key: str) -> str:
        return f"api-key: {key}\nadmin-api-key: {key}\n"
