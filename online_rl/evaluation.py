"""Evaluation: one version on a frozen set of tasks, through the same agent, with recorded tool results.

Two versions that are compared share the record, so that neither is luckier with its tools than the other.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace

from online_rl import verifiers
from online_rl.gate import ItemResult
from online_rl.tasks.base import Task
from serving.agent import Agent, CallTool
from serving.engines.base import Sampling
from serving.trajectory import Observation, Trajectory


class Recorded:
    """A tool call that gives the same result for the same input, whoever asks and however often."""

    def __init__(self, call: CallTool) -> None:
        self._call = call
        self._results: dict[tuple[str, str], asyncio.Future[Observation]] = {}

    async def __call__(self, tool: str, text: str) -> Observation:
        key = (tool, text)
        if key not in self._results:
            self._results[key] = asyncio.ensure_future(self._call(tool, text))
        return await asyncio.shield(self._results[key])


def judge(task: Task, trajectory: Trajectory) -> ItemResult:
    """An item is right when the answer was closed and its verifier scores it above 0.9 (the paper's `acc`)."""
    score = verifiers.get(task.verifier).score(task.gold, trajectory.answer, tool_calls=trajectory.tool_calls)
    return ItemResult(
        task_id=task.id,
        kind=task.kind,
        correct=trajectory.stop_reason == "answer" and score.right,
        tool_calls=trajectory.tool_calls,
        tool_errors=trajectory.tool_errors,
        own_tokens=trajectory.own_tokens,
        well_formed=trajectory.well_formed,
    )


async def evaluate(
    tasks: Sequence[Task],
    agent: Agent,
    version: str,
    sampling: Sampling,
    call: CallTool | None = None,
    concurrency: int = 16,
    on_item: Callable[[int, int], None] = lambda done, of: None,
) -> tuple[list[ItemResult], list[Trajectory]]:
    """Every task once, in order: verdicts and trajectories. With `sampling.seed`, each task has a seed of its own."""
    slots = asyncio.Semaphore(concurrency)
    done = 0

    async def one(index: int, task: Task) -> tuple[ItemResult, Trajectory]:
        nonlocal done
        async with slots:
            seed = None if sampling.seed is None else sampling.seed + 1000 * index
            trajectory = await agent.roll_out(task.messages, version, replace(sampling, seed=seed), call)
        done += 1
        on_item(done, len(tasks))
        return judge(task, trajectory), trajectory

    pairs = await asyncio.gather(*(one(index, task) for index, task in enumerate(tasks)))
    return [result for result, _ in pairs], [trajectory for _, trajectory in pairs]
