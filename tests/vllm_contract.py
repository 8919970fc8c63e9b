"""A small server that answers as vLLM 0.32.0 does, with a real model of a hundred thousand parameters.

Shapes, routes, statuses and the order of events were recorded from the real server; test_vllm_real.py shows that the
two answer alike.
"""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from llguidance import LLMatcher
from llguidance.hf import from_tokenizer
from safetensors import SafetensorError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from serving.tensors import tensor_shapes
from tests.recorded_server import RecordedServer

_MOST_LOGPROBS = 20


@dataclass
class RecordedVLLM(RecordedServer):
    """`loads`: whether it was started so that adapters may be loaded while it runs."""

    maker: str = "vllm"
    raw_logprobs: bool = True
    loads: bool = True
    max_stops: int = 32
    closed: int = 0

    # -- routes

    async def load_lora(self, request: Request) -> Response:
        body = await request.json()
        name, path = body["lora_name"], body["lora_path"]
        if name in self.adapters:
            return _error(
                f"The lora adapter '{name}' has already been loaded. If you want to load the adapter in place, set "
                "'load_inplace' to True.", kind="InvalidUserInput",
            )  # fmt: skip
        try:
            shapes = await asyncio.to_thread(_adapter_shapes, path)
        except OSError:
            return _error(f"Loading lora {name} failed: No adapter found for <path>", 404, "NotFoundError")
        except SafetensorError as error:
            return self._worker_failed(str(error))
        rank = min(min(shape) for shape in shapes)
        if rank > self.max_lora_rank:
            return self._worker_failed(f"LoRA rank {rank} is greater than max_lora_rank {self.max_lora_rank}.")
        self._attach(name, path)
        self.adapters[name] = path
        return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")

    def _worker_failed(self, told: str) -> Response:
        return _error(
            f"Call to add_lora method failed: Worker failed with error '{told}', please check the stack trace above "
            "for the root cause", 500, "InternalServerError",
        )  # fmt: skip

    async def unload_lora(self, request: Request) -> Response:
        name = (await request.json())["lora_name"]
        if name not in self.adapters:
            return _error(f"The lora adapter '{name}' cannot be found.", 404, "NotFoundError")
        self._detach(name)
        return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")

    async def complete(self, request: Request) -> Response:
        body = await request.json()
        if (problem := self._refused(body)) is not None:
            return problem
        late = self._late_problem(body)
        choices = self._choices(body)
        fingerprint = {"system_fingerprint": "vllm-0.32.0-305be403"}
        answer = {"id": f"cmpl-{uuid.uuid4().hex[:16]}", "object": "text_completion", "created": 1795758442,
                  "model": body["model"]}  # fmt: skip
        if not body.get("stream"):
            if late:
                return _error(late, param=self._culprit(late))
            told = [choice async for choice in choices]
            logprobs = {key: [item for c in told for item in c["logprobs"][key]] for key in told[0]["logprobs"]}
            ids = {"token_ids": [i for c in told for i in c["token_ids"] or ()] or None}
            whole = told[-1] | ids | {"text": "".join(c["text"] for c in told), "logprobs": logprobs,
                     "prompt_token_ids": told[0]["prompt_token_ids"], "prompt_logprobs": None}  # fmt: skip
            spent, count = len(body["prompt"]), len(told)
            usage = {"prompt_tokens": spent, "total_tokens": spent + count, "completion_tokens": count}
            return JSONResponse(answer | fingerprint | {"choices": [whole], "usage": usage})

        async def lines() -> AsyncIterator[bytes]:
            if late:
                error = {"message": late, "type": "BadRequestError", "param": self._culprit(late), "code": 400}
                yield b"data: " + json.dumps({"error": error}).encode() + b"\n\n"
            else:
                async for choice in choices:
                    end = fingerprint if choice["finish_reason"] else {}
                    event = answer | {"choices": [choice]} | end
                    yield b"data: " + json.dumps(event, ensure_ascii=False).encode() + b"\n\n"
            yield b"data: [DONE]\n\n"

        return StreamingResponse(lines(), media_type="text/event-stream")

    def _refused(self, body: dict[str, Any]) -> Response | None:
        """What it tells by its status, before anything is streamed."""
        room = self.base.config.max_position_embeddings - len(body["prompt"])
        if body["model"] != self.first_path and body["model"] not in self.adapters:
            return _error(f"The model `{body['model']}` does not exist. Valid aliases: <path>", 404, "NotFoundError",
                          "model")  # fmt: skip
        if not body["prompt"]:
            return _error("You must pass at least one prompt")
        if room < 0:
            context = self.base.config.max_position_embeddings
            return _error(
                f"This model's maximum context length is {context} tokens. However, your prompt contains "
                f"{len(body['prompt'])} input tokens, which exceeds this limit even without any output tokens. Please "
                "reduce the length of the input prompt.", param="input_tokens",
            )  # fmt: skip
        if min(body["max_tokens"], room) < 1:
            return _error("max_tokens must be at least 1, got 0. (parameter=max_tokens, value=0)", param="max_tokens")
        if body["temperature"] < 0:
            told = body["temperature"]
            return _error(f"temperature must be non-negative, got {told}.", param="temperature")
        if len(body.get("stop") or []) > self.max_stops:
            return _error(
                f"1 validation error:\n  {{'type': 'too_long', 'loc': 'body.stop', 'msg': 'List should have at most "
                f"{self.max_stops} items after validation, not {len(body['stop'])}'}}", 400, "Bad Request", "body.stop",
            )  # fmt: skip
        return None

    def _culprit(self, late: str) -> str | None:
        return "logprobs" if "logprobs" in late else None

    def _late_problem(self, body: dict[str, Any]) -> str:
        """What it tells in the stream, whose status is already 200."""
        vocabulary = self.base.config.vocab_size
        if wrong := [i for i in body["prompt"] if not 0 <= i < vocabulary]:
            return f"Token id {wrong[0]} is out of vocabulary"
        if body["logprobs"] > _MOST_LOGPROBS:
            return f"Requested sample logprobs of {body['logprobs']}, which is greater than max allowed: 20"
        if wanted := (body.get("structured_outputs") or {}).get("json"):
            matcher = self._matcher(wanted)
            if matcher.is_error():
                return f"Grammar error: {matcher.get_error()}"
        return ""

    def _matcher(self, schema: dict[str, Any]) -> LLMatcher:
        if not hasattr(self, "_tokens"):
            self._tokens = from_tokenizer(self.tokenizer, n_vocab=self.base.config.vocab_size)
        options = {"whitespace_flexible": False}
        return LLMatcher(self._tokens, LLMatcher.grammar_from_json_schema(schema, defaults=options))

    async def _choices(self, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        temperature, stops = body["temperature"], body.get("stop") or []
        limit = min(body["max_tokens"], self.base.config.max_position_embeddings - len(body["prompt"]))
        adapter = body["model"] if body["model"] in self.adapters else None
        schema = (body.get("structured_outputs") or {}).get("json")
        matcher = self._matcher(schema) if schema else None
        generator = torch.Generator()
        generator.manual_seed(body["seed"]) if "seed" in body else generator.seed()
        drawn: list[int] = []
        reason = stopped = None
        self.running += 1
        try:
            while reason is None:
                await asyncio.sleep(0)
                await self._speak()
                if self.die_after is not None and len(drawn) >= self.die_after:
                    raise ConnectionResetError("the server was killed")
                logits = self.logits(body["prompt"] + drawn, adapter)
                scaled = logits if self.raw_logprobs or not temperature else logits / temperature
                logprobs = scaled.log_softmax(-1)
                if matcher is not None:
                    allowed = torch.frombuffer(bytearray(matcher.compute_logit_bias()), dtype=torch.uint8) > 0
                    logits = torch.where(allowed[: len(logits)], logits, -torch.inf)
                token = self._draw(logits, temperature, body.get("top_p", 1.0), generator)
                if matcher is not None:
                    matcher.consume_token(token)
                drawn.append(token)
                self.generated += 1
                said = self.tokenizer.decode(drawn)
                stopped = next((stop for stop in stops if stop in said), None)
                if stopped is not None or (token == self.tokenizer.eos_token_id and not body.get("ignore_eos")):
                    reason = "stop"
                elif len(drawn) >= limit:
                    reason = "length"
                told = f"token_id:{token}"
                best = logprobs.topk(body["logprobs"])
                wanted = {told: float(logprobs[token])} | {
                    f"token_id:{i}": float(logprobs[i]) for i in body.get("logprob_token_ids") or best.indices.tolist()
                }
                yield {
                    "index": 0, "text": self.tokenizer.decode([token], skip_special_tokens=True),
                    "logprobs": {"text_offset": [0], "token_logprobs": [float(logprobs[token])], "tokens": [told],
                                 "top_logprobs": [wanted]},
                    "finish_reason": reason, "stop_reason": stopped,
                    "prompt_token_ids": body["prompt"] if body.get("return_token_ids") and len(drawn) == 1 else None,
                    "token_ids": [token] if body.get("return_token_ids") else None,
                }  # fmt: skip
        finally:
            self.running -= 1
            self.closed += reason is None

    def app(self) -> Starlette:
        routes = [("models", self.models, "GET"), ("completions", self.complete, "POST")]
        if self.loads:
            routes += [("load_lora_adapter", self.load_lora, "POST"), ("unload_lora_adapter", self.unload_lora, "POST")]
        guarded = [Route(f"/v1/{name}", self._guard(handler), methods=[method]) for name, handler, method in routes]
        missing = {404: lambda *_: JSONResponse({"detail": "Not Found"}, 404)}
        return Starlette(routes=[Route("/health", self.health), *guarded], exception_handlers=missing)


def _error(told: str, status: int = 400, kind: str = "BadRequestError", param: str | None = None) -> Response:
    return JSONResponse({"error": {"message": told, "type": kind, "param": param, "code": status}}, status)


def _adapter_shapes(path: str) -> list[tuple[int, ...]]:
    shapes = tensor_shapes(Path(path), "adapter_model.safetensors")
    if not shapes:
        raise FileNotFoundError(path)
    return list(shapes.values())
