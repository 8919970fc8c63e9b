"""Rewards, with numbers worked out by hand, and the known ways to cheat them."""

import math
from typing import Any

import pytest

from online_rl.recipe import Recipe
from online_rl.rewards import FORMAT_ERROR, RewardConfig, efficiency, overlong, score_group
from online_rl.tasks.base import Task, ask
from online_rl.verifiers import UnknownVerifier
from serving.dialects.tapo import Parser
from serving.trajectory import Observation, Step, Trajectory

CONFIG = RewardConfig(max_response_tokens=100, overlong_buffer=20)
EFFICIENT = RewardConfig(max_response_tokens=100, overlong_buffer=20, tool_efficiency=True)
SUM = ask("What is 4837 * 291?", "numeric", "1407567", "arithmetic")
GREETING = ask("Hello!", "no_tool", "", "plain")


def rollout(answer: str = "1407567", calls: int = 1, own: int = 30, stop: Any = "answer", tool: int = 40) -> Trajectory:
    """`calls` code steps and a last one; `own` tokens of the policy's and `tool` of each observation's."""
    steps = []
    for index in range(calls + 1):
        last = index == calls
        mine = own - calls * (own // (calls + 1)) if last else own // (calls + 1)
        theirs = 0 if last else tool
        steps.append(
            Step(
                index=index,
                token_ids=[5] * (mine + theirs),
                logprobs=[-0.1] * mine + [0.0] * theirs,
                mask=[1] * mine + [0] * theirs,
                version="v0",
                text="",
                action=("answer" if stop == "answer" else "invalid") if last else "code",
                input=answer if last else "print(4837 * 291)",
                thought="I should calculate this.",
                observation=None if last else Observation("code", "1407567"),
                well_formed=stop == "answer" or not last,
            )
        )
    return Trajectory([1, 2, 3], steps, answer, stop, "v0")


def total(trajectory: Trajectory, task: Task = SUM, config: RewardConfig = CONFIG) -> float:
    return score_group([trajectory], task, config)[0].total


class Characters:
    """A tokenizer of one token a character."""

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return "".join(map(chr, ids))


def spoken(text: str) -> Trajectory:
    """A rollout of one generation, as the dialect reads `text`."""
    ids = [ord(c) for c in text]
    parser = Parser(Characters())
    parser.feed(ids)
    parsed = parser.finish(stopped=text.endswith("</answer>"))
    step = Step(
        index=0,
        token_ids=ids,
        logprobs=[-0.1] * len(ids),
        mask=[1] * len(ids),
        version="v0",
        text=parsed.text,
        action=parsed.action,
        input=parsed.input,
        thought=parsed.thought,
        well_formed=parsed.well_formed,
    )
    if parsed.action == "answer":
        return Trajectory([1], [step], parsed.input, "answer", "v0")
    return Trajectory([1], [step], "", "no_answer", "v0")


# -- the terms


def test_a_right_answer_earns_one_and_a_wrong_one_nothing():
    right, wrong = score_group([rollout(), rollout("1407568")], SUM, CONFIG)
    assert (right.total, right.outcome, right.acc, right.format, right.overlong) == (1.0, 1.0, True, 0.0, 0.0)
    assert (wrong.total, wrong.acc) == (0.0, False)
    assert wrong.reason == "1407568 instead of 1407567"


def test_a_partial_score_is_paid_but_not_accurate():
    task = ask("Which city never sleeps?", "f1", "New York City", "user")
    (terms,) = score_group([rollout("new york")], task, CONFIG)
    assert terms.total == pytest.approx(0.8)
    assert not terms.acc


@pytest.mark.parametrize("stop", ["no_answer", "length", "cancelled"])
def test_a_format_error_earns_minus_one_whatever_was_answered(stop):
    (terms,) = score_group([rollout("1407567", stop=stop, own=100)], SUM, EFFICIENT)
    assert terms.total == FORMAT_ERROR == -1
    assert (terms.outcome, terms.acc) == (0.0, False)
    assert stop in terms.reason


@pytest.mark.parametrize(
    ("own", "expected"), [(0, 0), (80, 0), (81, -0.05), (90, -0.5), (99, -0.95), (100, -1), (5000, -1)]
)
def test_overlong_falls_over_the_buffer(own, expected):
    assert overlong(own, 100, 20) == pytest.approx(expected)


def test_overlong_without_a_buffer_is_a_step():
    assert [overlong(own, 100, 0) for own in (99, 100, 101)] == [0, 0, -1]


def test_tool_tokens_are_not_the_policys_length():
    assert total(rollout(own=60, tool=1_000)) == 1
    assert total(rollout(own=90, tool=0)) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("calls", "fewest", "expected"),
    [
        (0, 0, 1.0),
        (1, 1, 1.0),
        (2, 1, math.sin(2 * math.pi / 3)),
        (3, 1, math.sin(3 * math.pi / 4)),
        (4, 2, math.sin(2 * math.pi / 3)),
        (1, 0, math.cos(math.pi / 6)),
        (4, 0, math.cos(math.pi / 3)),
        (1, 2, 1.0),
    ],
)
def test_efficiency_is_one_at_the_fewest_calls_and_falls_above(calls, fewest, expected):
    assert efficiency(calls, True, fewest) == pytest.approx(expected)
    assert efficiency(calls, False, fewest) == 1
    assert efficiency(calls, False, None) == 1


def test_efficiency_multiplies_right_answers_only_and_only_when_asked():
    group = [rollout(calls=1), rollout(calls=3), rollout("5", calls=0)]
    assert [terms.total for terms in score_group(group, SUM, EFFICIENT)] == pytest.approx(
        [1.0, math.sin(3 * math.pi / 4), 0.0]
    )
    assert [terms.total for terms in score_group(group, SUM, CONFIG)] == [1, 1, 0]


def test_efficiency_stays_positive_for_any_number_of_calls():
    values = [efficiency(calls, True, fewest) for fewest in range(4) for calls in range(fewest, 200)]
    assert all(0 < value <= 1 for value in values)
    assert all(efficiency(m + 1, True, 1) < efficiency(m, True, 1) for m in range(1, 50))


# -- the known ways to cheat


def test_every_known_hack_earns_less_than_the_honest_rollout():
    honest = total(rollout())
    stuffed = ["1407566 1407567 1407568", "1407567 or 1407568", ", ".join(map(str, range(1407500, 1407600)))]
    for answer in stuffed:
        assert total(rollout(answer)) < honest, answer
    assert total(rollout("")) == -1
    assert total(rollout(own=99)) < honest  # filler up to the limit
    group = score_group([rollout(calls=1), rollout(calls=4)], SUM, EFFICIENT)
    assert group[1].total < group[0].total  # useless calls
    assert total(rollout("Hello! How can I help?", calls=1), GREETING) < total(
        rollout("Hello there!", calls=0), GREETING
    )


@pytest.mark.parametrize(
    "text",
    [
        "<think></think><answer>1407567</answer>",
        "<think> \n </think><answer>1407567</answer>",
        "<answer>1407567</answer>",
        "It is easy. <think>Sure.</think><answer>1407567</answer>",
        "<think>Sure.</think> stray <answer>1407567</answer>",
        "<think>Sure.</think><answer> </answer>",
        "<think>Sure.</think><answer>1407567",
        "1407567",
    ],
)
def test_text_outside_the_format_earns_minus_one(text):
    assert total(spoken("<think>Sure.</think><answer>1407567</answer>")) == 1
    assert total(spoken(text)) == -1


# -- configuration


def test_the_recipe_sets_the_terms():
    recipe = Recipe(max_response_tokens=300, overlong_buffer=60, tool_efficiency=True)
    assert RewardConfig.of(recipe) == RewardConfig(300, 60, True)


def test_wrong_settings_are_named():
    with pytest.raises(
        ValueError, match=r"overlong_buffer \(100\) must be from 0 to below max_response_tokens \(100\)"
    ):
        RewardConfig(100, 100)
    with pytest.raises(ValueError, match="call_smoothing"):
        RewardConfig(100, 10, call_smoothing=0)
    with pytest.raises(UnknownVerifier, match="'oracle'"):
        score_group([rollout()], ask("?", "oracle", "1", "user"), CONFIG)
    assert score_group([], SUM, CONFIG) == []
