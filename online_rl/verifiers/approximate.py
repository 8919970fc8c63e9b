"""`approximate`: one number within 5 % of the gold's: what TAPO's mixed questions ask (arXiv 2510.07038).

Their golds follow from figures that differ between sources and years, so an exact match would be luck.
"""

from __future__ import annotations

from decimal import Decimal, localcontext

from online_rl.verifiers.base import Score, Verifier
from online_rl.verifiers.numbers import MAX_DIGITS, judge_number, read_number

RELATIVE = Decimal("0.05")


def judge(gold: str, answer: str, _tool_calls: int = 0) -> Score:
    """1 when the answer commits to a number less than 5 % from the gold; of a gold of 0, to 0 itself."""

    def close(off: Decimal, right: Decimal) -> bool:
        return off < RELATIVE * abs(right) or off == 0

    return judge_number(gold, answer, close, "within 5 % of the gold")


def wrongs(gold: str) -> list[str]:
    """Numbers just outside, hedges and lists made from a gold."""
    value = read_number(gold).value
    if value is None:
        return []
    with localcontext(prec=2 * MAX_DIGITS):
        far = value * Decimal("1.06") if value else Decimal(1)
        return ["", "I don't know.", f"{far:f}", f"{value:f} or {2 * value + 1:f}", f"{-value - 1:f}"]


VERIFIER = Verifier("approximate", judge, wrongs)
