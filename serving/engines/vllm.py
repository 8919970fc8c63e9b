"""vLLM behind the seam: one server, or several replicas that all hold the same versions.

A version is a LoRA adapter that every worker has loaded, or the bare base, whose weights stay. Written against vLLM
0.32.0; docs/engines.md tells how it must be started.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, ClassVar

from serving.engines.base import FinishReason, GenerateRequest, TokenChunk
from serving.engines.http_worker import WorkerFailed
from serving.engines.replicas import Replicas, Served
from serving.engines.vllm_worker import VLLMDescription, VLLMWorker


class VLLMEngine(Replicas[VLLMWorker, VLLMDescription]):
    """`key` is the workers' API key. A closed connection aborts a request."""

    name: ClassVar[str] = "vLLM"
    raw_logprobs: ClassVar[str] = "--logprobs-mode raw_logprobs"
    make_worker = VLLMWorker

    async def describe(self, worker: VLLMWorker) -> VLLMDescription:
        return await worker.describe()

    async def draw(
        self, worker: VLLMWorker, request: GenerateRequest, served: Served
    ) -> AsyncGenerator[TokenChunk, None]:
        sampling = request.sampling
        body: dict[str, Any] = {
            "model": self.described.served_name if served.adapter is None else request.version,
            "prompt": request.token_ids,
            "max_tokens": min(sampling.max_tokens, self.described.context - len(request.token_ids)),
            "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0, "min_p": 0.0,
            "repetition_penalty": 1.0, "stop": list(request.stop), "logprobs": request.top_logprobs or 0,
        }  # fmt: skip
        if sampling.seed is not None:
            body["seed"] = sampling.seed
        if request.json_schema is not None:
            body["structured_outputs"] = {"json": request.json_schema}
        async with aclosing(worker.complete(body)) as events:
            async for event in events:
                if event["choices"]:
                    yield _chunk(event["choices"][0], request, worker)


def _chunk(choice: dict[str, Any], request: GenerateRequest, worker: VLLMWorker) -> TokenChunk:
    ids, told = choice["token_ids"], choice["logprobs"]
    if told["tokens"] != [f"token_id:{i}" for i in ids]:
        raise WorkerFailed(f"vLLM at {worker.url} gives logprobs of {told['tokens']} with the tokens {ids}.")
    tops = None
    if request.top_logprobs:
        tops = [_likeliest(each)[: request.top_logprobs] for each in told["top_logprobs"]]
    reason = _finish(choice["finish_reason"], choice["stop_reason"], worker)
    return TokenChunk(ids, told["token_logprobs"], request.version, reason, tops)


def _likeliest(told: dict[str, float]) -> list[tuple[int, float]]:
    """(id, logprob), the likeliest first. The token drawn stands among them wherever it ranks."""
    pairs = [(int(token.removeprefix("token_id:")), logprob) for token, logprob in told.items()]
    return sorted(pairs, key=lambda pair: -pair[1])


def _finish(reason: str | None, stop: int | str | None, worker: VLLMWorker) -> FinishReason | None:
    """`stop`: the string, or the token's id where that isn't the end of turn that the tokenizer names."""
    match reason:
        case None:
            return None
        case "stop":
            return "stop" if isinstance(stop, str) else "eos"
        case "length":
            return "length"
        case "abort":
            raise WorkerFailed(f"vLLM at {worker.url} aborted the request.")
    raise WorkerFailed(f"vLLM at {worker.url} ended for a reason that vLLM 0.32.0 doesn't have: {reason!r}")
