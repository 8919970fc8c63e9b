"""`numeric`: the answer commits to one number, and it is the gold's within a tolerance."""

from __future__ import annotations

from decimal import Decimal, localcontext

from online_rl.verifiers.base import Score, Verifier
from online_rl.verifiers.numbers import MAX_DIGITS, judge_number, read_number

RELATIVE = Decimal("1e-6")
ABSOLUTE = Decimal("1e-3")


def judge(gold: str, answer: str, _tool_calls: int = 0) -> Score:
    """1 within an absolute 1e-3 of the gold, or a relative 1e-6 when the gold has decimals; else 0.

    A whole gold is never judged relatively: 12,345,679 is a wrong count of 12,345,678. Commas between thousands,
    currency signs, percent signs and units are read over; see `read_number` for answers with several numbers.
    """

    def close(off: Decimal, right: Decimal) -> bool:
        whole = right == right.to_integral_value()
        return off <= (ABSOLUTE if whole and "." not in gold else max(ABSOLUTE, RELATIVE * abs(right)))

    return judge_number(gold, answer, close, "the gold's number")


def wrongs(gold: str) -> list[str]:
    """Near misses, hedges and lists made from a gold."""
    value = read_number(gold).value
    if value is None:
        return []
    with localcontext(prec=2 * MAX_DIGITS):
        return _near_and_hedged(value)


def _near_and_hedged(value: Decimal) -> list[str]:
    near = [value + 1, value - 1, value * 10 + 7, -value - 1]
    return [
        "",
        "I don't know.",
        "nan",
        *(f"{number:f}" for number in near),
        f"{value:f} or {value + 1:f}",
        f"{value - 1:f}, {value:f}, {value + 1:f}",
        " ".join(f"{value + step:f}" for step in range(-5, 6)),
        f"The answer is {value:f} or maybe {value + 2:f}.",
        f"The answer is {value:f}. No, the answer is {value + 2:f}.",
    ]


VERIFIER = Verifier("numeric", judge, wrongs)
