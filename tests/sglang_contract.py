"""A small server that answers as SGLang 0.5.23 does, with a real model of a hundred thousand parameters.

Shapes, routes, statuses and the order of events were recorded from the real server; test_sglang_real.py shows that
the two answer alike. It computes each token by transformers and PEFT, so its logprobs are real.
"""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import torch
from llguidance import LLMatcher
from llguidance.hf import from_tokenizer
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from tests.recorded_server import RecordedServer

ADMIN = ("load_lora_adapter", "unload_lora_adapter", "update_weights_from_disk", "abort_request",
         "pause_generation", "continue_generation")  # fmt: skip


@dataclass
class RecordedSGLang(RecordedServer):
    maker: str = "sglang"
    seeded: bool = True
    original_logprobs: bool = True
    grammars: bool = True
    incremental: bool = False
    weight_version: str = "default"
    refuse_updates: bool | str = False  # all but the first weights', or those of one folder
    loads: list[str] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.may_run = asyncio.Event()
        self.may_run.set()

    # -- routes

    async def model_info(self, _: Request) -> Response:
        return JSONResponse({
            "model_path": self.path, "served_model_name": self.path, "tokenizer_path": self.first_path,
            "is_generation": True, "preferred_sampling_params": None, "weight_version": self.weight_version,
            "load_format": "auto", "model_type": "llama", "architectures": ["LlamaForCausalLM"],
        })  # fmt: skip

    async def server_info(self, _: Request) -> Response:
        return JSONResponse({
            "model_path": self.first_path, "enable_lora": self.max_lora_rank > 0, "max_lora_rank": self.max_lora_rank,
            "lora_target_modules": [
                "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
            "enable_deterministic_inference": self.seeded, "incremental_streaming_output": self.incremental,
            "max_total_num_tokens": 16384, "version": "0.5.23",
        })  # fmt: skip

    async def load_lora(self, request: Request) -> Response:
        body = await request.json()
        name, path = body["lora_name"], body["lora_path"]
        problem = ""
        if name in self.adapters:
            problem = f"Failed to load LoRA adapter {name} because it is already loaded"
        else:
            try:
                self._attach(name, path)
                self.adapters[name] = path
                self.loads.append(name)
            except Exception as error:
                problem = str(error)
        return self._lora_answer(problem)

    async def unload_lora(self, request: Request) -> Response:
        name = (await request.json())["lora_name"]
        if name not in self.adapters:
            return self._lora_answer(f"LoRA with name {name} does not exist.")
        self._detach(name)
        return self._lora_answer("")

    def _lora_answer(self, problem: str) -> Response:
        answer = {"rid": None, "http_worker_ipc": None, "success": not problem, "error_message": problem,
                  "loaded_adapters": dict(self.adapters)}  # fmt: skip
        return JSONResponse(answer, 400 if problem else 200)

    async def update(self, request: Request) -> Response:
        body = await request.json()
        try:
            if self.refuse_updates in (True, body["model_path"]) and body["model_path"] != self.first_path:
                raise OSError("no space left on the device")
            self._load(body["model_path"])
        except Exception as error:
            message = f"Failed to get weights iterator: {error}."
            return JSONResponse({"success": False, "message": message, "num_paused_requests": 0}, 400)
        self.weight_version = body.get("weight_version") or self.weight_version
        message = f"Succeeded to update model weights. Weight version updated to {self.weight_version}."
        return JSONResponse({"success": True, "message": message, "num_paused_requests": 0})

    async def pause(self, _: Request) -> Response:
        self.may_run.clear()
        return JSONResponse({"message": "Generation paused successfully.", "status": "ok"})

    async def resume(self, _: Request) -> Response:
        self.may_run.set()
        return JSONResponse({"message": "Generation continued successfully.", "status": "ok"})

    async def abort(self, request: Request) -> Response:
        self.aborted.append((await request.json())["rid"])
        return Response()

    async def generate(self, request: Request) -> Response:
        body = await request.json()
        problem = self._problem(body)
        if not body.get("stream"):
            if problem:
                return JSONResponse({"error": {"message": problem}}, 400)
            events = [event async for event in self._events(body)]
            return JSONResponse(events[-1])

        async def lines() -> AsyncIterator[bytes]:
            if problem:
                error = {"message": problem, "type": "invalid_request_error", "code": 400, "retryable": False}
                yield b"data: " + json.dumps({"error": error}).encode() + b"\n\n"
            else:
                async for event in self._events(body):
                    yield b"data: " + json.dumps(event, ensure_ascii=False).encode() + b"\n\n"
            yield b"data: [DONE]\n\n"

        return StreamingResponse(lines(), media_type="text/event-stream")

    def _problem(self, body: dict[str, Any]) -> str:
        ids, sampling, context = body["input_ids"], body["sampling_params"], self.base.config.max_position_embeddings
        if not ids:
            return "input_ids cannot be empty."
        if len(ids) >= context:
            return f"The input ({len(ids)} tokens) is longer than the model's context length ({context} tokens)."
        if len(ids) + sampling.get("max_new_tokens", 128) > context:
            return f"Requested token count exceeds the model's maximum context length of {context} tokens."
        if body.get("lora_path") and body["lora_path"] not in self.adapters:
            return (
                f"Got LoRA adapter that has never been loaded: {body['lora_path']}\n"
                f"All loaded adapters: {list(self.adapters)}."
            )
        if sampling.get("json_schema") and not self.grammars:
            return "Grammar-based generation (json_schema, regex, ebnf, structural_tag) is not supported"
        if sampling.get("temperature", 1.0) < 0:
            return f"temperature must be a non-negative finite number, got {sampling['temperature']}."
        return ""

    async def _events(self, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        sampling = body["sampling_params"]
        rid = body.get("rid") or uuid.uuid4().hex
        stops = sampling.get("stop") or []
        temperature, limit = sampling.get("temperature", 1.0), sampling.get("max_new_tokens", 128)
        generator = torch.Generator()
        generator.manual_seed(sampling.get("sampling_seed", 42)) if self.seeded else generator.seed()
        drawn: list[int] = []
        entries: list[list[Any]] = []
        probed: list[Any] = []
        tops: list[Any] = []
        spans: list[dict[str, Any]] = []
        reason: dict[str, Any] | None = None
        grammar = self._grammar(sampling["json_schema"]) if sampling.get("json_schema") else None
        self.running += 1
        try:
            while reason is None:
                await asyncio.sleep(0)
                await self.may_run.wait()
                await self._speak()
                if self.die_after is not None and len(drawn) >= self.die_after:
                    raise ConnectionResetError("the server was killed")
                logits = self.logits(body["input_ids"] + drawn, body.get("lora_path"))
                warm = logits if self.original_logprobs or not temperature else logits / temperature
                logprobs = warm.log_softmax(-1)
                if grammar is not None:
                    allowed = torch.frombuffer(bytearray(grammar.compute_logit_bias()), dtype=torch.uint8) > 0
                    logits = logits.masked_fill(~allowed, -torch.inf)
                token = self._draw(logits, temperature, sampling.get("top_p", 1.0), generator)
                if grammar is not None:
                    grammar.consume_token(token)
                drawn.append(token)
                self.generated += 1
                entries.append([float(logprobs[token]), token, None])
                if most := body.get("top_logprobs_num"):
                    best = logprobs.topk(most)
                    pairs = zip(best.values.tolist(), best.indices.tolist(), strict=True)
                    tops.append([[value, i, None] for value, i in pairs])
                if asked := body.get("token_ids_logprob"):
                    probed.append([[float(logprobs[i]), i, None] for i in asked])
                if spans and spans[-1]["version"] == self.weight_version:
                    spans[-1]["end"] = len(drawn)
                else:
                    spans.append({"version": self.weight_version, "start": len(drawn) - 1, "end": len(drawn)})
                tail = self.tokenizer.decode(drawn)
                matched = next((stop for stop in stops if stop in tail), None)
                if rid in self.aborted:
                    reason = {"type": "abort", "message": "Abort in running batch", "status_code": None}
                elif matched is not None:
                    reason = {"type": "stop", "matched": matched}
                elif token == self.tokenizer.eos_token_id and not sampling.get("ignore_eos"):
                    reason = {"type": "stop", "matched": token}
                elif len(drawn) >= limit:
                    reason = {"type": "length", "length": limit}
                told = slice(-1, None) if self.incremental else slice(None)
                meta = {
                    "id": rid, "finish_reason": reason, "prompt_tokens": len(body["input_ids"]),
                    "weight_version": self.weight_version, "num_retractions": 0, "input_token_logprobs": [],
                    "output_token_logprobs": entries[told], "output_token_logprobs_length": len(drawn),
                    "reasoning_tokens": 0, "completion_tokens": len(drawn), "cached_tokens": 0,
                    "cached_tokens_details": None, "dp_rank": None,
                }  # fmt: skip
                if probed:
                    meta |= {"output_token_ids_logprobs": probed[told], "input_token_ids_logprobs": []}
                if tops:
                    meta |= {"output_top_logprobs": tops[told], "input_top_logprobs": []}
                if reason is not None:
                    meta |= {"weight_versions": spans, "e2e_latency": 0.1}
                yield {
                    "text": self.tokenizer.decode(drawn[told], skip_special_tokens=True),
                    "output_ids": drawn[told],
                    "meta_info": meta,
                }
        finally:
            self.running -= 1

    def _grammar(self, schema: str) -> LLMatcher:
        tokenizer = from_tokenizer(self.tokenizer, self.base.config.vocab_size)
        spacing = {"whitespace_flexible": False, "key_separator": ": ", "item_separator": ", "}
        return LLMatcher(tokenizer, LLMatcher.grammar_from_json_schema(schema, spacing))

    def app(self) -> Starlette:
        guarded = {name: Route(f"/{name}", self._guard(handler), methods=["POST"]) for name, handler in zip(
            ADMIN, (self.load_lora, self.unload_lora, self.update, self.abort, self.pause, self.resume), strict=True
        )}  # fmt: skip
        return Starlette(routes=[
            Route("/health", self.health), Route("/model_info", self.model_info),
            Route("/server_info", self.server_info), Route("/v1/models", self.models),
            Route("/generate", self.generate, methods=["POST"]), *guarded.values(),
        ])  # fmt: skip
