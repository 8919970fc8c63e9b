"""Groups of rollouts: sampled through the product's own agent, scored, and drawn until enough of them can teach.

Dynamic sampling is DAPO's (arXiv 2503.14476, section 3.2): a group whose answers are all right or all wrong has no
advantage, so it is dropped and another task is drawn in its place.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import random
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from online_rl.recipe import Recipe
from online_rl.replay import INSIDE
from online_rl.rewards import RewardTerms
from online_rl.tasks.base import Task
from serving.trajectory import Trajectory

log = logging.getLogger(__name__)

Rollout = Callable[[Task, int], Awaitable[Trajectory]]
"""One answer to a task, sampled with a seed. What it raises counts as a failure of the engine or a tool."""

Score = Callable[[list[Trajectory], Task], Sequence[RewardTerms]]
"""Rewards of a group's trajectories, in their order."""

ToolCall = Callable[[str, str], Awaitable[Any]]
"""`await call(tool, input)` gives the tool's result."""


class RolloutsFailed(RuntimeError):
    """As many groups in a row failed as a step wants: the engine or the tools are down."""


class GroupReplay:
    """A tool call that gives every rollout of a group the same result for the same input.

    Else a rollout could be rewarded for its luck with the search engine. The first call is made and recorded, later
    ones (and those made while it is under way) are answered from the record; a call that raises isn't recorded.
    Tools named in `inside` aren't replayed: nothing outside changes what they give. Outside `roll_out` every call goes
    through.
    """

    def __init__(self, call: ToolCall, inside: Collection[str] = INSIDE) -> None:
        self._call = call
        self._inside = frozenset(inside)

    async def __call__(self, tool: str, input: str) -> Any:
        record = _record.get()
        if record is None or tool in self._inside:
            return await self._call(tool, input)
        lock = record.locks.setdefault((tool, input), asyncio.Lock())
        async with lock:
            if (tool, input) not in record.results:
                record.results[tool, input] = await self._call(tool, input)
        return record.results[tool, input]


@dataclass
class _Record:
    """A group's tool results, by (tool, input)."""

    results: dict[tuple[str, str], Any] = field(default_factory=dict)
    locks: dict[tuple[str, str], asyncio.Lock] = field(default_factory=dict)


_record: ContextVar[_Record | None] = ContextVar("tool results of the current group", default=None)


@dataclass(frozen=True)
class Group:
    """The rollouts of one task and what they earned; parallel lists."""

    task: Task
    trajectories: list[Trajectory]
    terms: list[RewardTerms]

    @property
    def accuracies(self) -> list[bool]:
        return [terms.acc for terms in self.terms]

    @property
    def is_mixed(self) -> bool:
        """Some right, some wrong: the only groups that DAPO trains on."""
        return len(set(self.accuracies)) > 1


class TaskStream:
    """Tasks without end, in an order that the seed fixes, shuffled anew each epoch. `drawn` is its whole state."""

    def __init__(self, tasks: Sequence[Task], seed: int, drawn: int = 0) -> None:
        if not tasks:
            raise ValueError("no tasks to train on: the queue is empty or every task was set aside")
        self._tasks = tasks
        self._seed = seed
        self.drawn = drawn

    def draw(self) -> tuple[int, Task]:
        """The next task and its number in the stream, from 0."""
        epoch, place = divmod(self.drawn, len(self._tasks))
        order = list(range(len(self._tasks)))
        random.Random(f"{self._seed}/{epoch}").shuffle(order)
        self.drawn += 1
        return self.drawn - 1, self._tasks[order[place]]


@dataclass(frozen=True)
class Progress:
    """Where a step's sampling stands: rollouts that are back of those begun, and groups that can be trained on."""

    rollouts: int
    of: int
    mixed: int
    wanted: int


@dataclass
class Batch:
    """What one step's sampling brought. `groups` are the mixed ones, at most `groups_per_step`."""

    groups: list[Group] = field(default_factory=list)
    uniform: list[Group] = field(default_factory=list)
    failed: int = 0
    drawn: int = 0
    seconds: float = 0.0

    @property
    def sampled(self) -> list[Group]:
        """Every group that was scored: what accuracy and reward are measured on, since the mixed ones are chosen."""
        return self.groups + self.uniform


async def roll_out(
    task: Task,
    n: int,
    rollout: Rollout,
    *,
    seed: int,
    slots: asyncio.Semaphore,
    timeout_s: float = 120.0,
    on_rollout: Callable[[], None] | None = None,
) -> list[Trajectory]:
    """`n` trajectories of a task, at the same time as far as `slots` allow, with one record of tool results.

    A rollout that raises, times out or breaks the contract of Trajectory is tried once more, with the same seed, as
    another would favour what doesn't fail. When that fails too, the rest is cancelled and its error raised.
    """

    async def once(index: int) -> Trajectory:
        async with slots, asyncio.timeout(timeout_s):
            trajectory = await rollout(task, _seed(seed, index))
        _check(trajectory)
        return trajectory

    async def twice(index: int) -> Trajectory:
        try:
            trajectory = await once(index)
        except Exception as error:
            log.warning("a rollout of task %s failed, trying once more: %s: %s", task.id, type(error).__name__, error)
            trajectory = await once(index)
        if on_rollout is not None:
            on_rollout()
        return trajectory

    token = _record.set(_Record())  # tasks made from here on inherit it
    try:
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(twice(index)) for index in range(n)]
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    finally:
        _record.reset(token)
    return [done.result() for done in running]


async def sample_batch(
    tasks: TaskStream,
    recipe: Recipe,
    rollout: Rollout,
    score: Score,
    on_progress: Callable[[Progress], None] | None = None,
) -> Batch:
    """Groups until `groups_per_step` are mixed or `max_rounds` times as many are drawn: then what there is.

    A group that isn't mixed is replaced as soon as it is known, so the engine's slots stay full; which tasks are drawn
    doesn't depend on the order in which groups come back. A group that fails is dropped, counted and replaced. Raises
    RolloutsFailed when as many in a row fail as a step wants.
    """
    began = time.perf_counter()
    wanted = recipe.groups_per_step
    slots = asyncio.Semaphore(recipe.concurrency)
    count = _Counter(recipe, on_progress)
    found: dict[int, Group] = {}
    running: dict[asyncio.Task[Group | Exception], int] = {}
    failed = failed_in_a_row = drawn = 0

    def draw() -> None:
        number, task = tasks.draw()
        count.of += recipe.group_size
        running[asyncio.create_task(_sample_group(task, number, recipe, rollout, score, slots, count))] = number

    try:
        while True:
            while drawn < recipe.max_rounds * wanted and len(running) + count.mixed < wanted:
                draw()
                drawn += 1
            if not running:
                break
            done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                number, group = running.pop(task), task.result()
                if isinstance(group, Group):
                    found[number] = group
                    count.mixed += group.is_mixed
                    failed_in_a_row = 0
                    continue
                failed += 1
                failed_in_a_row += 1
                if failed_in_a_row >= wanted:
                    raise RolloutsFailed(
                        f"all {failed_in_a_row} groups in a row failed, the last with {type(group).__name__}: {group}; "
                        "see that the engine and the tools answer, then resume the run"
                    ) from group
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
    in_order = [found[number] for number in sorted(found)]
    return Batch(
        groups=[group for group in in_order if group.is_mixed],
        uniform=[group for group in in_order if not group.is_mixed],
        failed=failed,
        drawn=drawn,
        seconds=time.perf_counter() - began,
    )


def describe(batch: Batch) -> dict[str, float]:
    """A step's sampling in numbers. Rewards, accuracy and calls are of every scored rollout, trained on or not."""
    rollouts = [trajectory for group in batch.sampled for trajectory in group.trajectories]
    terms = [terms for group in batch.sampled for terms in group.terms]
    right = [right for group in batch.sampled for right in group.accuracies]
    own = sum(rollout.own_tokens for rollout in rollouts)
    return {
        "reward": _mean(one.total for one in terms),
        "reward_outcome": _mean(one.outcome for one in terms),
        "reward_format": _mean(one.format for one in terms),
        "reward_overlong": _mean(one.overlong for one in terms),
        "reward_efficiency": _mean(one.efficiency for one in terms),
        "accuracy": _mean(right),
        "well_formed": _mean(rollout.well_formed for rollout in rollouts),
        "own_tokens_per_rollout": _mean(rollout.own_tokens for rollout in rollouts),
        "calls_per_rollout": _mean(rollout.tool_calls for rollout in rollouts),
        "tool_errors_per_rollout": _mean(rollout.tool_errors for rollout in rollouts),
        "rollouts": len(rollouts),
        "groups_drawn": batch.drawn,
        "groups_mixed": len(batch.groups),
        "groups_all_right": sum(all(group.accuracies) for group in batch.uniform),
        "groups_all_wrong": sum(not any(group.accuracies) for group in batch.uniform),
        "groups_failed": batch.failed,
        "rollout_s": round(batch.seconds, 2),
        "rollout_tokens_per_s": round(own / batch.seconds, 1) if batch.seconds else 0.0,
    }


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return sum(numbers) / len(numbers) if numbers else 0.0


async def _sample_group(
    task: Task,
    number: int,
    recipe: Recipe,
    rollout: Rollout,
    score: Score,
    slots: asyncio.Semaphore,
    count: Callable[[], None],
) -> Group | Exception:
    """A scored group, or what went wrong with it."""
    try:
        trajectories = await roll_out(
            task,
            recipe.group_size,
            rollout,
            seed=_seed(recipe.seed, number),
            slots=slots,
            timeout_s=recipe.rollout_timeout_s,
            on_rollout=count,
        )
        terms = list(score(trajectories, task))
        if len(terms) != len(trajectories):
            raise ValueError(f"the score gave {len(terms)} rewards for {len(trajectories)} trajectories")
        return Group(task, trajectories, terms)
    except Exception as error:
        log.warning("dropped the group of task %s: %s: %s", task.id, type(error).__name__, error)
        return error


class _Counter:
    """Counts a step's rollouts as they come back."""

    def __init__(self, recipe: Recipe, report: Callable[[Progress], None] | None) -> None:
        self._wanted, self._report = recipe.groups_per_step, report
        self.done = self.of = self.mixed = 0

    def __call__(self) -> None:
        self.done += 1
        if self._report is not None:
            self._report(Progress(self.done, self.of, self.mixed, self._wanted))


def _seed(*parts: int) -> int:
    """31 bits from any integers, the same in every process."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=4).digest(), "big") >> 1


def _check(trajectory: Trajectory) -> None:
    """Behaviour logprobs are half of the training signal: parallel, finite, and never above 0 by more than rounding."""
    ids, logprobs, mask = trajectory.completion_ids, trajectory.logprobs, trajectory.mask
    if not len(ids) == len(logprobs) == len(mask):
        raise ValueError(
            f"a trajectory's parallels differ in length: {len(ids)} ids, {len(logprobs)} logprobs, {len(mask)} mask"
        )
    own = [logprob for logprob, m in zip(logprobs, mask, strict=True) if m]
    bad = next((p for p in own if not math.isfinite(p) or p > 1e-3), None)
    if bad is not None:
        raise ValueError(f"the engine gave the logprob {bad} for a token of its own; it must be finite and at most 0")
