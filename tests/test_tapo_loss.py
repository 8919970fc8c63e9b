"""The objective: what one batch's loss and gradient are, against plain torch and against numbers worked by hand."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel

import online_rl.tapo
from online_rl.recipe import Recipe
from online_rl.rewards import RewardTerms
from online_rl.rollouts import TaskStream
from online_rl.tapo import TAPOTrainer
from online_rl.tasks.base import Task, ask
from serving.trajectory import Trajectory
from tests.tiny_model import spoken, tiny_policy, tiny_tokenizer

torch.set_num_threads(1)  # a model this small only loses by more
TASKS = [ask("first", "exact", "g", "test"), ask("second, longer", "exact", "g", "test")]
RECIPE = Recipe(
    group_size=3, groups_per_step=2, max_rounds=1, bf16=False, micro_batch=4, max_response_tokens=64, overlong_buffer=8
)


def trainer_of(
    policy: PeftModel, said: dict[str, list[tuple[Trajectory, float]]], folder: Path, recipe: Recipe = RECIPE
) -> TAPOTrainer:
    """A trainer whose rollouts are given: a task's trajectories, each with its outcome."""
    turn: dict[str, int] = {}

    async def rollout(task: Task, seed: int) -> Trajectory:
        turn[task.id] = turn.get(task.id, -1) + 1
        return said[task.id][turn[task.id] % recipe.group_size][0]

    def score(trajectories: list[Trajectory], task: Task) -> list[RewardTerms]:
        outcomes = {id(trajectory): outcome for trajectory, outcome in said[task.id]}
        return [RewardTerms(outcomes[id(trajectory)]) for trajectory in trajectories]

    tasks = [task for task in TASKS if task.id in said]
    run = online_rl.tapo._Caller(None)
    return TAPOTrainer(
        recipe, policy, tiny_tokenizer(), TaskStream(tasks, 0), rollout, score, lambda m, s: None, run, folder
    )


def logprobs_of(policy: PeftModel, trajectory: Trajectory) -> torch.Tensor:
    """(C,) with their graph: one sequence, no padding, no tricks."""
    ids = torch.tensor([trajectory.prompt_ids + trajectory.completion_ids])
    logps = policy(input_ids=ids).logits[0, :-1].float().log_softmax(-1)
    taken = logps.gather(-1, ids[0, 1:, None]).squeeze(-1)
    return taken[len(trajectory.prompt_ids) - 1 :]


def behaved(policy: PeftModel, trajectory: Trajectory, gaps: list[float]) -> Trajectory:
    """The same trajectory, sampled by a policy whose logprobs lay `gaps` below: ratio = exp(gap) on own tokens."""
    with torch.no_grad():
        logps = logprobs_of(policy, trajectory).tolist()
    step = trajectory.steps[0]
    told = [(p - gap) * m for p, gap, m in zip(logps, gaps, step.mask, strict=True)]
    return replace(trajectory, steps=[replace(step, logprobs=told)])


def two_groups(policy: PeftModel) -> dict[str, list[tuple[Trajectory, float]]]:
    """Six rollouts of 2 to 9 tokens, two with tool tokens inside, ratios on every side of both clips."""
    gaps = [0.0, math.log(1.25), math.log(1.35), math.log(0.85), math.log(0.7), 0.05, -0.05, math.log(1.1), 0.0]
    generator = torch.Generator().manual_seed(1)

    def one(prompt: list[int], length: int, tool: range = range(0)) -> Trajectory:
        ids = torch.randint(3, 250, (length,), generator=generator).tolist()
        mask = [int(i not in tool) for i in range(length)]
        shift = int(torch.randint(0, 9, (1,), generator=generator))
        rolled = (gaps[shift:] + gaps[:shift])[:length]
        # what a policy can say is bounded by logprob 0, so a ratio below 1 needs an unlikely token: these all are
        return behaved(policy, spoken(prompt, ids, [0.0] * length, mask), rolled)

    return {
        TASKS[0].id: [(one([7, 8], 5), 1.0), (one([7, 8], 9, range(3, 6)), 0.0), (one([7, 8], 2), 0.3)],
        TASKS[1].id: [(one([9] * 6, 4), 0.0), (one([9] * 6, 8, range(4, 8)), 1.0), (one([9] * 6, 7), 1.0)],
    }


def gradients(policy: PeftModel) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}


def plain_loss(
    policy: PeftModel, groups: list[list[tuple[Trajectory, float]]], denominator: Callable[[Trajectory], int]
) -> torch.Tensor:
    """DAPO's eq. 8, a token at a time."""
    total, count = torch.zeros(()), 0
    for group in groups:
        rewards = torch.tensor([outcome for _, outcome in group])
        for trajectory, reward in group:
            advantage = (reward - rewards.mean()) / (rewards.std() + 1e-4)
            count += denominator(trajectory)
            logps = logprobs_of(policy, trajectory)
            for now, then, own in zip(logps, trajectory.logprobs, trajectory.mask, strict=True):
                if own:
                    ratio = torch.exp(now - then)
                    total = total - torch.minimum(ratio * advantage, ratio.clamp(1 - 0.2, 1 + 0.28) * advantage)
    return total / count


@pytest.mark.parametrize("denominator", ["own", "all"])
def test_loss_and_gradient_are_those_of_the_formula(tmp_path: Path, denominator: str):
    policy = tiny_policy()
    plain = copy.deepcopy(policy)
    said = two_groups(policy)
    recipe = RECIPE.model_copy(update={"denominator": denominator})
    loss = trainer_of(policy, said, tmp_path, recipe).training_step(policy, None)

    counted = (lambda t: t.own_tokens) if denominator == "own" else (lambda t: len(t.completion_ids))
    expected = plain_loss(plain, list(said.values()), counted)
    expected.backward()

    torch.testing.assert_close(loss, expected.detach(), rtol=1e-4, atol=1e-6)
    ours, theirs = gradients(policy), gradients(plain)
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=2e-3, atol=1e-6, msg=name)
    assert max(gradient.abs().max() for gradient in theirs.values()) > 1e-3


def test_trl_head_gives_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Projecting own tokens only is an economy: TRL's own projection of every token agrees with it."""
    policy = tiny_policy()
    other = copy.deepcopy(policy)
    said = two_groups(policy)
    loss = trainer_of(policy, said, tmp_path / "a").training_step(policy, None)
    monkeypatch.setattr(online_rl.tapo, "plain_frozen_head", lambda model: False)
    trainer = trainer_of(other, said, tmp_path / "b")
    torch.testing.assert_close(trainer.training_step(other, None), loss, rtol=1e-5, atol=1e-6)
    for name, gradient in gradients(other).items():
        torch.testing.assert_close(gradients(policy)[name], gradient, rtol=1e-3, atol=1e-6, msg=name)
    assert trainer._tally.means()["entropy"] > 1


def test_micro_batches_change_nothing(tmp_path: Path):
    losses, found = [], []
    for size in (1, 2, 6):
        policy = tiny_policy()
        recipe = RECIPE.model_copy(update={"micro_batch": size})
        losses.append(trainer_of(policy, two_groups(policy), tmp_path / str(size), recipe).training_step(policy, None))
        found.append(gradients(policy))
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(losses[0], losses[2])
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(found[2][name], gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("ratio_of_right", "ratio_of_wrong", "loss", "clipped"),
    [
        # two rollouts of one own token: advantages +-0.5 / (0.70711 + 0.0001) = +-0.70701
        # loss = -(min(r+ A, clip(r+) A) - max(r- A, clip(r-) A)) / 2
        (1.00, 1.00, 0.0, (0, 0)),
        (1.25, 1.00, -0.70701 * 0.25 / 2, (0, 0)),  # above 1.2 and below 1.28: the higher side lets it through
        (1.50, 1.00, -0.70701 * 0.28 / 2, (0, 0.5)),  # cut at 1.28
        (0.50, 1.00, 0.70701 * 0.50 / 2, (0, 0)),  # a right answer that became unlikely is never cut
        (1.00, 0.90, -0.70701 * 0.10 / 2, (0, 0)),
        (1.00, 0.70, -0.70701 * 0.20 / 2, (0.5, 0)),  # cut at 0.8
        (1.00, 1.60, 0.70701 * 0.60 / 2, (0, 0)),  # a wrong answer that became likelier is never cut
    ],
)
def test_the_clip_is_asymmetric(
    tmp_path: Path, ratio_of_right: float, ratio_of_wrong: float, loss: float, clipped: tuple[float, float]
):
    policy = tiny_policy()
    right = behaved(policy, spoken([7, 8], [40], [0.0]), [math.log(ratio_of_right)])
    wrong = behaved(policy, spoken([7, 8], [50], [0.0]), [math.log(ratio_of_wrong)])
    recipe = RECIPE.model_copy(update={"group_size": 2, "groups_per_step": 1})
    trainer = trainer_of(policy, {TASKS[0].id: [(right, 1.0), (wrong, 0.0)]}, tmp_path, recipe)
    assert trainer.training_step(policy, None).item() == pytest.approx(loss, abs=1e-5)
    means = trainer._tally.means()
    assert (means["clip_low"], means["clip_high"]) == clipped
    gaps = (abs(math.log(ratio_of_right)) + abs(math.log(ratio_of_wrong))) / 2
    assert means["mismatch"] == pytest.approx(gaps, abs=1e-5)


def test_a_clipped_token_has_no_gradient(tmp_path: Path):
    policy = tiny_policy()
    right = behaved(policy, spoken([7, 8], [40], [0.0]), [math.log(1.5)])
    wrong = behaved(policy, spoken([7, 8], [50], [0.0]), [math.log(0.5)])
    recipe = RECIPE.model_copy(update={"group_size": 2, "groups_per_step": 1})
    trainer_of(policy, {TASKS[0].id: [(right, 1.0), (wrong, 0.0)]}, tmp_path, recipe).training_step(policy, None)
    assert all(gradient.abs().max() == 0 for gradient in gradients(policy).values())


def test_what_a_tool_wrote_has_no_part_in_the_loss(tmp_path: Path):
    """Other tool tokens at the end, and any logprobs for them, leave every gradient as it is, to the bit."""
    results = []
    for tail, told in (([100, 101, 102], 0.0), ([200, 7, 33], -9.0)):
        policy = tiny_policy()
        right, wrong = (
            spoken([7], [40, 41, *tail], [-5.0, -6.0, *[told] * 3], [1, 1, 0, 0, 0]),
            spoken([7], [9], [-5.0]),
        )
        recipe = RECIPE.model_copy(update={"group_size": 2, "groups_per_step": 1, "micro_batch": 1})
        trainer = trainer_of(policy, {TASKS[0].id: [(right, 1.0), (wrong, 0.0)]}, tmp_path / str(told), recipe)
        results.append((trainer.training_step(policy, None), gradients(policy)))
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(results[1][1][name], gradient) for name, gradient in results[0][1].items())


def test_fewer_mixed_groups_than_wanted_still_make_a_token_mean(tmp_path: Path):
    policy = tiny_policy()
    plain = copy.deepcopy(policy)
    said = two_groups(policy)
    said[TASKS[0].id] = [(trajectory, 0.0) for trajectory, _ in said[TASKS[0].id]]
    trainer = trainer_of(policy, said, tmp_path)
    loss = trainer.training_step(policy, None)
    expected = plain_loss(plain, [said[TASKS[1].id]], lambda t: t.own_tokens)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-4, atol=1e-6)


def test_a_rollout_that_says_nothing_is_carried_along(tmp_path: Path):
    policy = tiny_policy()
    silent, right = spoken([7, 8], [], []), spoken([7, 8], [40, 41], [-5.0, -5.0])
    recipe = RECIPE.model_copy(update={"group_size": 2, "groups_per_step": 1})
    trainer = trainer_of(policy, {TASKS[0].id: [(right, 1.0), (silent, 0.0)]}, tmp_path, recipe)
    assert torch.isfinite(trainer.training_step(policy, None))
    assert trainer._tally.tokens == 2
