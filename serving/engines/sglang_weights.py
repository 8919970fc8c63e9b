"""Full weights under SGLang: one set at a time, changed in place while what is in flight waits.

On each worker: pause (what is in flight gives up its KV cache and waits), update from disk with the version as label
and the caches flushed, continue. Requests go on under the new weights, and their chunks name them from there on;
an answer that began with the old ones may ask for more generations by their name (`SGLangEngine.replaced`).
"""

from __future__ import annotations

import asyncio
import math
from pathlib import Path

from serving.engines.base import EngineError
from serving.engines.checks import check_weights
from serving.engines.http_worker import WorkerFailed
from serving.engines.replicas import Served
from serving.engines.sglang import SGLangEngine
from serving.engines.sglang_worker import Worker

PROBE_TOLERANCE = 0.05  # nats between replicas, and to what the caller expects: kernels differ, weights don't


async def swap_weights(engine: SGLangEngine, version: str, path: Path, expected: list[float] | None = None) -> None:
    """Put the weights in `path` (a transformers folder that every worker can read) in service as `version`.

    All workers change, or none: when one fails, the old weights come back everywhere, and the EngineError names the
    worker. Checked by the label that each reports and by the logprobs of a fixed prompt (`Worker.probe`), which must
    be the same on all, and `expected` where that is given. LoRA versions belong to the weights under them: unload
    them first.
    """
    async with engine.changing:
        adapters = [v for v, served in engine.versions.items() if served.adapter is not None]
        if adapters:
            raise EngineError(f"The weights can't change under the adapters {', '.join(adapters)}: unload them first.")
        if engine.weights is not None and engine.weights[0] == version:
            return
        target = await asyncio.to_thread(check_weights, version, path, engine.described)
        workers = engine.healthy()
        old = engine.weights[1] if engine.weights else engine.described.model_path
        before = [(worker.label, old) for worker in workers]
        try:
            results = await asyncio.gather(*(_change(w, version, target) for w in workers), return_exceptions=True)
            problems = [f"{w.url}: {r}" for w, r in zip(workers, results, strict=True) if isinstance(r, BaseException)]
            if not problems:
                problems = await _compare(workers, expected)
        except asyncio.CancelledError:
            await asyncio.shield(_restore(engine, workers, before))
            raise
        if problems:
            await _restore(engine, workers, before)
            raise EngineError(f"Version {version!r} wasn't put in service, the old weights stay: {'; '.join(problems)}")
        for worker in workers:
            worker.label = version
        engine.weights = (version, target)
        engine.replaced |= engine.versions.keys()
        engine.replaced.discard(version)
        engine.versions.clear()
        engine.versions[version] = Served(None)


async def _change(worker: Worker, label: str, path: str) -> None:
    """Pause, update, continue, and see that the label has changed."""
    worker.paused = True
    try:
        await worker.pause()
        try:
            await worker.update_weights(path, label)
        finally:
            await worker.resume()
        reported = (await worker.describe()).weight_version
        if reported != label:
            raise WorkerFailed(f"it reports weights {reported!r} after an update to {label!r}.")
    finally:
        worker.paused = False


async def _compare(workers: list[Worker], expected: list[float] | None) -> list[str]:
    """What is wrong with the probes, a line for each worker."""
    probes = await asyncio.gather(*(w.probe() for w in workers), return_exceptions=True)
    wanted = expected or next((p for p in probes if not isinstance(p, BaseException)), [])
    problems = []
    for worker, probe in zip(workers, probes, strict=True):
        if isinstance(probe, BaseException):
            problems.append(f"{worker.url}: {probe}")
        elif not all(math.isfinite(p) and abs(p - w) < PROBE_TOLERANCE for p, w in zip(probe, wanted, strict=True)):
            problems.append(f"{worker.url}: the probe prompt's logprobs are {probe}, not {wanted}")
    return problems


async def _restore(engine: SGLangEngine, workers: list[Worker], before: list[tuple[str, str]]) -> None:
    """The old weights back on every worker; one that can't take them is drained."""

    async def restore(worker: Worker, label: str, path: str) -> None:
        try:
            await _change(worker, label, path)
        except EngineError as error:
            engine.drain(worker, f"its old weights didn't come back: {error}")

    await asyncio.gather(*(restore(w, label, path) for w, (label, path) in zip(workers, before, strict=True)))
