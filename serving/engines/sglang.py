"""SGLang behind the seam: one server, or several replicas that all hold the same versions.

A version is a LoRA adapter that every worker has loaded, or full weights: `sglang_weights.py` changes those.
A worker that fails is drained: it gets no requests, `health` names it and why, and it comes back by itself when it
answers again and has been given the versions that it missed. Written against SGLang 0.5.23; docs/engines.md tells how
it must be started.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from pathlib import Path

from serving.engines.base import (
    EngineError,
    GenerateRequest,
    PromptTooLong,
    TokenChunk,
    UnknownVersion,
    WeightsRefused,
)
from serving.engines.sglang_checks import check_adapter, vocabulary
from serving.engines.sglang_events import chunk_of, generate_body
from serving.engines.sglang_worker import AdapterGone, Description, Patience, Refused, Worker, WorkerFailed
from serving.engines.users import Users

log = logging.getLogger(__name__)

_MAX_STOPS = 32  # SGLang's own limit
_MISSES = 2  # looks in a row without an answer: one may be a long prompt
_SAME = 0.05  # nats: far over rounding, far under what a temperature of a half changes


@dataclass
class Served:
    """One version. `adapter`: its folder, None for the weights themselves; `label` is theirs, as workers report it."""

    version: str
    adapter: Path | None
    label: str
    users: Users = field(default_factory=Users)


@dataclass(frozen=True)
class Weights:
    """What lies under all adapters: the label that workers report, and their folder."""

    label: str
    path: str


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
        self.in_place: Weights | None = None  # full weights instead of the model's own
        self.replaced: set[str] = set()  # versions whose weights are gone: answers under way go on with the new ones
        self.own: Weights | None = None  # the model's own
        self.probes: dict[Weights, list[float]] = {}  # what each set of weights said to the probe prompt
        self.description: Description | None = None
        self._known_weights: frozenset[str] = frozenset()
        self.changing = asyncio.Lock()  # one change of versions at a time
        self._keepers: list[asyncio.Task[None]] = []
        self._aborts: set[asyncio.Task[None]] = set()

    @property
    def context_length(self) -> int:
        return self.described.context

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

    @property
    def described(self) -> Description:
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

    async def start(self, weights: Collection[str] = ()) -> None:
        """Meet the workers. `weights`: the full-weight versions that there are, one of which may be in place already.

        Raises EngineError when none can be used; those that can't are drained and tried again.
        """
        self._known_weights = frozenset(weights)
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
            if path is None and self.in_place is not None:
                raise WeightsRefused(f"Version {version!r} is the bare base, which {self.weights!r} has replaced.")
            if path is not None:
                await self._spread(version, await asyncio.to_thread(check_adapter, version, path, self.described))
            self.versions[version] = Served(version, path, self.label)

    async def swap(self, version: str | None, path: Path | None) -> None:
        from serving.engines.sglang_weights import swap_weights

        await swap_weights(self, version, path)

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
            served = self.versions.get(self.weights)
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
        rid = uuid.uuid4().hex
        body = generate_body(request, rid, self.described.context, lora=served.adapter is not None)
        seen, done, label = 0, False, worker.label
        worker.in_flight += 1
        try:
            async with aclosing(worker.stream(body)) as events:
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
                    if done:
                        return
            raise WorkerFailed(f"SGLang at {worker.url} stopped in mid-answer.")
        finally:
            worker.in_flight -= 1
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
            if self.in_place is not None and described.weight_version == self.base.label:  # it was started anew
                await worker.update_weights(self.in_place.path, self.in_place.label)
                described = await worker.describe()
            if self.description is None:
                self._meet(described)
            self._compare(worker, described)
            self.probes.setdefault(self.in_place or self.base, await _check_logprobs(worker))
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

    def _meet(self, described: Description) -> None:
        """What the first worker says. Full weights may be in place from an earlier Whetstone."""
        served = Weights(described.weight_version, described.model_path)
        if served.label in self._known_weights:
            self.own, self.in_place = Weights("default", described.tokenizer_path), served
            self.versions[served.label] = Served(served.label, None, served.label)
        else:
            self.own = served
        self.description = replace(described, model_path=self.own.path)
        self._vocabulary = vocabulary(self.own.path)

    def _compare(self, worker: Worker, described: Description) -> None:
        first = self.described
        if described.weight_version != self.label:
            raise Refused(
                f"SGLang at {worker.url} serves the weights {described.weight_version!r}, not {self.label!r}: another "
                "process changed them."
            )
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


async def _check_logprobs(worker: Worker) -> list[float]:
    """Whether its logprobs are the policy's own, before temperature: an environment variable of the server decides.
    Those of the probe prompt."""
    cool, warm = await worker.probe(0.5), await worker.probe(1.0)
    if any(abs(a - b) > _SAME * max(1.0, abs(b)) for a, b in zip(cool, warm, strict=True)):
        raise Refused(
            f"SGLang at {worker.url} gives logprobs after temperature, which training can't use: start it with "
            "SGLANG_RETURN_ORIGINAL_LOGPROB=1 in its environment."
        )
    return warm
