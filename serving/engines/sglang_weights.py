"""Full weights under SGLang: one set at a time, changed in place while what is in flight waits.

On each worker: pause (what is in flight gives up its KV cache and waits), update from disk with the version as label
and the caches flushed, continue. Requests go on under the new weights, and their chunks name them from there on;
an answer that began with the old ones may ask for more generations by their name (`SGLangEngine.replaced`).
"""

from __future__ import annotations

import asyncio
import math
from pathlib import Path

from serving.engines.base import EngineError, WeightsRefused
from serving.engines.checks import check_weights
from serving.engines.http_worker import WorkerFailed
from serving.engines.replicas import Served
from serving.engines.sglang import SGLangEngine, Weights
from serving.engines.sglang_worker import Worker

PROBE_TOLERANCE = 0.05  # nats between replicas, and to what was seen before: kernels differ, weights don't


async def swap_weights(
    engine: SGLangEngine, version: str | None, path: Path | None, expected: list[float] | None = None
) -> None:
    """Put the weights in `path` (a transformers folder that every worker can read) in service as `version`; by None the
    model's own again.

    All workers change, or none: when one fails, the old weights come back everywhere, and the EngineError names the
    worker. Checked by the label that each reports and by the logprobs of a fixed prompt (`Worker.probe`), which must
    be the same on all, and `expected` where that is given, or what the same version gave before. What another process
    has done already is taken over. LoRA versions belong to the weights under them: unload them first.
    """
    async with engine.changing:
        adapters = [v for v, served in engine.versions.items() if served.adapter is not None]
        if adapters:
            raise WeightsRefused(
                f"The weights can't change under the adapters {', '.join(adapters)}: unload them first."
            )
        if engine.weights == version:
            return
        old = engine.in_place or engine.base
        if version is None or path is None:
            new = engine.base
        else:
            new = Weights(version, await asyncio.to_thread(check_weights, version, path, engine.described))
        there = await _already(engine, new)
        workers = list(dict.fromkeys([*there, *_healthy(engine, there)]))
        try:
            await _change_all(engine, [w for w in workers if w not in there], workers, new, old, expected)
        except asyncio.CancelledError:
            await asyncio.shield(_restore(engine, [w for w in workers if w not in there], old))
            raise
        for worker in workers:
            worker.label = new.label
            worker.problem = ""
        engine.in_place = None if version is None else new
        engine.replaced |= engine.versions.keys()
        engine.versions.clear()
        if version is not None:
            engine.replaced.discard(version)
            engine.versions[version] = Served(version, None, version)


def _healthy(engine: SGLangEngine, there: list[Worker]) -> list[Worker]:
    fit = [worker for worker in engine.workers if not worker.problem]
    return fit if fit or there else engine.healthy()  # which says why there is none


async def _already(engine: SGLangEngine, new: Weights) -> list[Worker]:
    """The workers that have the weights, since another process swapped them."""

    async def look(worker: Worker) -> bool:
        try:
            described = await worker.describe()
        except EngineError:
            return False
        return (described.weight_version, described.model_path) == (new.label, new.path)

    found = await asyncio.gather(*map(look, engine.workers))
    return [worker for worker, there in zip(engine.workers, found, strict=True) if there]


async def _change_all(
    engine: SGLangEngine,
    changing: list[Worker],
    workers: list[Worker],
    new: Weights,
    old: Weights,
    expected: list[float] | None,
) -> None:
    results = await asyncio.gather(*(_change(w, new) for w in changing), return_exceptions=True)
    problems = [f"{w.url}: {r}" for w, r in zip(changing, results, strict=True) if isinstance(r, BaseException)]
    probe: list[float] = []
    if not problems:
        probe, problems = await _compare(workers, expected or engine.probes.get(new))
    if problems:
        await _restore(engine, changing, old)
        raise EngineError(f"Version {new.label!r} wasn't put in service, the old weights stay: {'; '.join(problems)}")
    engine.probes[new] = probe


async def _change(worker: Worker, new: Weights) -> None:
    """Pause, update, continue, and see that the label has changed."""
    worker.paused = True
    try:
        await worker.pause()
        try:
            await worker.update_weights(new.path, new.label)
        finally:
            await worker.resume()
        reported = (await worker.describe()).weight_version
        if reported != new.label:
            raise WorkerFailed(f"it reports weights {reported!r} after an update to {new.label!r}.")
    finally:
        worker.paused = False


async def _compare(workers: list[Worker], expected: list[float] | None) -> tuple[list[float], list[str]]:
    """What the probe prompt's logprobs should be, and what is wrong with them, a line for each worker."""
    probes = await asyncio.gather(*(w.probe() for w in workers), return_exceptions=True)
    wanted = expected or next((p for p in probes if not isinstance(p, BaseException)), [])
    problems = []
    for worker, probe in zip(workers, probes, strict=True):
        if isinstance(probe, BaseException):
            problems.append(f"{worker.url}: {probe}")
        elif not all(math.isfinite(p) and abs(p - w) < PROBE_TOLERANCE for p, w in zip(probe, wanted, strict=True)):
            problems.append(f"{worker.url}: the probe prompt's logprobs are {probe}, not {wanted}")
    return wanted, problems


async def _restore(engine: SGLangEngine, workers: list[Worker], old: Weights) -> None:
    """The old weights back on every worker; one that can't take them is drained."""

    async def restore(worker: Worker) -> None:
        try:
            await _change(worker, old)
        except EngineError as error:
            engine.drain(worker, f"its old weights didn't come back: {error}")

    await asyncio.gather(*map(restore, workers))
