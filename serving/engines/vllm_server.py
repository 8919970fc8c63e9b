"""How Whetstone starts vLLM: its OpenAI server with these flags. Written against 0.32.0."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from serving.engines.supervised import ServerConfig, options

# JSON schemas are checked by this library, and a small policy may write blanks for ever.
_GRAMMAR = json.dumps({"backend": "guidance", "disable_any_whitespace": True})

_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # it takes no others


@dataclass(frozen=True)
class VLLMConfig(ServerConfig):
    name: ClassVar[str] = "vLLM"
    defaults: ClassVar = {
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_MAX_STOP_STRINGS": "32",
        "VLLM_NO_USAGE_STATS": "1",  # tells its makers nothing about this machine
    }

    def command(self, port: int, keys: Path) -> list[str]:
        # Not `vllm serve`: builds of other distributions than `vllm` lack that command.
        command = [self.python, "-m", "vllm.entrypoints.openai.api_server"]
        command += options([
            ("--model", self.model), ("--host", "127.0.0.1"), ("--port", port), ("--config", keys),
            ("--tensor-parallel-size", self.tensor_parallel), ("--max-model-len", self.context),
            ("--gpu-memory-utilization", self.memory_fraction), ("--logprobs-mode", "raw_logprobs"),
            ("--generation-config", "vllm"), ("--structured-outputs-config", _GRAMMAR),
        ])  # fmt: skip
        if self.max_lora_rank:
            rank = next((rank for rank in _RANKS if rank >= self.max_lora_rank), self.max_lora_rank)
            command += options([
                ("--enable-lora", True), ("--max-lora-rank", rank), ("--max-loras", self.max_loras),
            ])  # fmt: skip
        return [*command, *self.flags]

    def keys(self, key: str) -> str:
        return f"api-key: {key}\n"
