"""What the small servers share that answer as an engine's real one does: a real model of a hundred thousand parameters.

Each token is computed by transformers and PEFT, so the logprobs are real.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import uvicorn
from peft import PeftModel
from safetensors.torch import load_file, save_file
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.tiny_model import save_tiny_model, tiny_policy

_LOADING = threading.RLock()  # transformers patches torch while it loads: one load at a time, over all servers


@dataclass
class RecordedServer:
    """One server's state. A test may set `silent` (says nothing more) or `die_after` (tokens, then it hangs up)."""

    model_path: Path
    key: str = "secret"
    maker: str = ""
    max_lora_rank: int = 16
    silent: bool = False
    die_after: int | None = None
    generated: int = 0
    running: int = 0
    adapters: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        torch.set_num_threads(1)  # so small a model gains nothing from more, and tests share the machine
        self.tokenizer = AutoTokenizer.from_pretrained(str(self.model_path))
        self.first_path = str(self.model_path)
        self._load(self.first_path)

    def _load(self, path: str) -> None:
        with _LOADING:
            self.base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
            self.path = path
            self.peft: PeftModel | None = None
            for name, adapter in self.adapters.items():
                self._attach(name, adapter)

    def _attach(self, name: str, path: str) -> None:
        with _LOADING:
            if self.peft is None:
                self.peft = PeftModel.from_pretrained(self.base, path, adapter_name=name).eval()
            else:
                self.peft.load_adapter(path, name)

    def _detach(self, name: str) -> None:
        del self.adapters[name]
        if self.adapters:
            assert self.peft is not None
            self.peft.delete_adapter(name)
        else:
            self._load(self.path)

    @torch.no_grad()
    def logits(self, ids: list[int], adapter: str | None) -> torch.Tensor:
        """(vocabulary,) after these tokens."""
        tokens = torch.tensor([ids])
        if self.peft is None:
            return self.base(tokens).logits[0, -1]
        if adapter is None:
            with self.peft.disable_adapter():
                return self.peft(tokens).logits[0, -1]
        self.peft.set_adapter(adapter)
        return self.peft(tokens).logits[0, -1]

    async def health(self, _: Request) -> Response:
        await self._speak()
        return Response()

    async def models(self, _: Request) -> Response:
        card = {"object": "model", "created": int(time.time()), "owned_by": self.maker}
        length = self.base.config.max_position_embeddings
        cards = [card | {"id": self.path, "root": self.path, "parent": None, "max_model_len": length}]
        cards += [
            card | {"id": name, "root": path, "parent": self.path, "max_model_len": None}
            for name, path in self.adapters.items()
        ]
        return JSONResponse({"object": "list", "data": cards})

    async def _speak(self) -> None:
        while self.silent:  # noqa: ASYNC110 - set by another thread
            await asyncio.sleep(0.05)

    def _draw(self, logits: torch.Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
        if temperature == 0:
            return int(logits.argmax())
        chances, order = (logits / temperature).softmax(-1).sort(descending=True)
        chances = torch.where(chances.cumsum(-1) - chances < top_p, chances, 0.0)
        return int(order[torch.multinomial(chances, 1, generator=generator)])

    def _guard(self, handler: Any) -> Any:
        async def guarded(request: Request) -> Response:
            if request.headers.get("authorization") != f"Bearer {self.key}":
                return JSONResponse({"error": "Unauthorized"}, 401)
            return await handler(request)

        return guarded


def tiny_versions(home: Path) -> dict[str, Any]:
    """Writes a tiny model whose turns end now and then (`base`), other weights of it (`other`) and an adapter (`vx`);
    the models that the first and the last make."""
    for name, seed in (("base", 1), ("other", 3)):
        save_tiny_model(home / name, seed)
        file = home / name / "model.safetensors"
        weights = load_file(file)
        weights["model.embed_tokens.weight"][2] *= 2  # tied: the end of turn is drawn more often
        save_file(weights, file, {"format": "pt"})
    tiny_policy(1).save_pretrained(str(home / "vx"))
    bare, under = [AutoModelForCausalLM.from_pretrained(str(home / "base"), dtype=torch.float32) for _ in range(2)]
    return {"base": bare.eval(), "vx": PeftModel.from_pretrained(under, str(home / "vx")).eval()}


@contextlib.contextmanager
def served(app: Any, port: int = 0) -> Iterator[str]:
    """The app over HTTP in a thread of its own; its URL."""
    with socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(("127.0.0.1", port))
        server = uvicorn.Server(uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = server.force_exit = True
            thread.join(10)
