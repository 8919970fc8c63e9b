"""SGLang behind the seam: one server, or several replicas that all hold the same versions.

A version is a LoRA adapter that every worker has loaded, or the bare base; `sglang_weights.py` changes the base itself.
A worker that fails is drained: it gets no requests, `health` names it and why, and it comes back by itself when it
answers again and has been given the versions that it missed. Written against SGLang 0.5.23; docs/engines.md tells how
it must be started.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from serving.engines.base import EngineError, GenerateRequest, GrammarFailed, PromptTooLong, TokenChunk, UnknownVersion
from serving.engines.http_worker import AdapterGone, Patience, Refused, WorkerFailed
from serving.engines.sglang_checks import check_adapter, vocabulary
from serving.engines.sglang_worker import SGLangDescription, Worker
from serving.engines.users import Users

log = logging.getLogger(__name__)

_MAX_STOPS = 32  # SGLang's own limit
_MISSES = 2  # looks in a row without an answer: one may be a long prompt
_SAME = 0.05  # nats: far over rounding, far under what a temperature of a half changes


@dataclass
class Served:
    """One version. `adapter`: its folder, None for the base weights."""

    adapter: Path | None
    users: Users = field(default_factory=Users)


class SGLangEngine:
    """`urls` of the workers; `key` is their admin key. `start` comes first, `close` last.

    With `router_url`, generation goes through that router, which then chooses the worker, and a version counts as
    loaded only when every worker has it. Without, a request goes to the healthy worker with the fewest in flight.
    """

    def __init__(
        self,
        urls: Sequence[str],
        key: str | None = None,
        router_url: str | None = None,
        patience: Patience | None = None,
    ) -> None:
        self._patience = patience or Patience()
        self.workers = [Worker(url, key, self._patience) for url in urls]
        self._router = Worker(router_url, key, self._patience) if router_url else None
        self._vocabulary: int | None = None  # an id from it on kills a server
        self.versions: dict[str, Served] = {}
        self.weights: tuple[str, str] | None = None  # version and folder of full weights that were swapped in
        self.replaced: set[str] = set()  # versions whose weights are gone: answers under way go on with the new ones
        self.description: SGLangDescription | None = None
        self.changing = asyncio.Lock()  # one change of versions at a time
        self._keepers: list[asyncio.Task[None]] = []
        self._aborts: set[asyncio.Task[None]] = set()

    @property
    def context_length(self) -> int:
        return self.described.context

    @property
    def described(self) -> SGLangDescription:
        if self.description is None:
            raise EngineError("The SGLang engine hasn't been started.")
        return self.description

    def healthy(self) -> list[Worker]:
        """The workers that get requests. Raises EngineError when there are none."""
        fit = [worker for worker in self.workers if not worker.problem]
        if not fit:
            raise EngineError("No SGLang worker can be used: " + "; ".join(w.problem for w in self.workers))
        return fit

    def loaded(self) -> list[str]:
        return list(self.versions)

    async def start(self) -> None:
        """Meet the workers. Raises EngineError when none can be used; those that can't are drained and tried again."""
        await asyncio.gather(*map(self._bring_up, self.workers))
        self.healthy()
        if self._router is not None:
            await self._router.look()
            self._router.problem = ""
        if not self.described.seeded:
            log.warning("SGLang runs without --enable-deterministic-inference: seeds have no effect on what it draws")
        everyone = [*self.workers, *([self._router] if self._router else [])]
        self._keepers = [asyncio.create_task(self._keep(w), name=f"keeper of {w.url}") for w in everyone]

    async def close(self) -> None:
        for task in self._keepers:
            task.cancel()
        await asyncio.gather(*self._keepers, *self._aborts, return_exceptions=True)
        for worker in [*self.workers, *([self._router] if self._router else [])]:
            await worker.close()

    async def load(self, version: str, path: Path | None) -> None:
        """Give the adapter to every worker. Loading a loaded version does nothing.

        A worker that fails or refuses what another took is drained. Raises EngineError when none took it, or, behind
        a router (which may choose any worker), not all; then nothing has changed.
        """
        async with self.changing:
            if version in self.versions:
                return
            if path is None and self.weights is not None:
                raise EngineError(f"Version {version!r} is the bare base, which {self.weights[0]!r} has replaced.")
            if path is not None:
                await self._spread(version, await asyncio.to_thread(check_adapter, version, path, self.described))
            self.versions[version] = Served(path)

    async def _spread(self, version: str, path: str) -> None:
        asked = self.healthy()
        failed = await _on_each(asked, lambda worker: worker.load_adapter(version, path))
        missing = {w: w.problem for w in self.workers if w not in asked} if self._router else {}
        if len(failed) == len(asked) or (self._router and (failed or missing)):
            await _on_each([w for w in asked if w not in failed], lambda worker: worker.unload_adapter(version))
            reasons = "; ".join(map(str, [*failed.values(), *missing.values()]))
            raise EngineError(
                f"Version {version!r} can't be loaded from {path}: {reasons}"
                + (" (behind a router every worker must take it)" if self._router and len(failed) < len(asked) else "")
            )
        for worker, error in failed.items():
            self.drain(worker, f"it lacks version {version!r}: {error}")

    async def unload(self, version: str) -> None:
        served = self.versions.pop(version, None)
        if served is None:
            return
        await served.users.idle.wait()
        async with self.changing:
            if served.adapter is not None and version not in self.versions:  # it may have been loaded again
                able = [worker for worker in self.workers if not worker.problem]
                failed = await _on_each(able, lambda worker: worker.unload_adapter(version))
                for worker, error in failed.items():
                    self.drain(worker, str(error))

    async def health(self) -> dict[str, object]:
        """At once, from what requests and the looks every few seconds have shown."""
        fit = [worker for worker in self.workers if not worker.problem]
        router = {"router": {"url": self._router.url, "problem": self._router.problem or None}} if self._router else {}
        return router | {
            "ok": bool(fit and self.versions and not (self._router and self._router.problem)),
            "engine": "sglang",
            "versions": {version: bool(fit) for version in self.versions},
            "workers": {w.url: {"problem": w.problem or None, "in_flight": w.in_flight} for w in self.workers},
            "seeded": self.description is not None and self.description.seeded,
        }

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenChunk, None]:
        """A worker that fails before the first token is replaced by another; later, the answer fails."""
        served = self.versions.get(request.version)
        if served is None and request.version in self.replaced and self.weights is not None:
            served = self.versions.get(self.weights[0])
        if served is None:
            raise UnknownVersion(f"Version {request.version!r} isn't loaded; loaded are: {', '.join(self.versions)}.")
        self._check(request)
        began = False
        tried: set[Worker] = set()
        with served.users.one():
            while True:
                worker = self._choose(tried)
                try:
                    async with aclosing(self._generate(worker, request, served)) as chunks:
                        async for chunk in chunks:
                            began = True
                            yield chunk
                    return
                except (WorkerFailed, AdapterGone) as error:
                    self.drain(worker, str(error))
                    if began:
                        raise
                    tried.add(worker)

    def _check(self, request: GenerateRequest) -> None:
        context, prompt = self.described.context, request.token_ids
        if len(prompt) >= context:
            raise PromptTooLong(f"The prompt has {len(prompt)} tokens; the context holds {context}. Shorten it.")
        if not prompt:
            raise EngineError("The prompt is empty.")
        if min(prompt) < 0 or (self._vocabulary is not None and max(prompt) >= self._vocabulary):
            raise EngineError(
                f"The prompt holds a token id outside of the model's vocabulary of {self._vocabulary}: render it with "
                "the tokenizer of the model that is served."
            )
        if request.json_schema is not None:
            raise GrammarFailed(
                "JSON schemas (response_format, a tool_choice that forces a call) need the embedded engine."
            )
        if len(request.stop) > _MAX_STOPS:
            raise EngineError(f"{len(request.stop)} stop strings; SGLang takes at most {_MAX_STOPS}.")

    def _choose(self, tried: set[Worker]) -> Worker:
        if self._router is not None:
            if self._router in tried:
                raise EngineError(self._router.problem)
            return self._router
        fit = [worker for worker in self.healthy() if worker not in tried]
        if not fit:
            raise EngineError("Every SGLang worker failed: " + "; ".join(w.problem for w in tried if w.problem))
        return min(fit, key=lambda worker: worker.in_flight)

    async def _generate(
        self, worker: Worker, request: GenerateRequest, served: Served
    ) -> AsyncGenerator[TokenChunk, None]:
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
        worker.in_flight += 1
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
                    if done:
                        return
            raise WorkerFailed(f"SGLang at {worker.url} stopped in mid-answer.")
        finally:
            worker.in_flight -= 1
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

    def drain(self, worker: Worker, problem: str) -> None:
        """Send it no more requests, until its keeper finds it well again."""
        if not worker.problem:
            log.error("an SGLang worker is drained: %s", problem)
        worker.problem = problem

    async def _keep(self, worker: Worker) -> None:
        while True:
            await asyncio.sleep(self._patience.look)
            if worker.paused:
                continue
            if worker.problem and worker is not self._router:
                with contextlib.suppress(EngineError):
                    await worker.look()  # first without the lock: one that hangs must not hold up a load
                    async with self.changing:
                        await self._bring_up(worker)
                if not worker.problem:
                    log.warning("the SGLang worker %s is back", worker.url)
                continue
            try:
                await worker.look()
                worker.missed = 0
                if worker is self._router:
                    worker.problem = ""
            except EngineError as error:
                worker.missed += 1
                if worker.missed >= _MISSES and not worker.paused:
                    self.drain(worker, str(error))

    async def _bring_up(self, worker: Worker) -> None:
        """Meet a worker and give it the versions that it lacks; `problem` then says whether it can be used."""
        try:
            await worker.look()
            described = await worker.describe()
            if self.weights is not None and described.weight_version != self.weights[0]:
                await worker.update_weights(self.weights[1], self.weights[0])
                described = await worker.describe()
            if self.description is None:
                self.description = described
                if self._vocabulary is None:
                    self._vocabulary = vocabulary(described.model_path)
            self._compare(worker, described)
            await _check_logprobs(worker)
            worker.label = described.weight_version
            there = await worker.adapters()
            wanted = {v: str(s.adapter.absolute()) for v, s in self.versions.items() if s.adapter is not None}
            for version in there.keys() & wanted.keys():
                if there[version] != wanted[version]:
                    await worker.unload_adapter(version)
                    del there[version]
            for version in wanted.keys() - there.keys():
                await worker.load_adapter(version, wanted[version])
        except EngineError as error:
            worker.problem = str(error)
        else:
            worker.problem, worker.missed = "", 0

    def _compare(self, worker: Worker, described: SGLangDescription) -> None:
        first = self.described
        if (described.model_path, described.context) != (first.model_path, first.context) and self.weights is None:
            raise Refused(
                f"SGLang at {worker.url} serves {described.model_path} with a context of {described.context}, another "
                f"worker {first.model_path} with {first.context}: replicas must be alike."
            )


async def _on_each(workers: Sequence[Worker], act: Callable[[Worker], Awaitable[None]]) -> dict[Worker, EngineError]:
    """Act on all at once; the errors of those that failed."""
    results = await asyncio.gather(*map(act, workers), return_exceptions=True)
    failed = {}
    for worker, result in zip(workers, results, strict=True):
        if isinstance(result, EngineError):
            failed[worker] = result
        elif isinstance(result, BaseException):
            raise result
    return failed


async def _check_logprobs(worker: Worker) -> None:
    """Whether its logprobs are the policy's own, before temperature: an environment variable of the server decides."""
    cool, warm = await worker.probe(0.5), await worker.probe(1.0)
    if any(abs(a - b) > _SAME * max(1.0, abs(b)) for a, b in zip(cool, warm, strict=True)):
        raise Refused(
            f"SGLang at {worker.url} gives logprobs after temperature, which training can't use: start it with "
            "SGLANG_RETURN_ORIGINAL_LOGPROB=1 in its environment."
        )


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
