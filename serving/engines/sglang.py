"""SGLang behind the seam: one server, or several replicas that all hold the same versions.

A version is a LoRA adapter that every worker has loaded, or full weights: `sglang_weights.py` changes those.
Written against SGLang 0.5.23; docs/engines.md tells how it must be started.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from serving.engines.base import EngineError, GenerateRequest, TokenChunk, WeightsRefused
from serving.engines.http_worker import Refused, WorkerFailed
from serving.engines.replicas import Replicas, Served
from serving.engines.sglang_events import chunk_of, generate_body
from serving.engines.sglang_worker import SGLangDescription, Worker


@dataclass(frozen=True)
class Weights:
    """What lies under all adapters: the label that workers report, and their folder."""

    label: str
    path: str


class SGLangEngine(Replicas[Worker, SGLangDescription]):
    """`key` is the workers' admin key. Full weights lie under all adapters."""

    name: ClassVar[str] = "SGLang"
    raw_logprobs: ClassVar[str] = "SGLANG_RETURN_ORIGINAL_LOGPROB=1 in its environment"
    make_worker = Worker

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.in_place: Weights | None = None  # full weights instead of the model's own
        self.replaced: set[str] = set()  # versions whose weights are gone: answers under way go on with the new ones
        self.own: Weights | None = None  # the model's own
        self.probes: dict[Weights, list[float]] = {}  # what each set of weights said to the probe prompt
        self._aborts: set[asyncio.Task[None]] = set()

    @property
    def can_swap(self) -> bool:
        return True

    @property
    def weights(self) -> str | None:
        return None if self.in_place is None else self.in_place.label

    @property
    def label(self) -> str:
        """What every worker should report."""
        return (self.in_place or self.base).label

    @property
    def base(self) -> Weights:
        if self.own is None:
            raise EngineError("The SGLang engine hasn't been started.")
        return self.own

    async def close(self) -> None:
        await asyncio.gather(*self._aborts, return_exceptions=True)
        await super().close()

    async def swap(self, version: str | None, path: Path | None) -> None:
        from serving.engines.sglang_weights import swap_weights

        await swap_weights(self, version, path)

    def serve(self, version: str, path: Path | None) -> Served:
        if path is None and self.in_place is not None:
            raise WeightsRefused(f"Version {version!r} is the bare base, which {self.weights!r} has replaced.")
        return Served(version, path, self.label)

    def serving(self, version: str) -> Served:
        if version in self.replaced and version not in self.versions and self.weights is not None:
            version = self.weights
        return super().serving(version)

    async def draw(self, worker: Worker, request: GenerateRequest, served: Served) -> AsyncGenerator[TokenChunk, None]:
        rid = uuid.uuid4().hex
        body = generate_body(request, rid, self.described.context, lora=served.adapter is not None)
        seen, done, label = 0, False, worker.label
        try:
            async with aclosing(worker.generate(body)) as events:
                async for event in events:
                    chunk = chunk_of(event, seen, worker)
                    if not seen:
                        self._check_label(worker, chunk.version, label)
                    seen += len(chunk.token_ids)
                    same = chunk.version == served.label
                    if served.adapter is not None and not same:
                        raise WorkerFailed(
                            f"SGLang at {worker.url} answers with weights {chunk.version!r} under the adapter "
                            f"{request.version!r}, which was loaded over {served.label!r}."
                        )
                    done = chunk.finish_reason is not None
                    yield replace(chunk, version=served.version if same else chunk.version)
        finally:
            if not done:
                self._abort(worker, rid)

    def _check_label(self, worker: Worker, label: str, at_start: str) -> None:
        """A worker that was started anew answers with the model's own weights. Other full weights than ours were put
        there by another process, which this one will follow: the answer names them."""
        behind = self.workers if worker is self._router else [worker]
        known = {at_start, *(w.label for w in behind)}
        if label == self.base.label and label not in known and not any(w.paused for w in behind):
            raise WorkerFailed(f"SGLang at {worker.url} answers with weights {label!r}, not {behind[0].label!r}.")

    def _abort(self, worker: Worker, rid: str) -> None:
        """In the background: the caller may be a task that is being cancelled. A router may have chosen any worker."""
        for where in self.workers if worker is self._router else [worker]:
            task = asyncio.create_task(where.abort(rid))
            self._aborts.add(task)
            task.add_done_callback(self._aborts.discard)

    async def describe(self, worker: Worker) -> SGLangDescription:
        described = await worker.describe()
        if self.in_place is not None and described.weight_version == self.base.label:  # it was started anew
            await worker.update_weights(self.in_place.path, self.in_place.label)
            described = await worker.describe()
        return described

    def meet(self, described: SGLangDescription) -> SGLangDescription:
        """Full weights may be in place from an earlier Whetstone."""
        served = Weights(described.weight_version, described.model_path)
        if served.label in self.known_weights:
            self.own, self.in_place = Weights("default", described.tokenizer_path), served
            self.versions[served.label] = Served(served.label, None, served.label)
        else:
            self.own = served
        return replace(described, model_path=self.own.path)

    def compare(self, worker: Worker, described: SGLangDescription) -> None:
        if described.weight_version != self.label:
            raise Refused(
                f"SGLang at {worker.url} serves the weights {described.weight_version!r}, not {self.label!r}: another "
                "process changed them."
            )
        if self.weights is None:
            super().compare(worker, described)

    def probed(self, worker: Worker, described: SGLangDescription, probe: list[float]) -> None:
        self.probes.setdefault(self.in_place or self.base, probe)
        worker.label = described.weight_version
