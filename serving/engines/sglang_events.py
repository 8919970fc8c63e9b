"""One `/generate` of SGLang: what is asked, and what its events say."""

from __future__ import annotations

import json
from typing import Any

from serving.engines.base import GenerateRequest, TokenChunk
from serving.engines.http_worker import WorkerFailed
from serving.engines.sglang_worker import Worker


def generate_body(request: GenerateRequest, rid: str, context: int, lora: bool) -> dict[str, Any]:
    """`context`: tokens that the server holds; it refuses to be asked for more. `lora`: the version is an adapter."""
    sampling = request.sampling
    params: dict[str, Any] = {
        "max_new_tokens": min(sampling.max_tokens, context - len(request.token_ids)),
        "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": -1, "min_p": 0.0,
        "stop": list(request.stop), "skip_special_tokens": False,
    }  # fmt: skip
    if sampling.seed is not None:
        params["sampling_seed"] = sampling.seed
    if request.json_schema is not None:
        params["json_schema"] = json.dumps(dict(request.json_schema))
    body: dict[str, Any] = {
        "rid": rid, "input_ids": request.token_ids, "stream": True, "return_logprob": True, "sampling_params": params,
    }  # fmt: skip
    if request.top_logprobs:
        body["top_logprobs_num"] = request.top_logprobs
    if lora:
        body["lora_path"] = request.version
    return body


def chunk_of(event: dict[str, Any], seen: int, worker: Worker) -> TokenChunk:
    """An event as a chunk whose version is the label of the weights. Events hold all tokens so far, or, with
    --incremental-streaming-output, the new ones alone."""
    meta, ids = event["meta_info"], event["output_ids"]
    total = meta["completion_tokens"]
    new = ids[seen:] if len(ids) == total else ids
    entries = meta.get("output_token_logprobs", [])
    entries = entries[len(entries) - len(new) :]
    if seen + len(new) != total or [entry[1] for entry in entries] != list(new):
        raise WorkerFailed(f"SGLang at {worker.url} lost tokens: {total} drawn, {seen} + {len(new)} told.")
    tops = meta.get("output_top_logprobs")
    return TokenChunk(
        list(new),
        [float(entry[0]) for entry in entries],
        meta.get("weight_version", ""),
        _finish(meta.get("finish_reason"), worker),
        tops and [[(int(top[1]), float(top[0])) for top in each] for each in tops[len(tops) - len(new) :]],
    )


def _finish(reason: dict[str, Any] | None, worker: Worker) -> Any:
    if reason is None:
        return None
    match reason["type"]:
        case "stop":
            return "stop" if isinstance(reason.get("matched"), str) else "eos"
        case "length":
            return "length"
        case "abort":
            raise worker.refusal(reason.get("status_code") or 400, reason.get("message") or "it was aborted")
    raise WorkerFailed(f"SGLang at {worker.url} ended for a reason that SGLang 0.5.23 doesn't have: {reason}")
