"""Groups of rollouts: sampled at the same time, replayed results, failures dropped, uniform groups replaced."""

from __future__ import annotations

import asyncio

import pytest

from online_rl.recipe import Recipe
from online_rl.rewards import RewardTerms
from online_rl.rollouts import (
    Batch,
    Group,
    GroupReplay,
    Progress,
    Rollout,
    RolloutsFailed,
    TaskStream,
    describe,
    roll_out,
    sample_batch,
)
from online_rl.tasks.base import Task, ask
from serving.trajectory import Trajectory
from tests.tiny_model import spoken

TASKS = [ask(f"question {i}", "exact", "gold", "test") for i in range(6)]
RECIPE = Recipe(group_size=4, groups_per_step=2, max_rounds=3, concurrency=3, rollout_timeout_s=0.3)


def answers(*, right: dict[str, int], default: int = 2) -> tuple[Rollout, list[tuple[str, int]]]:
    """A rollout whose group has `right[question]` right answers of 4, and the record of its calls."""
    calls: list[tuple[str, int]] = []
    count: dict[str, int] = {}

    async def rollout(task: Task, seed: int) -> Trajectory:
        calls.append((task.question, seed))
        place = count[task.question] = count.get(task.question, -1) + 1
        await asyncio.sleep(0)
        is_right = place % 4 < right.get(task.question, default)
        return spoken([5], [int(is_right)], [-0.5])

    return rollout, calls


def score(trajectories: list[Trajectory], task: Task) -> list[RewardTerms]:
    return [RewardTerms(float(trajectory.completion_ids[0])) for trajectory in trajectories]


async def test_a_batch_has_only_groups_with_both_right_and_wrong_answers():
    rollout, calls = answers(right={f"question {i}": 4 * (i % 2) for i in range(4)})  # 0-3 all alike; 4, 5 mixed
    batch = await sample_batch(TaskStream(TASKS, 0), RECIPE, rollout, score)
    assert {group.task.question for group in batch.groups} == {"question 4", "question 5"}
    assert len(batch.sampled) * 4 == len(calls)
    numbers = describe(batch)
    assert numbers["groups_mixed"] == 2
    assert numbers["groups_all_right"] + numbers["groups_all_wrong"] == len(batch.uniform)
    assert numbers["rollouts"] == len(calls)


async def test_sampling_stops_after_max_rounds_with_what_there_is():
    rollout, calls = answers(right={task.question: 0 for task in TASKS})
    batch = await sample_batch(TaskStream(TASKS, 0), RECIPE, rollout, score)
    assert (batch.groups, batch.drawn, len(batch.uniform)) == ([], 6, 6)
    assert len(calls) == 3 * 2 * 4


async def test_only_what_is_missing_is_drawn():
    stream = TaskStream(TASKS, 0)
    first = stream.draw()[1].question
    rollout, calls = answers(right={first: 0})
    batch = await sample_batch(TaskStream(TASKS, 0), RECIPE, rollout, score)
    assert (len(batch.groups), batch.drawn, len(calls)) == (2, 3, 12)


async def test_accuracy_is_an_outcome_above_nine_tenths():
    group = Group(TASKS[0], [], [RewardTerms(0.9), RewardTerms(0.91), RewardTerms(1.0), RewardTerms(-1.0)])
    assert group.accuracies == [False, True, True, False]
    assert group.is_mixed
    assert not Group(TASKS[0], [], [RewardTerms(0.2), RewardTerms(0.8)]).is_mixed


async def test_numbers_describe_every_scored_rollout_not_just_the_mixed_groups():
    def group(*outcomes: float) -> Group:
        return Group(
            TASKS[0], [spoken([1], [1, 2], [-1.0, 0.0], [1, 0])] * len(outcomes), [RewardTerms(o) for o in outcomes]
        )

    numbers = describe(Batch(groups=[group(1, 0)], uniform=[group(1, 1), group(0, 0), group(1, 1)], seconds=2.0))
    assert numbers["accuracy"] == numbers["reward"] == 5 / 8
    assert (numbers["groups_all_right"], numbers["groups_all_wrong"]) == (2, 1)
    assert numbers["own_tokens_per_rollout"] == 1
    assert numbers["rollout_tokens_per_s"] == 4.0


async def test_rollouts_in_flight_never_exceed_the_slots():
    flying = most = 0

    async def rollout(task: Task, seed: int) -> Trajectory:
        nonlocal flying, most
        flying += 1
        most = max(most, flying)
        await asyncio.sleep(0.001)
        flying -= 1
        return spoken([1], [seed % 2], [-0.1])

    await sample_batch(TaskStream(TASKS, 0), RECIPE, rollout, score)
    assert most == RECIPE.concurrency


async def test_a_rollout_that_fails_is_tried_once_more_with_the_same_seed():
    seeds: list[int] = []

    async def rollout(task: Task, seed: int) -> Trajectory:
        seeds.append(seed)
        if len(seeds) == 1:
            raise ConnectionError("engine went away")
        return spoken([1], [2], [-0.1])

    back = 0

    def count() -> None:
        nonlocal back
        back += 1

    done = await roll_out(TASKS[0], 3, rollout, seed=1, slots=asyncio.Semaphore(1), on_rollout=count)
    assert (len(done), back, len(seeds), len(set(seeds))) == (3, 3, 4, 3)


async def hang(task: Task, seed: int) -> Trajectory:
    await asyncio.sleep(60)
    raise AssertionError("never gets here")


async def break_down(task: Task, seed: int) -> Trajectory:
    raise ConnectionError("engine went away")


async def lie(task: Task, seed: int) -> Trajectory:
    return spoken([1], [2, 3], [-0.1, float("nan")])


async def lose_a_logprob(task: Task, seed: int) -> Trajectory:
    return spoken([1], [2, 3], [-0.1])


@pytest.mark.parametrize("bad", [hang, break_down, lie, lose_a_logprob])
async def test_a_group_that_fails_twice_is_dropped_and_counted(bad: Rollout):
    good, _ = answers(right={})
    victim = TaskStream(TASKS, 0).draw()[1]

    async def rollout(task: Task, seed: int) -> Trajectory:
        return await (bad if task == victim else good)(task, seed)

    batch = await sample_batch(TaskStream(TASKS, 0), RECIPE, rollout, score)
    assert batch.failed == 1
    assert len(batch.groups) == 2
    assert victim not in [group.task for group in batch.sampled]


async def test_an_engine_that_is_down_ends_the_batch_with_its_own_words():
    with pytest.raises(RolloutsFailed, match=r"all 2 groups .* ConnectionError: engine went away"):
        await sample_batch(TaskStream(TASKS, 0), RECIPE, break_down, score)


async def test_a_score_that_raises_costs_its_group_only():
    rollout, _ = answers(right={})
    victim = TaskStream(TASKS, 0).draw()[1]

    def picky(trajectories: list[Trajectory], task: Task) -> list[RewardTerms]:
        if task == victim:
            raise ValueError("gold isn't a number")
        return score(trajectories, task)

    batch = await sample_batch(TaskStream(TASKS, 0), RECIPE, rollout, picky)
    assert (batch.failed, len(batch.groups)) == (1, 2)


async def test_a_group_sees_one_result_per_query_and_the_next_group_asks_anew():
    asked: list[str] = []

    async def search(tool: str, input: str) -> str:
        asked.append(input)
        await asyncio.sleep(0.001)
        return f"result {len(asked)}"

    call = GroupReplay(search)
    seen: dict[str, set[str]] = {}

    async def rollout(task: Task, seed: int) -> Trajectory:
        seen.setdefault(task.id, set()).add(await call("search", "capital of France"))
        return spoken([1], [1], [-0.1])

    slots = asyncio.Semaphore(8)
    await asyncio.gather(*(roll_out(task, 4, rollout, seed=0, slots=slots) for task in TASKS[:2]))
    assert len(asked) == 2
    assert [len(results) for results in seen.values()] == [1, 1]
    assert await call("search", "capital of France") == "result 3"  # outside a group nothing is replayed


async def test_only_tools_that_reach_outside_are_replayed_and_failures_are_not():
    asked: list[str] = []

    async def tool(name: str, input: str) -> str:
        asked.append(name)
        if len(asked) == 1:
            raise TimeoutError("search took too long")
        return "result"

    call = GroupReplay(tool)

    async def rollout(task: Task, seed: int) -> Trajectory:
        await call("search", "q")
        await call("code", "print(1)")
        await call("weather", "{}")
        return spoken([1], [1], [-0.1])

    await roll_out(TASKS[0], 3, rollout, seed=0, slots=asyncio.Semaphore(1))
    assert asked.count("search") == 2  # the one that raised, and the one that all three share
    assert asked.count("weather") == 1  # a tool of one's own
    assert asked.count("code") == 3


def test_a_task_stream_goes_on_where_it_was_left():
    whole = TaskStream(TASKS, seed=3)
    order = [whole.draw() for _ in range(20)]
    later = TaskStream(TASKS, seed=3, drawn=8)
    assert [later.draw() for _ in range(12)] == order[8:]
    for epoch in (order[:6], order[6:12], order[12:18]):
        assert {task.id for _, task in epoch} == {task.id for task in TASKS}
    assert [task for _, task in order[:6]] != [task for _, task in order[6:12]]
    with pytest.raises(ValueError, match="no tasks"):
        TaskStream([], seed=0)


async def test_progress_is_told_rollout_by_rollout():
    rollout, _ = answers(right={})
    told: list[Progress] = []
    await sample_batch(TaskStream(TASKS, 0), RECIPE, rollout, score, told.append)
    assert [progress.rollouts for progress in told] == list(range(1, 9))
    assert told[-1] == Progress(rollouts=8, of=8, mixed=0, wanted=2)


async def test_rollouts_are_the_same_in_every_process_and_differ_within_a_group():
    first, calls = answers(right={})
    again, repeated = answers(right={})
    await sample_batch(TaskStream(TASKS, 0), RECIPE, first, score)
    await sample_batch(TaskStream(TASKS, 0), RECIPE, again, score)
    assert calls == repeated
    assert len({seed for _, seed in calls}) == len(calls)
