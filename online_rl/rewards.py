"""What a rollout earns: the paper's rewards (TAPO, arXiv 2510.07038), with DAPO's overlong and OTC's efficiency terms.

A rollout with a format error earns -1, whatever it answered. Any other earns its verifier's score, times the
efficiency of its tool calls where the recipe asks for that, plus the penalty for a long text of its own. Nothing is
ever paid for a call as such: a bonus for calling is a bonus for useless calls.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from online_rl import verifiers
from online_rl.recipe import Recipe
from online_rl.tasks.base import Task
from serving.trajectory import Trajectory

FORMAT_ERROR = -1.0


@dataclass(frozen=True)
class RewardConfig:
    """Lengths are in own tokens. `call_smoothing` is the c of OTC's cosine: larger forgives needless calls more."""

    max_response_tokens: int
    overlong_buffer: int
    tool_efficiency: bool = False
    call_smoothing: float = 4.0

    def __post_init__(self) -> None:
        if not 0 <= self.overlong_buffer < self.max_response_tokens:
            raise ValueError(
                f"overlong_buffer ({self.overlong_buffer}) must be from 0 to below max_response_tokens "
                f"({self.max_response_tokens})"
            )
        if self.call_smoothing <= 0:
            raise ValueError(f"call_smoothing ({self.call_smoothing}) must be above 0")

    @classmethod
    def of(cls, recipe: Recipe) -> RewardConfig:
        return cls(recipe.max_response_tokens, recipe.overlong_buffer, recipe.tool_efficiency)


@dataclass(frozen=True)
class RewardTerms:
    """`outcome` in [0, 1], 0 after a format error; `format` 0 or -1; `overlong` in [-1, 0]; `efficiency` in (0, 1]."""

    outcome: float
    format: float = 0.0
    overlong: float = 0.0
    efficiency: float = 1.0
    reason: str = ""

    @property
    def acc(self) -> bool:
        """Right, as the paper counts it."""
        return self.outcome > verifiers.RIGHT

    @property
    def total(self) -> float:
        return self.format if self.format else self.outcome * self.efficiency + self.overlong


def score_group(trajectories: Sequence[Trajectory], task: Task, config: RewardConfig) -> list[RewardTerms]:
    """The rewards of the rollouts of one task, in their order. Raises UnknownVerifier for a task that names none.

    Calls are judged against the group: the fewest among its right answers sets the measure.
    """
    verifier = verifiers.get(task.verifier)
    judged = [_outcome(trajectory, task, verifier) for trajectory in trajectories]
    fewest = min((t.tool_calls for t, terms in zip(trajectories, judged, strict=True) if terms.acc), default=None)
    return [
        RewardTerms(
            outcome=terms.outcome,
            format=terms.format,
            overlong=overlong(trajectory.own_tokens, config.max_response_tokens, config.overlong_buffer),
            efficiency=efficiency(trajectory.tool_calls, terms.acc, fewest, config.call_smoothing)
            if config.tool_efficiency
            else 1.0,
            reason=terms.reason,
        )
        for trajectory, terms in zip(trajectories, judged, strict=True)
    ]


def _outcome(trajectory: Trajectory, task: Task, verifier: verifiers.Verifier) -> RewardTerms:
    """The format and the verdict, before anything that depends on length or on the group."""
    if not trajectory.well_formed or not trajectory.answer.strip():
        return RewardTerms(0.0, format=FORMAT_ERROR, reason=format_error(trajectory))
    score = verifier.score(task.gold, trajectory.answer, tool_calls=trajectory.tool_calls)
    return RewardTerms(score.value, reason=score.reason)


def format_error(trajectory: Trajectory) -> str:
    """What is wrong with the format, in a few words; empty when nothing is."""
    if trajectory.stop_reason != "answer":
        return f"ended without an answer ({trajectory.stop_reason})"
    broken = [step.index for step in trajectory.steps if not step.well_formed]
    if broken:
        return f"step {broken[0]} is not one thought and one action"
    return "" if trajectory.answer.strip() else "the answer is empty"


def overlong(own_tokens: int, max_response_tokens: int, buffer: int) -> float:
    """DAPO's soft punishment (arXiv 2503.14476, eq. 13), on the policy's own tokens only.

    0 up to `max_response_tokens - buffer`, then linear down to -1 at `max_response_tokens`, and -1 beyond.
    """
    if own_tokens <= max_response_tokens - buffer:
        return 0.0
    if own_tokens >= max_response_tokens:
        return -1.0
    return (max_response_tokens - buffer - own_tokens) / buffer


def efficiency(calls: int, correct: bool, fewest_correct_calls: int | None, smoothing: float = 4.0) -> float:
    """The tool term of OTC-GRPO (arXiv 2504.14870): 1 at the fewest calls of the group's right answers, less above.

    With m calls against a fewest n: sin(pi m / (m + n)), or cos(pi m / (2 m + c)) where n is 0. A wrong answer keeps
    its outcome as it is (1): cheapness must not make up for being wrong.
    """
    if not correct or fewest_correct_calls is None or calls <= fewest_correct_calls:
        return 1.0
    if fewest_correct_calls == 0:
        return math.cos(math.pi * calls / (2 * calls + smoothing))
    return math.sin(math.pi * calls / (calls + fewest_correct_calls))
