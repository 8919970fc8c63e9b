"""Evaluation: one version on a frozen set of tasks, through the same agent, with recorded tool results.

Two versions that are compared share the record, so that neither is luckier with its tools than the other.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace

from feedback_store import Store
from online_rl import verifiers
from online_rl.gate import ItemResult
from online_rl.recipe import ToolResults
from online_rl.replay import PerTask, Replay
from online_rl.result_record import ResultRecord
from online_rl.tasks.base import Task
from serving.agent import Agent, CallTool
from serving.engines.base import Sampling
from serving.trajectory import Observation, Trajectory


class Recorded:
    """Tool calls that give a task the same result for the same input, whichever version asks and however often.

    Results of tools that reach outside are also the same for every task. With a `record` that has a file, they are
    still the same when the evaluation is made again after a kill, or later. See `Replay` for `mode` and `store`.
    """

    def __init__(
        self,
        call: CallTool,
        record: ResultRecord | None = None,
        mode: ToolResults = "live",
        store: Store | None = None,
    ) -> None:
        self._record = ResultRecord() if record is None else record
        self._replay = Replay(call, mode, store, self._record)
        self._locks: dict[tuple[str, str], asyncio.Lock] = {}

    @property
    def misses(self) -> int:
        """Calls that no recorded result was found for, in mode `recorded`."""
        return self._replay.misses

    def of(self, task: Task) -> CallTool:
        call = self._replay.of(task)

        async def recorded(tool: str, text: str) -> Observation:
            async with self._locks.setdefault((tool, text), asyncio.Lock()):  # who asks meanwhile waits for the first
                seen = self._record.own(task.id, tool, text)
                return seen or self._record.keep(task.id, tool, text, await call(tool, text))

        return recorded


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
    call: CallTool | PerTask | None = None,
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
            its_call = call.of(task) if isinstance(call, PerTask) else call
            trajectory = await agent.roll_out(task.messages, version, replace(sampling, seed=seed), its_call)
        done += 1
        on_item(done, len(tasks))
        return judge(task, trajectory), trajectory

    pairs = await asyncio.gather(*(one(index, task) for index, task in enumerate(tasks)))
    return [result for result, _ in pairs], [trajectory for _, trajectory in pairs]
