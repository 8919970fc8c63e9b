"""SGLang behind the seam: one server, or several replicas that all hold the same versions.

A version is a LoRA adapter that every worker has loaded, or the bare base; `sglang_weights.py` changes the base itself.
Written against SGLang 0.5.23; docs/engines.md tells how it must be started.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from serving.engines.base import EngineError, GenerateRequest, GrammarFailed, TokenChunk
from serving.engines.http_worker import WorkerFailed
from serving.engines.replicas import Replicas, Served
from serving.engines.sglang_worker import SGLangDescription, Worker


class SGLangEngine(Replicas[Worker, SGLangDescription]):
    """`key` is the workers' admin key. Full weights lie under all adapters."""

    name: ClassVar[str] = "SGLang"
    raw_logprobs: ClassVar[str] = "SGLANG_RETURN_ORIGINAL_LOGPROB=1 in its environment"
    make_worker = Worker
    weights: tuple[str, str] | None = None  # version and folder of full weights that were swapped in

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.replaced: set[str] = set()  # versions whose weights are gone: answers under way go on with the new ones
        self._aborts: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        await asyncio.gather(*self._aborts, return_exceptions=True)
        await super().close()

    def serve(self, version: str, path: Path | None) -> Served:
        if path is None and self.weights is not None:
            raise EngineError(f"Version {version!r} is the bare base, which {self.weights[0]!r} has replaced.")
        return super().serve(version, path)

    def serving(self, version: str) -> Served:
        if version in self.replaced and version not in self.versions and self.weights is not None:
            version = self.weights[0]
        return super().serving(version)

    def check(self, request: GenerateRequest) -> None:
        super().check(request)
        if request.json_schema is not None:
            raise GrammarFailed(
                "JSON schemas (response_format, a tool_choice that forces a call) need the embedded engine."
            )

    async def draw(self, worker: Worker, request: GenerateRequest, served: Served) -> AsyncGenerator[TokenChunk, None]:
        sampling, rid = request.sampling, uuid.uuid4().hex
        body: dict[str, Any] = {
            "rid": rid, "input_ids": request.token_ids, "stream": True, "return_logprob": True,
            "sampling_params": {
                "max_new_tokens": min(sampling.max_tokens, self.described.context - len(request.token_ids)),
                "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": -1, "min_p": 0.0,
                "stop": list(request.stop), "skip_special_tokens": False,
            },
        }  # fmt: skip
        if sampling.seed is not None:
            body["sampling_params"]["sampling_seed"] = sampling.seed
        if request.top_logprobs:
            body["top_logprobs_num"] = request.top_logprobs
        if served.adapter is not None:
            body["lora_path"] = request.version
        seen, done, label = 0, False, worker.label
        try:
            async with aclosing(worker.generate(body)) as events:
                async for event in events:
                    chunk = _chunk(event, seen, worker)
                    if not seen:
                        self._check_label(worker, chunk.version, label)
                    seen += len(chunk.token_ids)
                    swapped = self.weights is not None and chunk.version == self.weights[0]
                    version = chunk.version if swapped and served.adapter is None else request.version
                    done = chunk.finish_reason is not None
                    yield replace(chunk, version=version)
        finally:
            if not done:
                self._abort(worker, rid)

    def _check_label(self, worker: Worker, label: str, at_start: str) -> None:
        """A worker that was started anew answers with its first weights, under another label."""
        behind = self.workers if worker is self._router else [worker]
        if label not in {at_start, *(w.label for w in behind)} and not any(w.paused for w in behind):
            raise WorkerFailed(f"SGLang at {worker.url} answers with weights {label!r}, not {behind[0].label!r}.")

    def _abort(self, worker: Worker, rid: str) -> None:
        """In the background: the caller may be a task that is being cancelled. A router may have chosen any worker."""
        for where in self.workers if worker is self._router else [worker]:
            task = asyncio.create_task(where.abort(rid))
            self._aborts.add(task)
            task.add_done_callback(self._aborts.discard)

    async def describe(self, worker: Worker) -> SGLangDescription:
        described = await worker.describe()
        if self.weights is not None and described.weight_version != self.weights[0]:
            await worker.update_weights(self.weights[1], self.weights[0])
            described = await worker.describe()
        worker.label = described.weight_version
        return described

    def compare(self, worker: Worker, described: SGLangDescription) -> None:
        if self.weights is None:
            super().compare(worker, described)


def _chunk(event: dict[str, Any], seen: int, worker: Worker) -> TokenChunk:
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
