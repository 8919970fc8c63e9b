"""Reads the one number that an answer commits to, and refuses answers that offer several."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal, localcontext

from online_rl.verifiers.base import Score

MAX_DIGITS = 400

_SIGNS = str.maketrans({"\u2212": "-", "\u2013": "-", "\u2012": "-", "\uff0d": "-", "\uff0b": "+"})
_RUN = re.compile(
    r"(?P<sign>(?<![\w.,)\]])[-+][ ]?)?"
    r"(?:[$€£¥₹][ ]?(?P<inner>[-+]?))?"
    r"(?<![A-Za-z_])(?P<digits>(?:(?<![0-9])\.)?[0-9](?:[0-9.,\u00a0\u2009\u202f]*[0-9])?)"
    r"(?P<exponent>[eE][-+]?[0-9]+|[ ]?[x×*][ ]?10\^\{?[-+]?[0-9]+\}?)?"  # noqa: RUF001 - people write the sign
    r"(?:[ ](?P<scale>thousand|million|billion|trillion)\b)?"
)
_SHAPE = re.compile(r"(?:[0-9]{1,3}(?:[,\u00a0\u2009\u202f][0-9]{3})+|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+")
_FRACTION = re.compile(r"\s*([-+]?[0-9]{1,30})\s*/\s*([0-9]{1,30})\s*\.?\s*")
_MARK = re.compile(
    r"\\boxed\{|####|=|\b(?:answer|result|total|solution)\s*:|\b(?:is|are|equals|equal to|gives|makes)\b", re.I
)
_OPERATION = re.compile(r"[0-9][)}\]$% ]*(?:[-+*/^×÷]|x(?=[ (0-9]))[ ({\[$]*\.?[0-9]")  # noqa: RUF001
_SCALES = {"thousand": 3, "million": 6, "billion": 9, "trillion": 12}


@dataclass(frozen=True)
class Reading:
    """The number that a text commits to, or None with the reason why there is none."""

    value: Decimal | None
    reason: str = ""


def plain_digits(text: str) -> str:
    """`text` with every decimal digit of any script as ASCII, and every minus sign as a hyphen."""
    if text.isascii():
        return text
    folded = (str(unicodedata.decimal(c)) if c.isdecimal() else c for c in text)
    return "".join(folded).translate(_SIGNS)


def read_number(text: str) -> Reading:
    """The number that `text` commits to.

    One number, said as often as it likes but not in a sum that is left to the reader, is it. Of several, the last
    marked one is ("= 7", "the answer is 7", "#### 7"), if nothing but it follows the mark; otherwise the text has
    hedged and commits to none.
    """
    text = plain_digits(text).replace("{,}", ",").replace("\\$", "$").replace("\\%", "%").replace("\\,", ",")
    whole = _numbers(text)
    if isinstance(whole, str):
        return Reading(None, whole)
    if not whole:
        return Reading(None, "no number in the answer")
    marks = list(_MARK.finditer(text))
    after = text[marks[-1].end() :] if marks else ""
    fraction = _FRACTION.fullmatch(after if marks else text)
    if fraction and int(fraction[2]):
        return Reading(Decimal(int(fraction[1])) / Decimal(int(fraction[2])))
    for part in (text, after):
        numbers = _numbers(part)
        if isinstance(numbers, list) and len(set(numbers)) == 1 and (len(numbers) == 1 or not _OPERATION.search(part)):
            return Reading(numbers[0])
    if len(set(whole)) == 1:
        return Reading(None, "a sum that is left to the reader")
    return Reading(None, f"{len(set(whole))} different numbers and none marked as the answer")


def _numbers(text: str) -> list[Decimal] | str:
    """Every number in order of appearance, or what is wrong with one of them."""
    found = []
    for match in _RUN.finditer(text):
        digits = match["digits"]
        if len(digits) > MAX_DIGITS:
            return f"a number of {len(digits)} characters, more than {MAX_DIGITS}"
        if not _SHAPE.fullmatch(digits):
            return f"{digits[:40]!r} is not one number"
        exponent = re.sub(r".*?([-+]?[0-9]+)\}?$", r"\1", match["exponent"] or "0")
        if len(exponent) > 4:
            return f"an exponent of {exponent[:20]!r}"
        power = int(exponent) + _SCALES.get(match["scale"] or "", 0)
        sign = -1 if "-" in ((match["sign"] or "") + (match["inner"] or "")) else 1
        with localcontext(prec=2 * MAX_DIGITS):  # the default of 28 digits would round long whole numbers
            found.append(sign * Decimal(re.sub(r"[^0-9.]", "", digits)).scaleb(power))
    return found


def judge_number(gold: str, answer: str, close: Callable[[Decimal, Decimal], bool], why: str) -> Score:
    """1, for the reason `why`, when the answer commits to a number that is `close` (its distance from the gold's, the
    gold's), else 0."""
    right = read_number(gold).value
    if right is None:
        return Score(0.0, f"the gold {gold[:60]!r} is not a number")
    reading = read_number(answer)
    if reading.value is None:
        return Score(0.0, reading.reason)
    with localcontext(prec=2 * MAX_DIGITS):
        right_enough = close(abs(reading.value - right), right)
    return Score(1.0, why) if right_enough else Score(0.0, f"{reading.value:.12g} instead of {right:.12g}")
