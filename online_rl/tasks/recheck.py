"""Is the gold right? Computed again by other means than the ones that made it.

Sums are evaluated in decimal instead of fractions, dates by day numbers instead of `datetime`, and facts are read from
what the local index finds instead of the tables that the questions were made from.
"""

from __future__ import annotations

import ast
import json
import re
from decimal import Decimal, localcontext

from online_rl.tasks.base import Task
from online_rl.tasks.dates import WEEKDAYS
from online_rl.tasks.mental import MONTHS, OPPOSITES
from tools.search.index import LocalIndex


async def recheck(task: Task, index: LocalIndex) -> str | None:
    """The gold that another computation gives, or None for a task that has nothing to compute (`plain`).

    Raises ValueError where the index doesn't know a fact.
    """
    facts = json.loads(task.meta.get("facts", "[]"))
    if "expression" in task.meta:
        found = {fact["value"]: await _looked_up(index, fact) for fact in facts}
        return by_decimal(_with(task.meta["expression"], found))
    if task.kind == "two_hop":
        first, second = facts
        subject = await _first_hop(index, first)
        return await _looked_up(index, second | {"subject": subject})
    if facts:
        return await _looked_up(index, facts[-1])
    if task.kind == "dates":
        return by_day_number(task.meta["asked"], task.meta["values"].split())
    return _by_words(task.question) if task.kind == "mental" else None


def agrees(task: Task, again: str) -> bool:
    """Whether two golds are the same: as numbers within half of the last place, or as text."""
    try:
        ours, theirs = Decimal(task.gold), Decimal(again)
    except ArithmeticError:
        return task.gold.casefold() == again.casefold()
    places = len(task.gold.partition(".")[2])
    return abs(ours - theirs) <= Decimal(1).scaleb(-places) / 2 if places else ours == theirs


def by_decimal(expression: str) -> str:
    """The value of an expression in 60 decimal digits, rounding calls left out."""
    with localcontext(prec=60):
        return f"{_decimal(ast.parse(expression, mode='eval').body, expression):f}"


def _decimal(node: ast.expr, source: str) -> Decimal:
    match node:
        case ast.Call(args=[inner, _]):  # round(x, n): the comparison allows for it
            return _decimal(inner, source)
        case ast.Constant():
            return Decimal(ast.get_source_segment(source, node) or str(node.value))
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_decimal(operand, source)
        case ast.BinOp(left=left, op=op, right=right):
            a, b = _decimal(left, source), _decimal(right, source)
            match op:
                case ast.Add():
                    return a + b
                case ast.Sub():
                    return a - b
                case ast.Mult():
                    return a * b
                case ast.Div():
                    return a / b
                case ast.FloorDiv():
                    return a // b
                case ast.Mod():
                    return a % b
                case ast.Pow():
                    return a**b
    raise ValueError(f"cannot evaluate {ast.unparse(node)!r}")


def day_number(iso: str) -> int:
    """The Julian day number of a Gregorian date (Fliegel and Van Flandern, CACM 11(10), 1968)."""
    year, month, day = map(int, iso.split("-"))
    shift = (month - 14) // 12 + (1 if (month - 14) % 12 else 0)  # divided towards zero
    return (
        day - 32_075
        + 1461 * (year + 4800 + shift) // 4
        + 367 * (month - 2 - 12 * shift) // 12
        - 3 * ((year + 4900 + shift) // 100) // 4
    )  # fmt: skip


def by_day_number(asked: str, values: list[str]) -> str:
    start = day_number(values[0])
    match asked:
        case "weekday":
            return WEEKDAYS[start % 7]  # day 0 was a Monday
        case "days on":
            return _date_of(start + int(values[1]))
        case "between":
            return str(day_number(values[1]) - start)
        case "weekdays in":
            weekday, end = int(values[2]), day_number(values[1])
            return str((end - weekday) // 7 - (start - 1 - weekday) // 7)
        case "hours":
            return str(24 * (day_number(values[1]) - start) + int(values[3]) - int(values[2]))
    raise ValueError(f"{asked!r} isn't asked about dates")


def _date_of(number: int) -> str:
    """The Gregorian date of a Julian day number (the same authors)."""
    left = number + 68_569
    century = 4 * left // 146_097
    left -= (146_097 * century + 3) // 4
    year = 4000 * (left + 1) // 1_461_001
    left -= 1461 * year // 4 - 31
    month = 80 * left // 2447
    day = left - 2447 * month // 80
    carry = month // 11
    return f"{100 * (century - 49) + year + carry:04}-{month + 2 - 12 * carry:02}-{day:02}"


def _by_words(question: str) -> str:
    """The day or month beside the one that is named, or the other of two opposites."""
    said = re.findall(r"[A-Za-z]+", question)
    for names in (WEEKDAYS, MONTHS):
        for name in names:
            if name in said:
                at = names.index(name) + (1 if "after" in said else -1)
                return names[at % len(names)]
    for one, other in OPPOSITES:
        if said[-1] in (one, other):
            return other if said[-1] == one else one
    raise ValueError(f"nothing to compute in {question!r}")


_SAYS = {
    "capital": r"The capital of .+? is (.+?)\. Its", "continent": r" is a country in (.+?)\.",
    "population": r"Its population is (\d+)\.", "area": r"Its area is (\d+) square",
    "currency": r"Its currency is (.+?)\.",
    "calling code": r"Its calling code is (\d+)\.", "country code": r"code is ([A-Z]{2})\.",
    "country": r" is a city in (.+?)\. Its", "symbol": r"with the symbol ([A-Z][a-z]*)\.",
    "atomic number": r"Its atomic number is (\d+)\.", "atomic mass": r"Its atomic mass is ([\d.]+)\.(?: |$)",
    "density": r"Its density is ([\d.]+(?:e-\d+)?) grams",
}  # fmt: skip


async def _looked_up(index: LocalIndex, fact: dict[str, str]) -> str:
    """What the index's document of the subject says."""
    for hit in await index.search(f"{fact['subject']} {fact['relation']}", 5):
        if hit.title == fact["subject"] and (said := re.search(_SAYS[fact["relation"]], f"{hit.text} ")):
            return said[1]
    raise ValueError(f"the local index has no {fact['relation']} of {fact['subject']}")


async def _first_hop(index: LocalIndex, fact: dict[str, str]) -> str:
    """The subject of the second look-up, found from what the question says."""
    if fact["relation"] == "country":  # from a city
        return await _looked_up(index, fact)
    for hit in await index.search(f"{fact['relation']} {fact['value']}", 10):
        said = re.search(_SAYS[fact["relation"]], f"{hit.text} ")
        if said and said[1] == fact["value"]:
            return hit.title
    raise ValueError(f"the local index knows nothing whose {fact['relation']} is {fact['value']}")


def _with(expression: str, found: dict[str, str]) -> str:
    """The expression with the values that were looked up again in the place of its own."""
    for before, now in found.items():
        expression = re.sub(rf"(?<![\d.]){re.escape(before)}(?![\d.])", now, expression)
    return expression
