"""The promotion test: is the candidate better than the version in service, and worse nowhere that matters?

Both answered the same frozen items, so the test is paired. A candidate is promoted when all of this holds:

- overall it is right more often: McNemar's exact test, one-sided, p < alpha;
- no slice got worse by more than the margin (see `slice_fault` for the rule by slice size);
- answers stay well-formed, and need neither many more tool calls, nor fail at them more, nor grow much longer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from scipy.stats import binomtest

OVERALL = "overall"


class ItemsDiffer(ValueError):
    """The two evaluations don't cover the same items once each, so no paired test is possible."""


@dataclass(frozen=True)
class ItemResult:
    """How one version did on one item. `kind` is the item's slice; counts are of this answer alone."""

    task_id: str
    kind: str
    correct: bool
    tool_calls: int = 0
    tool_errors: int = 0
    own_tokens: int = 0
    well_formed: bool = True


@dataclass(frozen=True)
class GateConfig:
    """Shares are fractions of 1: a margin of 0.05 is five points."""

    alpha: float = 0.05
    confidence: float = 0.95
    margin: float = 0.05
    large_slice: int = 400
    max_extra_calls: float = 0.5  # per answer, on average
    max_extra_error_rate: float = 0.05  # of tool calls
    max_length_ratio: float = 1.5  # of own tokens, on average
    bootstrap: int = 10_000
    seed: int = 0


@dataclass(frozen=True)
class Row:
    """One slice: accuracies with Wilson intervals, their paired difference with a bootstrap interval, and p."""

    kind: str
    n: int
    before: float
    before_interval: tuple[float, float]
    after: float
    after_interval: tuple[float, float]
    gained: int  # wrong before, right now
    lost: int  # right before, wrong now
    difference: float
    interval: tuple[float, float]
    p: float  # one-sided: the chance of so many gains, if gains and losses were equally likely


@dataclass(frozen=True)
class Behaviour:
    """Averages of one version over all items."""

    calls_per_answer: float
    error_rate: float
    errors: int
    calls: int
    own_tokens: float
    well_formed: float


@dataclass(frozen=True)
class Decision:
    """`reasons` are the faults of a refused candidate, or what carried a promoted one."""

    promote: bool
    reasons: list[str]
    rows: list[Row]  # overall first, then each slice by name
    before: Behaviour
    after: Behaviour
    config: GateConfig

    def report(self) -> dict[str, Any]:
        """All of it in types that JSON has."""
        plain: dict[str, Any] = asdict(self)
        for row in plain["rows"]:
            for name in ("interval", "before_interval", "after_interval"):
                row[name] = list(row[name])
        return plain


def decide(
    current: Sequence[ItemResult], candidate: Sequence[ItemResult], config: GateConfig | None = None
) -> Decision:
    """Promote or refuse. The same input gives the same decision.

    Raises ItemsDiffer when the two lists are empty, name an item twice, or aren't about the same items and slices.
    """
    config = config or GateConfig()
    pairs = _paired(current, candidate)
    rng = np.random.default_rng(config.seed)
    kinds = sorted({old.kind for old, _ in pairs})
    rows = [_row(OVERALL, pairs, config, rng)]
    rows += [_row(kind, [pair for pair in pairs if pair[0].kind == kind], config, rng) for kind in kinds]
    before, after = behaviour(current), behaviour(candidate)
    overall = rows[0]
    gain = f"accuracy {_percent(overall.before)} to {_percent(overall.after)} on {overall.n} items, p = {overall.p:.3g}"
    faults = [] if overall.p < config.alpha else [f"no significant gain: {gain}, needs p < {config.alpha:g}"]
    faults += [fault for row in rows[1:] if (fault := slice_fault(row, config))]
    faults += behaviour_faults(before, after, config)
    return Decision(not faults, faults or [f"significant gain: {gain}"], rows, before, after, config)


def slice_fault(row: Row, config: GateConfig) -> str:
    """Why a slice speaks against promotion; empty when it doesn't.

    From `large_slice` items on, the whole interval of the difference must lie above -margin: non-inferiority, proved.
    A smaller slice can't prove that, for its interval is wider than the margin even when nothing changed. There the
    observed difference itself must not be below -margin, and one net loss is always allowed.
    """
    if row.n >= config.large_slice:
        if row.interval[0] < -config.margin:
            return (
                f"{row.kind} may have fallen by {_points(-row.interval[0])} "
                f"({_percent(row.before)} to {_percent(row.after)}), more than {_points(config.margin)}"
            )
    elif row.lost - row.gained > max(1.0, config.margin * row.n):
        return (
            f"{row.kind} fell by {_points(-row.difference)} ({_percent(row.before)} to {_percent(row.after)} "
            f"on {row.n} items), more than {_points(config.margin)}"
        )
    return ""


def behaviour(results: Sequence[ItemResult]) -> Behaviour:
    n, calls = len(results), sum(r.tool_calls for r in results)
    errors = sum(r.tool_errors for r in results)
    return Behaviour(
        calls_per_answer=calls / n,
        error_rate=errors / calls if calls else 0.0,
        errors=errors,
        calls=calls,
        own_tokens=sum(r.own_tokens for r in results) / n,
        well_formed=sum(r.well_formed for r in results) / n,
    )


def behaviour_faults(before: Behaviour, after: Behaviour, config: GateConfig) -> list[str]:
    """The limits that better accuracy doesn't buy off. One tool error is never held against a candidate."""
    faults = []
    if after.well_formed < before.well_formed - config.margin:
        faults.append(f"well-formed answers fell from {_percent(before.well_formed)} to {_percent(after.well_formed)}")
    if after.calls_per_answer > before.calls_per_answer + config.max_extra_calls:
        faults.append(
            f"tool calls per answer rose from {before.calls_per_answer:.2f} to {after.calls_per_answer:.2f}, "
            f"by more than {config.max_extra_calls:g}"
        )
    if after.errors > 1 and after.error_rate > before.error_rate + config.max_extra_error_rate:
        faults.append(
            f"failed tool calls rose from {_percent(before.error_rate)} to {_percent(after.error_rate)} "
            f"({after.errors} of {after.calls}), by more than {_points(config.max_extra_error_rate)}"
        )
    if after.own_tokens > config.max_length_ratio * before.own_tokens:
        faults.append(
            f"answers grew from {before.own_tokens:.0f} to {after.own_tokens:.0f} own tokens, "
            f"beyond {config.max_length_ratio:g} times"
        )
    return faults


def _paired(current: Sequence[ItemResult], candidate: Sequence[ItemResult]) -> list[tuple[ItemResult, ItemResult]]:
    if not current or not candidate:
        raise ItemsDiffer(f"nothing to compare: {len(current)} items before, {len(candidate)} after")
    old, new = _by_id(current, "the current version"), _by_id(candidate, "the candidate")
    if old.keys() != new.keys():
        only_old, only_new = sorted(old.keys() - new.keys()), sorted(new.keys() - old.keys())
        raise ItemsDiffer(
            f"the versions answered different items: {len(only_old)} only the current ({', '.join(only_old[:3])}), "
            f"{len(only_new)} only the candidate ({', '.join(only_new[:3])}); evaluate both on one frozen set"
        )
    for task_id in old:
        if old[task_id].kind != new[task_id].kind:
            raise ItemsDiffer(f"item {task_id} is {old[task_id].kind!r} before and {new[task_id].kind!r} after")
    return [(old[task_id], new[task_id]) for task_id in sorted(old)]


def _by_id(results: Sequence[ItemResult], whose: str) -> dict[str, ItemResult]:
    by_id: dict[str, ItemResult] = {}
    for result in results:
        if result.task_id in by_id:
            raise ItemsDiffer(f"item {result.task_id} occurs twice in the results of {whose}")
        by_id[result.task_id] = result
    return by_id


def _row(
    kind: str, pairs: Sequence[tuple[ItemResult, ItemResult]], config: GateConfig, rng: np.random.Generator
) -> Row:
    n = len(pairs)
    before, after = sum(old.correct for old, _ in pairs), sum(new.correct for _, new in pairs)
    gained = sum(new.correct and not old.correct for old, new in pairs)
    lost = sum(old.correct and not new.correct for old, new in pairs)
    return Row(
        kind=kind,
        n=n,
        before=before / n,
        before_interval=wilson(before, n, config.confidence),
        after=after / n,
        after_interval=wilson(after, n, config.confidence),
        gained=gained,
        lost=lost,
        difference=(gained - lost) / n,
        interval=paired_interval(gained, lost, n, config, rng),
        p=mcnemar(gained, lost),
    )


def mcnemar(gained: int, lost: int) -> float:
    """The exact one-sided p of McNemar's test: a sign test over the items on which the versions disagree."""
    if gained + lost == 0:
        return 1.0
    return float(binomtest(gained, gained + lost, 0.5, alternative="greater").pvalue)


def wilson(right: int, n: int, confidence: float) -> tuple[float, float]:
    """Wilson's interval for an accuracy (1927)."""
    # In closed form: scipy's comes only with a two-sided test, which takes many times as long.
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share, spread = right / n, z * z / n
    centre = share + spread / 2
    half = z * math.sqrt(share * (1 - share) / n + spread / (4 * n))
    return (centre - half) / (1 + spread), (centre + half) / (1 + spread)


def paired_interval(
    gained: int, lost: int, n: int, config: GateConfig, rng: np.random.Generator
) -> tuple[float, float]:
    """The percentile bootstrap interval of the paired difference.

    A pair is worth +1, -1 or 0, so resampling n pairs is one multinomial draw of how many of each come up.
    """
    draws = rng.multinomial(n, [gained / n, lost / n, (n - gained - lost) / n], size=config.bootstrap)
    tail = (1 - config.confidence) / 2
    low, high = np.quantile((draws[:, 0] - draws[:, 1]) / n, [tail, 1 - tail])
    return float(low), float(high)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _points(share: float) -> str:
    return f"{100 * share:.1f} points"
