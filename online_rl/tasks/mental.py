"""Questions with a known answer that need no tool: a call here is a useless call.

The verifier is `no_tool` with a gold: right is a reply that has the gold in it and came without a call.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from online_rl.tasks.base import Task, ask
from online_rl.tasks.dates import WEEKDAYS

LEVELS = (1, 2, 3)
MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
    "December",
)  # fmt: skip
OPPOSITES = (
    ("hot", "cold"), ("big", "small"), ("up", "down"), ("day", "night"), ("open", "closed"), ("early", "late"),
    ("fast", "slow"), ("wet", "dry"), ("young", "old"), ("full", "empty"), ("light", "dark"), ("left", "right"),
    ("first", "last"), ("rich", "poor"), ("hard", "soft"), ("win", "lose"), ("push", "pull"), ("buy", "sell"),
    ("inside", "outside"), ("above", "below"), ("true", "false"), ("north", "south"), ("east", "west"),
)  # fmt: skip
Made = tuple[str, str, str]  # question, gold, Python that computes it; empty for words


def mental(rng: random.Random, level: int) -> Task:
    """Level 1: a sum of single digits, the next day or month, an opposite. 2: two digits. 3: two small steps."""
    while True:
        question, gold, expression = rng.choice(_MAKERS[level])(rng)
        if gold.lower() not in question.lower():  # else to echo the question would be an answer
            break
    more = {"expression": expression} if expression else {}
    return ask(question, "no_tool", gold, "mental", key=f"mental:{question.lower()}", level=str(level), **more)


def _single_digits(rng: random.Random) -> Made:
    a, b = rng.randint(1, 9), rng.randint(1, 9)
    if rng.random() < 0.5:
        text = rng.choice(["What is {a} + {b}?", "What do {a} and {b} add up to?", "{a} plus {b}?"])
        return text.format(a=a, b=b), str(a + b), f"{a} + {b}"
    a, b = a + b, b
    text = rng.choice(["What is {a} - {b}?", "Take {b} away from {a}.", "{a} minus {b}?"])
    return text.format(a=a, b=b), str(a - b), f"{a} - {b}"


def _next_name(rng: random.Random) -> Made:
    names = rng.choice([WEEKDAYS, MONTHS])
    i, step = rng.randrange(len(names)), rng.choice([1, -1])
    what = "day" if names is WEEKDAYS else "month"
    text = rng.choice(["Which {w} comes {o} {n}?", "Name the {w} right {o} {n}.", "What {w} is {o} {n}?"])
    question = text.format(w=what, o="after" if step == 1 else "before", n=names[i])
    return question, names[(i + step) % len(names)], ""


def _opposite(rng: random.Random) -> Made:
    pair = rng.choice(OPPOSITES)
    word, gold = pair if rng.random() < 0.5 else pair[::-1]
    return rng.choice(["What is the opposite of {w}?", "Give me the opposite of '{w}'."]).format(w=word), gold, ""


def _two_digits(rng: random.Random) -> Made:
    a, b = rng.randint(11, 89), rng.randint(1, 9)
    text, expression = rng.choice([
        ("What is {a} + {b}?", "{a} + {b}"), ("What is {a} - {b}?", "{a} - {b}"), ("What is {a} plus 10?", "{a} + 10"),
        ("What is {b} times 10?", "{b} * 10"), ("What is twice {b}?", "2 * {b}"), ("Double {a}.", "2 * {a}"),
    ])  # fmt: skip
    made = expression.format(a=a, b=b)
    left, sign, right = made.split()
    value = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}[sign](int(left), int(right))
    return text.format(a=a, b=b), str(value), made


def _two_steps(rng: random.Random) -> Made:
    a, b, c = rng.randint(2, 9), rng.randint(1, 9), rng.randint(1, 9)
    thing = rng.choice(["apples", "books", "coins", "eggs", "pens", "stamps"])
    if rng.random() < 0.5 and a + b > c:
        question = f"I have {a} {thing}, get {b} more and give {c} away. How many do I have?"
        return question, str(a + b - c), f"{a} + {b} - {c}"
    question = f"Two bags hold {a} {thing} each, and {b} lie beside them. How many {thing} are there?"
    return question, str(2 * a + b), f"2 * {a} + {b}"


_MAKERS: dict[int, tuple[Callable[[random.Random], Made], ...]] = {
    1: (_single_digits, _next_name, _opposite),
    2: (_two_digits,),
    3: (_two_steps,),
}
