"""The gate promotes a better version, refuses the rest with reasons, and is seldom fooled by luck."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest

from online_rl.gate import GateConfig, ItemResult, ItemsDiffer, decide, mcnemar, paired_interval, wilson

QUICK = GateConfig(bootstrap=200)


def items(right: int, n: int, kind: str = "arithmetic", **more: int) -> list[ItemResult]:
    """`n` items of which the first `right` are right."""
    defaults = {"tool_calls": 1, "own_tokens": 40} | more
    return [ItemResult(f"{kind}-{i}", kind, i < right, **defaults) for i in range(n)]


# -- the statistics, against known numbers


def test_mcnemar_is_the_one_sided_sign_test():
    assert mcnemar(0, 0) == 1
    assert mcnemar(5, 0) == pytest.approx(1 / 32)
    assert mcnemar(9, 1) == pytest.approx(11 / 1024)
    assert mcnemar(1, 9) == pytest.approx(1023 / 1024)


def test_wilson_matches_the_published_example():
    assert wilson(15, 50, 0.95) == pytest.approx((0.191, 0.438), abs=5e-4)
    assert wilson(0, 10, 0.95)[0] == pytest.approx(0, abs=1e-12)
    assert wilson(10, 10, 0.95)[1] == pytest.approx(1)


def test_the_paired_interval_has_the_normal_approximations_width():
    low, high = paired_interval(60, 40, 1000, GateConfig(), np.random.default_rng(0))
    half = 1.96 * np.sqrt((0.1 - 0.02**2) / 1000)
    assert (low, high) == pytest.approx((0.02 - half, 0.02 + half), abs=0.002)


# -- decisions


def test_a_clear_gain_is_promoted():
    decision = decide(items(100, 200), items(140, 200))
    assert decision.promote
    assert decision.reasons[0].startswith("significant gain: accuracy 50.0 % to 70.0 % on 200 items, p = ")
    overall, slice_ = decision.rows
    assert (overall.kind, slice_.kind) == ("overall", "arithmetic")
    assert (overall.n, overall.gained, overall.lost) == (200, 40, 0)
    assert overall.difference == pytest.approx(0.2)
    assert overall.interval[0] < 0.2 < overall.interval[1]


def test_no_change_and_a_small_gain_are_refused():
    for candidate in (items(100, 200), items(103, 200), items(60, 200)):
        decision = decide(items(100, 200), candidate)
        assert not decision.promote
        assert "no significant gain" in decision.reasons[0]


def test_the_order_of_items_does_not_matter_and_the_decision_repeats():
    current, candidate = items(100, 200), items(140, 200)
    assert decide(current, candidate) == decide(current, candidate[::-1]) == decide(current[::-1], candidate)


def test_a_gain_does_not_buy_off_a_slice_that_fell():
    current = items(50, 150) + items(45, 50, "lookup")
    decision = decide(current, items(120, 150) + items(40, 50, "lookup"))
    assert decision.rows[0].p < 1e-6
    assert not decision.promote
    assert decision.reasons == ["lookup fell by 10.0 points (90.0 % to 80.0 % on 50 items), more than 5.0 points"]


def test_a_small_slice_may_lose_one_item_net_but_not_two():
    current = items(50, 150) + items(5, 8, "plain")
    assert decide(current, items(120, 150) + items(4, 8, "plain")).promote
    assert not decide(current, items(120, 150) + items(3, 8, "plain")).promote


def test_a_large_slice_must_prove_that_it_did_not_fall():
    current = items(50, 150) + items(300, 500, "lookup")
    assert decide(current, items(120, 150) + items(300, 500, "lookup")).promote
    fell = decide(current, items(150, 150) + items(280, 500, "lookup"))  # 4 points: below the margin, but not surely
    assert fell.rows[0].p < 0.05
    assert len(fell.reasons) == 1
    assert fell.reasons[0].startswith("lookup may have fallen by 5.")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"tool_calls": 2}, "tool calls per answer rose from 1.00 to 2.00, by more than 0.5"),
        ({"tool_errors": 1}, r"failed tool calls rose from 0.0 % to 100.0 % \(200 of 200\), by more than 5.0 points"),
        ({"own_tokens": 61}, "answers grew from 40 to 61 own tokens, beyond 1.5 times"),
        ({"well_formed": False}, "well-formed answers fell from 100.0 % to 0.0 %"),
    ],
)
def test_a_gain_does_not_buy_off_worse_behaviour(change, reason):
    candidate = [replace(item, **change) for item in items(160, 200)]
    decision = decide(items(100, 200), candidate)
    assert not decision.promote
    assert len(decision.reasons) == 1
    assert re.fullmatch(reason, decision.reasons[0])


def test_limits_are_limits_not_bans():
    candidate = items(160, 200, own_tokens=60)
    candidate = [replace(item, tool_calls=2, tool_errors=i < 10) for i, item in enumerate(candidate[:100])] + candidate[
        100:
    ]
    assert decide(items(100, 200), candidate).promote  # 1.5 calls, 3.3 % errors, 1.5 times the length: all just within


def test_no_calls_and_no_tokens_divide_nothing_by_zero():
    decision = decide(items(10, 50, tool_calls=0, own_tokens=0), items(40, 50, tool_calls=0, own_tokens=0))
    assert decision.promote
    assert decision.before.error_rate == 0


def test_the_report_is_json():
    report = decide(items(100, 200), items(140, 200)).report()
    again = json.loads(json.dumps(report, allow_nan=False))
    assert again == report
    assert again["promote"] is True
    assert set(again["rows"][0]) >= {"kind", "n", "before", "after", "difference", "interval", "p"}
    assert again["after"]["calls_per_answer"] == 1
    assert again["config"]["alpha"] == 0.05


# -- bad input


def test_different_items_are_named():
    with pytest.raises(ItemsDiffer, match="nothing to compare: 0 items before, 3 after"):
        decide([], items(1, 3))
    with pytest.raises(ItemsDiffer, match=r"1 only the current \(arithmetic-2\), 0 only the candidate"):
        decide(items(1, 3), items(1, 2))
    with pytest.raises(ItemsDiffer, match="item arithmetic-0 occurs twice in the results of the candidate"):
        decide(items(1, 3), [*items(1, 3), items(1, 1)[0]])
    with pytest.raises(ItemsDiffer, match="item a is 'x' before and 'y' after"):
        decide([ItemResult("a", "x", True)], [ItemResult("a", "y", True)])


# -- by simulation


def promotions(runs: int, n: int, before: float, after: float, seed: int, slices: int) -> float:
    """The share of simulated pairs that the gate promotes; independent items."""
    rng = np.random.default_rng(seed)
    kinds = [f"kind-{i % slices}" for i in range(n)]
    ids = [str(i) for i in range(n)]
    made = {(i, right): ItemResult(ids[i], kinds[i], right, 1, 0, 40) for i in range(n) for right in (True, False)}
    promoted = 0
    for old, new in zip(rng.random((runs, n)) < before, rng.random((runs, n)) < after, strict=True):
        results = [[made[i, bool(right)] for i, right in enumerate(answers)] for answers in (old, new)]
        promoted += decide(*results, QUICK).promote
    return promoted / runs


@pytest.mark.parametrize("accuracy", [0.1, 0.5, 0.9])
def test_without_a_true_gain_at_most_one_in_twenty_is_promoted(accuracy):
    # One slice, so that nothing but the test itself holds a lucky candidate back.
    assert promotions(1_000, 80, accuracy, accuracy, seed=1, slices=1) <= 0.05


def test_a_gain_of_twenty_points_on_200_items_is_nearly_always_seen():
    assert promotions(300, 200, 0.4, 0.6, seed=2, slices=2) > 0.9
