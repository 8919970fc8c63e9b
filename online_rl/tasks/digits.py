"""Multi-digit arithmetic in four levels by the length of the numbers: what a small model can't do in its head."""

from __future__ import annotations

import random

from online_rl.tasks.base import Task, ask
from online_rl.tasks.expression import decimal_text, exact

DIGITS: dict[int, tuple[int, int]] = {1: (2, 3), 2: (4, 5), 3: (6, 8), 4: (9, 12)}  # level: fewest and most digits
_FORMS = (
    ("What is {a} + {b}?", "{a} + {b}"),
    ("Add {a} to {b}.", "{b} + {a}"),
    ("{a} - {b} = ?", "{a} - {b}"),
    ("Take {b} from {a}.", "{a} - {b}"),
    ("What is {a} * {b}?", "{a} * {b}"),
    ("Give me the exact product of {a} and {b}.", "{a} * {b}"),
    ("How many whole times does {b} fit into {a}?", "{a} // {b}"),
    ("What is left over when {a} is divided by {b}?", "{a} % {b}"),
)


def digits(rng: random.Random, level: int) -> Task:
    """One operation on two whole numbers of the level's length, the larger first."""
    fewest, most = DIGITS[level]
    text, form = rng.choice(_FORMS)
    if "/" in form or "%" in form:
        a, b = _number(rng, fewest, most), _number(rng, max(1, fewest // 2), max(1, most // 2))
    else:
        b, a = sorted((_number(rng, fewest, most), _number(rng, fewest, most)))
    numbers = {"a": str(a), "b": str(max(2, b))}
    expression = form.format(**numbers)
    gold = decimal_text(exact(expression), 0)
    key = "numbers:" + ",".join(sorted(numbers.values()))
    return ask(text.format(**numbers), "numeric", gold, "digits", key=key, level=str(level), expression=expression)


def _number(rng: random.Random, fewest: int, most: int) -> int:
    length = rng.randint(fewest, most)
    return rng.randint(10 ** (length - 1), 10**length - 1)
