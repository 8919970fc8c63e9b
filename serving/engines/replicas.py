"""An engine of one server over HTTP, or of several replicas that all hold the same versions.

A version is a LoRA adapter that every worker has loaded, or the bare base. A worker that fails is drained: it gets no
requests, `health` names it and why, and it comes back by itself when it answers again and has been given the versions
that it missed. `sglang.py` and `vllm.py` say how their servers are asked for tokens.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Generic, TypeVar

from serving.engines.base import (
    EngineError,
    GenerateRequest,
    PromptTooLong,
    TokenChunk,
    UnknownVersion,
    WeightsRefused,
)
from serving.engines.checks import check_adapter, vocabulary
from serving.engines.http_worker import AdapterGone, Description, HttpWorker, Patience, Refused, Silent, WorkerFailed
from serving.engines.users import Users

log = logging.getLogger(__name__)

_MISSES = 2  # looks in a row without an answer: one may be a long prompt
_SAME = 0.05  # nats: far over rounding, far under what a temperature of a half changes


@dataclass
class Served:
    """One version. `adapter`: its folder, None for the weights themselves, whose label, where workers report one, is
    `label`."""

    version: str
    adapter: Path | None
    label: str = ""
    users: Users = field(default_factory=Users)


W = TypeVar("W", bound=HttpWorker)
D = TypeVar("D", bound=Description)


class Replicas(ABC, Generic[W, D]):
    """`urls` of the workers; `key` opens them. `start` comes first, `close` last.

    With `router_url`, generation goes through that router, which then chooses the worker, and a version counts as
    loaded only when every worker has it. Without, a request goes to the healthy worker with the fewest in flight.
    """

    name: ClassVar[str]
    raw_logprobs: ClassVar[str]  # what makes a server tell logprobs before temperature
    max_stops: ClassVar[int] = 32
    make_worker: type[W]

    def __init__(
        self,
        urls: Sequence[str],
        key: str | None = None,
        router_url: str | None = None,
        patience: Patience | None = None,
    ) -> None:
        self._patience = patience or Patience()
        self.workers = [self.make_worker(url, key, self._patience) for url in urls]
        self._router = self.make_worker(router_url, key, self._patience) if router_url else None
        self._vocabulary: int | None = None  # an id from it on kills a server
        self.versions: dict[str, Served] = {}
        self.description: D | None = None
        self.known_weights: frozenset[str] = frozenset()
        self.changing = asyncio.Lock()  # one change of versions at a time
        self._keepers: list[asyncio.Task[None]] = []

    @abstractmethod
    async def describe(self, worker: W) -> D:
        """What it says that it is, once the weights are in place. Raises Refused, WorkerFailed."""

    @abstractmethod
    def draw(self, worker: W, request: GenerateRequest, served: Served) -> AsyncGenerator[TokenChunk, None]:
        """One worker's chunks; the last has a `finish_reason`. Closing it aborts the request there."""

    def serve(self, version: str, path: Path | None) -> Served:
        """A version that is about to be loaded. Raises EngineError when it can't be, as things are."""
        return Served(version, path)

    def serving(self, version: str) -> Served:
        served = self.versions.get(version)
        if served is None:
            raise UnknownVersion(f"Version {version!r} isn't loaded; loaded are: {', '.join(self.versions)}.")
        return served

    @property
    def context_length(self) -> int:
        return self.described.context

    @property
    def can_swap(self) -> bool:
        return False

    @property
    def weights(self) -> str | None:
        return None

    async def swap(self, version: str | None, path: Path | None) -> None:
        if version is not None:
            raise WeightsRefused(
                f"Version {version!r} is full weights, which {self.name} can't change while it serves: serve them with "
                "engine = sglang."
            )

    @property
    def described(self) -> D:
        if self.description is None:
            raise EngineError(f"The {self.name} engine hasn't been started.")
        return self.description

    def healthy(self) -> list[W]:
        """The workers that get requests. Raises EngineError when there are none."""
        fit = [worker for worker in self.workers if not worker.problem]
        if not fit:
            raise EngineError(f"No {self.name} worker can be used: " + "; ".join(w.problem for w in self.workers))
        return fit

    def loaded(self) -> list[str]:
        return list(self.versions)

    async def start(self, weights: Collection[str] = ()) -> None:
        """Meet the workers. `weights`: the full-weight versions that there are, one of which may be in place already.

        Raises EngineError when none can be used; those that can't are drained and tried again.
        """
        self.known_weights = frozenset(weights)
        await asyncio.gather(*map(self._bring_up, self.workers))
        self.healthy()
        if self._router is not None:
            await self._router.look()
            self._router.problem = ""
        if not self.described.seeded:
            log.warning("%s draws by no seed: a seed has no effect", self.name)
        self._keepers = [asyncio.create_task(self._keep(w), name=f"keeper of {w.url}") for w in self._everyone]

    async def close(self) -> None:
        for task in self._keepers:
            task.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)
        for worker in self._everyone:
            await worker.close()

    @property
    def _everyone(self) -> list[W]:
        return [*self.workers, *([self._router] if self._router else [])]

    async def load(self, version: str, path: Path | None) -> None:
        """Give the adapter to every worker. Loading a loaded version does nothing.

        A worker that fails or refuses what another took is drained. Raises EngineError when none took it, or, behind
        a router (which may choose any worker), not all; then nothing has changed.
        """
        async with self.changing:
            if version in self.versions:
                return
            served = self.serve(version, path)
            if path is not None:
                checked = await asyncio.to_thread(check_adapter, version, path, self.described, self.name)
                await self._spread(version, checked)
            self.versions[version] = served

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
            "engine": self.name.lower(),
            "versions": {version: bool(fit) for version in self.versions},
            "workers": {w.url: {"problem": w.problem or None, "in_flight": w.in_flight} for w in self.workers},
            "seeded": self.description is not None and self.description.seeded,
        }

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenChunk, None]:
        """A worker that fails before the first token is replaced by another; later, the answer fails."""
        served = self.serving(request.version)
        self.check(request)
        began = False
        tried: set[W] = set()
        with served.users.one():
            while True:
                worker = self._choose(tried)
                worker.in_flight += 1
                try:
                    async with aclosing(self.draw(worker, request, served)) as chunks:
                        async for chunk in chunks:
                            began = True
                            yield chunk
                            if chunk.finish_reason is not None:
                                return
                    raise WorkerFailed(f"{self.name} at {worker.url} stopped in mid-answer.")
                except (WorkerFailed, AdapterGone) as error:
                    self.drain(worker, str(error))
                    if began:
                        raise
                    tried.add(worker)
                finally:
                    worker.in_flight -= 1

    def check(self, request: GenerateRequest) -> None:
        """Raises what is wrong with it, before a server sees it."""
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
        if len(request.stop) > self.max_stops:
            raise EngineError(f"{len(request.stop)} stop strings; {self.name} takes at most {self.max_stops}.")

    def _choose(self, tried: set[W]) -> W:
        if self._router is not None:
            if self._router in tried:
                raise EngineError(self._router.problem)
            return self._router
        fit = [worker for worker in self.healthy() if worker not in tried]
        if not fit:
            raise EngineError(f"Every {self.name} worker failed: " + "; ".join(w.problem for w in tried if w.problem))
        return min(fit, key=lambda worker: worker.in_flight)

    def drain(self, worker: W, problem: str) -> None:
        """Send it no more requests, until its keeper finds it well again."""
        if not worker.problem:
            log.error("a %s worker is drained: %s", self.name, problem)
        worker.problem = problem

    async def _keep(self, worker: W) -> None:
        while True:
            await asyncio.sleep(self._patience.look)
            if worker.paused:
                continue
            if worker.problem and worker is not self._router:
                with contextlib.suppress(EngineError):
                    # First without the lock: one that hangs must not hold up a load.
                    await self._roused(worker, worker.look)
                    async with self.changing:
                        await self._bring_up(worker)
                if not worker.problem:
                    log.warning("the %s worker %s is back", self.name, worker.url)
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

    async def _bring_up(self, worker: W) -> None:
        """Meet a worker and give it the versions that it lacks; `problem` then says whether it can be used."""
        try:
            await self._roused(worker, lambda: self._acquaint(worker))
        except EngineError as error:
            worker.problem = str(error)
        else:
            worker.problem, worker.missed = "", 0

    async def _roused(self, worker: W, step: Callable[[], Awaitable[None]]) -> None:
        """One that says nothing may have been left paused: it is woken, and asked once more. It isn't woken before,
        since another process may be changing its weights."""
        try:
            await step()
        except Silent:
            if worker.paused or not await worker.wake():
                raise
            log.warning("the %s worker %s said nothing and was told to go on", self.name, worker.url)
            await step()

    async def _acquaint(self, worker: W) -> None:
        await worker.look()
        described = await self.describe(worker)
        if self.description is None:
            self.description = self.meet(described)
            self._vocabulary = vocabulary(self.description.model_path)
        self.compare(worker, described)
        self.probed(worker, described, await self._check_logprobs(worker))
        there = await worker.adapters()
        wanted = {v: str(s.adapter.absolute()) for v, s in self.versions.items() if s.adapter is not None}
        for version in there.keys() & wanted.keys():
            if there[version] != wanted[version]:
                await worker.unload_adapter(version)
                del there[version]
        for version in wanted.keys() - there.keys():
            await worker.load_adapter(version, wanted[version])

    def meet(self, described: D) -> D:
        """What the first worker says, as replicas are to be compared with it."""
        return described

    def probed(self, worker: W, described: D, probe: list[float]) -> None:
        """What a worker that can be used said to the probe prompt."""

    def compare(self, worker: W, described: D) -> None:
        """Raises Refused for a replica that isn't like the first."""
        first = self.described
        if (described.model_path, described.context) != (first.model_path, first.context):
            raise Refused(
                f"{self.name} at {worker.url} serves {described.model_path} with a context of {described.context}, "
                f"another worker {first.model_path} with {first.context}: replicas must be alike."
            )

    async def _check_logprobs(self, worker: W) -> list[float]:
        """Whether its logprobs are the policy's own, before temperature: that depends on how it was started. Those of
        the probe prompt."""
        cool, warm = await worker.probe(0.5), await worker.probe(1.0)
        if any(abs(a - b) > _SAME * max(1.0, abs(b)) for a, b in zip(cool, warm, strict=True)):
            raise Refused(
                f"{self.name} at {worker.url} gives logprobs after temperature, which training can't use: start it "
                f"with {self.raw_logprobs}."
            )
        return warm


async def _on_each(workers: Sequence[W], act: Callable[[W], Awaitable[None]]) -> dict[W, EngineError]:
    """Act on all at once; the errors of those that failed."""
    results = await asyncio.gather(*map(act, workers), return_exceptions=True)
    failed = {}
    for worker, result in zip(workers, results, strict=True):
        if isinstance(result, EngineError):
            failed[worker] = result
        elif isinstance(result, BaseException):
            raise result
    return failed
