"""A whole run: it learns, it is recorded, it stops when numbers break, and it goes on where it was killed."""

from __future__ import annotations

import asyncio
import json
import math
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers.utils.logging import set_verbosity_error

from online_rl.checkpoints import last_good_checkpoint
from online_rl.recipe import Recipe
from online_rl.rewards import RewardTerms
from online_rl.rollouts import RolloutsFailed
from online_rl.tapo import TrainingDiverged, TrainResult, train
from online_rl.tasks.base import Task, ask
from serving.trajectory import Trajectory
from tests.tiny_model import sampler, spoken, tiny_policy, tiny_tokenizer

set_verbosity_error()
torch.set_num_threads(1)  # a model this small only loses by more
TASKS = [ask(f"say {letter}", "exact", letter, "test") for letter in "pqrs"]
TOKENIZER = tiny_tokenizer()
WANTED = set(TOKENIZER("abcdefghijklmnopqrstuvwxyz").input_ids)
RECIPE = Recipe(
    group_size=4, groups_per_step=2, max_steps=4, max_rounds=2, learning_rate=1e-2, warmup_steps=2, bf16=False,
    save_steps=2, micro_batch=4,
)  # fmt: skip


def ends_in_a_letter(trajectories: list[Trajectory], task: Task) -> list[RewardTerms]:
    return [RewardTerms(float(trajectory.completion_ids[-1] in WANTED)) for trajectory in trajectories]


async def scripted(task: Task, seed: int) -> Trajectory:
    """Whatever the weights are: 3 to 6 tokens by the seed, a tool token among them, and made-up logprobs."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 250, (3 + seed % 4,), generator=generator).tolist()
    return spoken(TOKENIZER(task.question).input_ids, [*ids, seed % 2], [-5.0] * len(ids) + [-5.0], None)


def coin(trajectories: list[Trajectory], task: Task) -> list[RewardTerms]:
    return [RewardTerms(float(trajectory.completion_ids[-1])) for trajectory in trajectories]


def run(folder: Path, policy: PeftModel | None = None, recipe: Recipe = RECIPE, **changes: Any) -> TrainResult:
    given: dict[str, Any] = {"rollout": scripted, "score": coin, "sync": lambda model, step: None} | changes
    return train(recipe, policy or tiny_policy(), TOKENIZER, TASKS, run_dir=folder, **given)


def weights(policy: PeftModel) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in policy.named_parameters() if p.requires_grad}


def test_a_policy_learns_what_is_rewarded(tmp_path: Path):
    policy = tiny_policy()
    recipe = Recipe(max_steps=20, learning_rate=1e-2, warmup_steps=0, bf16=False, save_steps=20)
    result = run(tmp_path, policy, recipe, rollout=sampler(policy, TOKENIZER, 2), score=ends_in_a_letter)
    rewards = [metrics["reward"] for metrics in result.metrics]
    assert sum(rewards[:3]) / 3 < 0.3
    assert sum(rewards[-5:]) / 5 > 0.5
    assert all(metrics["mismatch"] < 1e-4 for metrics in result.metrics)  # sampled by the weights that are trained


def test_bf16_is_measured_against_the_sampler(tmp_path: Path):
    policy = tiny_policy()
    recipe = RECIPE.model_copy(update={"max_steps": 2, "bf16": True})
    result = run(tmp_path, policy, recipe, rollout=sampler(policy, TOKENIZER, 2), score=ends_in_a_letter)
    assert 0 < result.metrics[0]["mismatch"] < 0.1  # rollouts are fp32 here: the gap is there, and small


def test_the_engine_gets_the_new_weights_before_each_batch(tmp_path: Path):
    policy = tiny_policy()
    seen: list[tuple[int, float]] = []

    async def sync(model: PeftModel, step: int) -> str:
        seen.append((step, sum(float(p.abs().sum()) for p in weights(model).values())))
        return f"step-{step}"

    result = run(tmp_path, policy, sync=sync)
    assert [step for step, _ in seen] == [0, 1, 2, 3]
    assert len({total for _, total in seen}) == 4
    assert [metrics["version"] for metrics in result.metrics] == ["step-0", "step-1", "step-2", "step-3"]


def test_every_step_is_told_and_written_down(tmp_path: Path):
    told: list[dict[str, Any]] = []
    result = run(tmp_path, on_step=told.append)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == told == result.metrics
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert lines[-1]["eta_s"] == 0
    for key in (
        "reward",
        "accuracy",
        "calls_per_rollout",
        "groups_drawn",
        "clip_low",
        "clip_high",
        "entropy",
        "mismatch",
        "rollout_s",
        "update_s",
        "loss",
        "grad_norm",
        "reward_outcome",
        "trained_tokens",
    ):
        assert math.isfinite(lines[0][key])
    assert PeftModel.from_pretrained(tiny_policy().unload(), str(result.final_adapter_dir))


def test_behaviour_logprobs_make_the_ratio(tmp_path: Path):
    """Rollouts that claim to be far likelier than they are: the ratio is far below 1, and wrong ones are clipped."""
    result = run(tmp_path)
    assert result.metrics[0]["mismatch"] > 0.1
    assert result.metrics[0]["clip_low"] > 0


def test_a_step_with_nothing_to_learn_from_changes_nothing(tmp_path: Path):
    policy = tiny_policy()
    before = weights(policy)
    result = run(tmp_path, policy, score=lambda trajectories, task: [RewardTerms(1.0)] * len(trajectories))
    assert result.metrics[-1]["steps_skipped"] == 4
    assert result.metrics[0]["groups_drawn"] == RECIPE.max_rounds * RECIPE.groups_per_step
    assert result.metrics[0]["groups_all_right"] == 4
    assert all(torch.equal(before[name], now) for name, now in weights(policy).items())


class Killed(Exception):
    pass


def die_at(step: int) -> Any:
    def on_step(metrics: dict[str, Any]) -> None:
        if metrics["step"] == step:
            raise Killed

    return on_step


def same(one: Sequence[dict[str, Any]], other: Sequence[dict[str, Any]]) -> bool:
    keys = ("step", "loss", "grad_norm", "reward", "learning_rate", "mismatch", "trained_tokens", "groups_drawn")
    return [[m[k] for k in keys] for m in one] == [[m[k] for k in keys] for m in other]


def test_a_killed_run_goes_on_as_if_it_had_not_been(tmp_path: Path):
    whole, broken = tiny_policy(), tiny_policy()
    expected = run(tmp_path / "whole", whole)
    with pytest.raises(Killed):
        run(tmp_path / "broken", broken, on_step=die_at(3))
    resumed = tiny_policy(seed=5)  # other weights: all of them come from the checkpoint
    resumed.get_base_model().load_state_dict(tiny_policy().get_base_model().state_dict())
    result = run(tmp_path / "broken", resumed, resume=True)
    assert result.steps == 4
    assert same(result.metrics, expected.metrics)
    assert all(torch.equal(weights(whole)[name], now) for name, now in weights(resumed).items())
    lines = (tmp_path / "broken" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]


def test_a_finished_run_resumed_is_still_finished_and_can_be_made_longer(tmp_path: Path):
    run(tmp_path)
    assert run(tmp_path, resume=True).steps == 4
    longer = RECIPE.model_copy(update={"max_steps": 6})
    assert [m["step"] for m in run(tmp_path, recipe=longer, resume=True).metrics] == [1, 2, 3, 4, 5, 6]


def test_a_half_written_or_damaged_checkpoint_is_passed_over(tmp_path: Path):
    run(tmp_path)
    assert last_good_checkpoint(tmp_path) == tmp_path / "checkpoint-4"
    (tmp_path / "checkpoint-4" / "whole.json").unlink()  # killed before the seal
    assert last_good_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    assert run(tmp_path, resume=True).steps == 4  # steps 3 and 4 are made again
    optimizer = tmp_path / "checkpoint-4" / "optimizer.pt"
    optimizer.write_bytes(optimizer.read_bytes()[:-1])
    assert last_good_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    assert last_good_checkpoint(tmp_path / "nowhere") is None


def test_a_process_killed_outright_while_it_saves_loses_one_checkpoint(tmp_path: Path):
    """kill -9 in the middle of the second save, in a process of its own."""
    script = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "import online_rl.tapo as tapo\n"
        "from tests.test_tapo_run import run\n"
        "seal = tapo.seal\n"
        "def die(folder):\n"
        "    if folder.name == 'checkpoint-4': os.kill(os.getpid(), signal.SIGKILL)\n"
        "    seal(folder)\n"
        "tapo.seal = die\n"
        f"run(Path({str(tmp_path)!r}))\n"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": "."}
    process = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, timeout=120)
    assert process.returncode == -signal.SIGKILL, process.stderr.decode()
    assert (tmp_path / "checkpoint-4").exists()
    assert last_good_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    expected = run(tmp_path.with_name("whole"))
    assert same(run(tmp_path, resume=True).metrics, expected.metrics)


def test_a_run_dir_is_not_overwritten_nor_resumed_by_another_recipe(tmp_path: Path):
    run(tmp_path)
    with pytest.raises(ValueError, match="already holds a run"):
        run(tmp_path)
    other = RECIPE.model_copy(update={"learning_rate": 5e-4})
    with pytest.raises(ValueError, match=r"learning_rate was 0\.01, is 0\.0005"):
        run(tmp_path, recipe=other, resume=True)


def test_a_loss_that_is_no_number_stops_with_the_last_checkpoint(tmp_path: Path):
    policy = tiny_policy()

    def poison(metrics: dict[str, Any]) -> None:
        if metrics["step"] == 2:
            next(iter(p for p in policy.parameters() if p.requires_grad)).data.fill_(float("nan"))

    with pytest.raises(TrainingDiverged, match=r"loss is nan at step 3.*checkpoint-3.*learning_rate below 0\.01"):
        run(
            tmp_path,
            policy,
            recipe=RECIPE.model_copy(update={"save_steps": 1}),
            sync=lambda model, step: poison({"step": step - 1}),
        )


def nan_reward(trajectories: list[Trajectory], task: Task) -> list[RewardTerms]:
    return [RewardTerms(float(i % 2), overlong=float("nan")) for i in range(len(trajectories))]


def test_a_reward_that_is_no_number_stops_before_the_update(tmp_path: Path):
    policy = tiny_policy()
    before = weights(policy)
    with pytest.raises(TrainingDiverged, match=r"reward of task .* is nan at step 0"):
        run(tmp_path, policy, score=nan_reward)
    assert all(torch.equal(before[name], now) for name, now in weights(policy).items())


def test_a_ratio_beyond_all_bounds_stops_before_the_update(tmp_path: Path):
    """A sampler that calls its own tokens all but impossible: no clip holds a wrong answer's ratio."""
    policy = tiny_policy()
    before = weights(policy)

    async def rollout(task: Task, seed: int) -> Trajectory:
        return spoken([5], [9, seed % 2], [-200.0, -200.0])

    with pytest.raises(TrainingDiverged, match=r"the loss is .*no checkpoint yet"):
        run(tmp_path, policy, rollout=rollout)
    assert all(torch.equal(before[name], now) for name, now in weights(policy).items())


def test_an_engine_that_is_down_stops_the_run_and_it_can_be_resumed(tmp_path: Path):
    made = 0

    async def dies(task: Task, seed: int) -> Trajectory:
        nonlocal made
        made += 1
        if made > 40:
            raise ConnectionError("engine went away")
        return await scripted(task, seed)

    with pytest.raises(RolloutsFailed, match="engine went away"):
        run(tmp_path, rollout=dies, recipe=RECIPE.model_copy(update={"max_steps": 50, "save_steps": 1}))
    step = int(last_good_checkpoint(tmp_path).name.split("-")[1])
    assert run(tmp_path, resume=True, recipe=RECIPE.model_copy(update={"max_steps": step + 1})).steps == step + 1


def test_training_ends_after_its_minutes_with_a_checkpoint(tmp_path: Path):
    recipe = RECIPE.model_copy(update={"max_steps": 500, "max_minutes": 0.001, "save_steps": 400})
    result = run(tmp_path, recipe=recipe)
    assert result.steps < 10
    assert last_good_checkpoint(tmp_path) == tmp_path / f"checkpoint-{result.steps}"


def test_rollouts_may_belong_to_a_loop_that_runs_elsewhere(tmp_path: Path):
    """The product's engine lives on the server's loop; training runs in a thread beside it."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    loops = set()

    async def rollout(task: Task, seed: int) -> Trajectory:
        loops.add(asyncio.get_running_loop())
        return await scripted(task, seed)

    try:
        run(tmp_path, rollout=rollout, loop=loop)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
    assert loops == {loop}


def test_a_frozen_adapter_is_refused(tmp_path: Path):
    policy = tiny_policy()
    policy.requires_grad_(False)
    with pytest.raises(ValueError, match="is_trainable=True"):
        run(tmp_path, policy)
