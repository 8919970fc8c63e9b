"""Tool results from the record instead of the world, so that training and evaluation can see again what was seen.

Three ways, by the recipe's `tool_results`: `live` asks the tools; `recorded_first` asks them only for what the record
lacks; `recorded` never asks, and says so where the record lacks a result.
"""

from __future__ import annotations

import asyncio
from typing import Protocol, runtime_checkable

from feedback_store import Store
from online_rl.recipe import ToolResults
from online_rl.result_record import ResultRecord
from online_rl.tasks.base import Task
from serving.agent import CallTool
from serving.trajectory import Observation

INSIDE = frozenset({"code"})
"""Tools that reach nothing outside: run for real in every mode, since they give the same again and need no network."""


@runtime_checkable
class PerTask(Protocol):
    """Tool calls that depend on the task that makes them."""

    def of(self, task: Task) -> CallTool: ...


class Replay:
    """Tool calls of a task, answered by the first of these that can:

    1. what the conversation that the task comes from saw (a queued task's turns, or the turn in `meta["turn_id"]`);
    2. `record`, what any task of this run saw;
    3. the newest result that any conversation saw, if it is no error;
    4. the tool itself; in mode `recorded`, an observation that there is no result.

    1 and 3 leave out the conversations of owners who don't consent to training.

    Mode `live` skips 1 and 3. `misses` counts the calls of `recorded` that found nothing.
    """

    def __init__(
        self,
        call: CallTool,
        mode: ToolResults = "live",
        store: Store | None = None,
        record: ResultRecord | None = None,
    ) -> None:
        self._call, self._mode, self._record = call, mode, record
        self._store = None if mode == "live" else store
        self.misses = 0

    def of(self, task: Task) -> CallTool:
        async def call(tool: str, input: str) -> Observation:
            if tool in INSIDE:
                return await self._call(tool, input)
            found = await self._find(task, tool, input)
            if found is None and self._mode == "recorded":
                self.misses += 1
                text = f"There is no recorded result of {tool} for this input."
                return Observation(tool, text, error=True, artifact={"recorded": False})
            return found or await self._call(tool, input)

        return call

    async def _find(self, task: Task, tool: str, input: str) -> Observation | None:
        own = None if self._store is None else await asyncio.to_thread(_of_its_turn, self._store, task, tool, input)
        if own is not None:
            return own
        if self._record is not None and (seen := self._record.newest(tool, input)):
            return seen
        return None if self._store is None else await asyncio.to_thread(_of_any, self._store, tool, input)


def keeping(call: CallTool, record: ResultRecord, task: Task) -> CallTool:
    """`call`, with what it got from outside written down as seen by `task`."""

    async def kept(tool: str, input: str) -> Observation:
        observation = await call(tool, input)
        return observation if tool in INSIDE else record.keep(task.id, tool, input, observation)

    return kept


def _of_its_turn(store: Store, task: Task, tool: str, input: str) -> Observation | None:
    turn_id, task_id = task.meta.get("turn_id"), task.meta.get("queue_id")
    if turn_id is None and task_id is None:
        return None
    found = store.recorded_result(tool, input, turn_id=turn_id, task_id=None if turn_id else task_id, for_training=True)
    return None if found is None else Observation(**vars(found))


def _of_any(store: Store, tool: str, input: str) -> Observation | None:
    found = store.recorded_result(tool, input, errors=False, for_training=True)
    return None if found is None else Observation(**vars(found))
