"""What an evaluation measures: accuracy with intervals, what tools were called for, errors, tokens, latency.

Each item is answered k times (avg@k). Where an answer called a tool, the item is answered once more with the tools off:
calls in an answer that is the same without them, or right as well, were useless.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from online_rl.evaluation import evaluate
from online_rl.gate import OVERALL, ItemResult, behaviour, mcnemar, paired_interval, wilson
from online_rl.gate import GateConfig as Statistics
from online_rl.replay import PerTask
from online_rl.tasks.base import Task
from online_rl.verifiers.exact import words
from serving.agent import Agent, CallTool, Limits
from serving.dialects.base import Dialect
from serving.engines.base import Engine, Sampling
from serving.trajectory import Trajectory
from tools.toolbox import Toolbox

_NEXT_PASS = 1_000_003  # between the seeds of two answers to one item


@dataclass(frozen=True)
class Sample:
    """One answer to one item. `seconds`: from the prompt to the end of the answer, the tools' time included."""

    result: ItemResult
    answer: str
    seconds: float
    same_without: bool | None = None  # whether the answer was the same with tools off; None: no tool was called


@dataclass(frozen=True)
class Item:
    """A task, its k answers, and the one with tools off where it was made."""

    task: Task
    samples: list[Sample]
    without: Sample | None = None


@dataclass(frozen=True)
class Slice:
    """Averages over the items of one kind, or of all. Shares are of 1; latency is in seconds."""

    kind: str
    n: int
    k: int
    accuracy: float
    interval: tuple[float, float]
    calls_per_answer: float
    calls_per_right: float | None
    useless_calls: float | None
    error_rate: float
    own_tokens: float
    well_formed: float
    latency_p50: float
    latency_p95: float


@dataclass(frozen=True)
class Difference:
    """Two versions on the same items. `p`: McNemar's, exact and one-sided; None where k > 1 answers were given."""

    kind: str
    n: int
    before: float
    after: float
    difference: float
    interval: tuple[float, float]
    p: float | None


async def measure(
    tasks: Sequence[Task],
    agent: Agent,
    version: str,
    sampling: Sampling,
    k: int = 1,
    call: CallTool | PerTask | None = None,
    bare: Agent | None = None,
    concurrency: int = 16,
    on_item: Callable[[int, int], None] = lambda done, of: None,
) -> list[Item]:
    """Every task k times, in order. `bare`, an agent without tools, answers again the items that called one."""
    passes: list[list[Sample]] = []
    for number in range(k):
        asked = sampling if sampling.seed is None else replace(sampling, seed=sampling.seed + _NEXT_PASS * number)

        def told(done: int, of: int, number: int = number) -> None:
            on_item(number * of + done, k * of)

        results, trajectories = await evaluate(tasks, agent, version, asked, call, concurrency, told)
        passes.append([_sample(*pair) for pair in zip(results, trajectories, strict=True)])
    items = [Item(task, list(samples)) for task, *samples in zip(tasks, *passes, strict=True)]
    called = [index for index, item in enumerate(items) if any(s.result.tool_calls for s in item.samples)]
    if bare is None or not called:
        return items
    again, trajectories = await evaluate([tasks[i] for i in called], bare, version, sampling, None, concurrency)
    for index, result, trajectory in zip(called, again, trajectories, strict=True):
        items[index] = _beside(items[index], _sample(result, trajectory))
    return items


def bare_agent(engine: Engine, dialect: Dialect, limits: Limits) -> Agent:
    """An agent with no tools: its prompt offers none, and a call is refused."""
    return Agent(engine, dialect, Toolbox([]), replace(limits, max_turns=0))


def _sample(result: ItemResult, trajectory: Trajectory) -> Sample:
    return Sample(result, trajectory.answer, sum(step.seconds for step in trajectory.steps))


def _beside(item: Item, without: Sample) -> Item:
    def same(sample: Sample) -> bool | None:
        if not sample.result.tool_calls:
            return None
        alike = words(sample.answer) == words(without.answer)
        return alike or (sample.result.correct and without.result.correct)

    return Item(item.task, [replace(sample, same_without=same(sample)) for sample in item.samples], without)


def slices(items: Sequence[Item], statistics: Statistics | None = None) -> list[Slice]:
    """Overall first, then each kind by name."""
    statistics = statistics or Statistics()
    rows = [_slice(OVERALL, items, statistics)]
    kinds = sorted({item.task.kind for item in items})
    if len(kinds) > 1:
        rows += [_slice(kind, [item for item in items if item.task.kind == kind], statistics) for kind in kinds]
    return rows


def _slice(kind: str, items: Sequence[Item], statistics: Statistics) -> Slice:
    samples = [sample for item in items for sample in item.samples]
    results = [sample.result for sample in samples]
    k, seconds = len(items[0].samples), [sample.seconds for sample in samples]
    right = sum(result.correct for result in results)
    if k == 1:
        interval = wilson(right, len(items), statistics.confidence)
    else:
        interval = bootstrap([_mean(item) for item in items], statistics)
    seen = behaviour(results)
    judged = [sample for sample in samples if sample.same_without is not None]
    judged_calls = sum(sample.result.tool_calls for sample in judged)
    useless = sum(sample.result.tool_calls for sample in judged if sample.same_without)
    p50, p95 = np.quantile(seconds, [0.5, 0.95])
    return Slice(
        kind=kind,
        n=len(items),
        k=k,
        accuracy=right / len(samples),
        interval=interval,
        calls_per_answer=seen.calls_per_answer,
        calls_per_right=seen.calls / right if right else None,
        useless_calls=useless / judged_calls if judged_calls else None,
        error_rate=seen.error_rate,
        own_tokens=seen.own_tokens,
        well_formed=seen.well_formed,
        latency_p50=float(p50),
        latency_p95=float(p95),
    )


def differences(
    before: Sequence[Item], after: Sequence[Item], statistics: Statistics | None = None
) -> list[Difference]:
    """Overall first, then each kind. Raises ValueError when the two aren't the same items in the same order."""
    if [item.task.id for item in before] != [item.task.id for item in after]:
        raise ValueError("the versions answered different items: measure both on one set")
    statistics = statistics or Statistics()
    pairs = list(zip(before, after, strict=True))
    kinds = sorted({item.task.kind for item in before})
    rows = [_difference(OVERALL, pairs, statistics)]
    if len(kinds) > 1:
        rows += [_difference(kind, [p for p in pairs if p[0].task.kind == kind], statistics) for kind in kinds]
    return rows


def _difference(kind: str, pairs: Sequence[tuple[Item, Item]], statistics: Statistics) -> Difference:
    old, new = [_mean(item) for item, _ in pairs], [_mean(item) for _, item in pairs]
    changes = [after - before for before, after in zip(old, new, strict=True)]
    p = None
    if len(pairs[0][0].samples) == 1:
        gained, lost = sum(change > 0 for change in changes), sum(change < 0 for change in changes)
        rng = np.random.default_rng(statistics.seed)
        interval = paired_interval(gained, lost, len(pairs), statistics, rng)
        p = mcnemar(gained, lost)
    else:
        interval = bootstrap(changes, statistics)
    n = len(pairs)
    return Difference(kind, n, sum(old) / n, sum(new) / n, sum(changes) / n, interval, p)


def bootstrap(values: Sequence[float], statistics: Statistics) -> tuple[float, float]:
    """The percentile interval of a mean, by resampling items: answers to one item aren't independent of each other."""
    rng = np.random.default_rng(statistics.seed)
    draws = rng.choice(np.asarray(values), size=(min(statistics.bootstrap, 2_000), len(values)))
    tail = (1 - statistics.confidence) / 2
    low, high = np.quantile(draws.mean(axis=1), [tail, 1 - tail])
    return float(low), float(high)


def _mean(item: Item) -> float:
    return sum(sample.result.correct for sample in item.samples) / len(item.samples)
