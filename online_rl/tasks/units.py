"""Conversions of units in three levels, by factors that are exact by definition."""

from __future__ import annotations

import random

from online_rl.tasks.base import Task, ask
from online_rl.tasks.expression import decimal_text, exact, is_tie

PLACES = 3

# By quantity, each unit in the first: exact, by SI and by the international yard and pound of 1959.
FACTORS: dict[str, dict[str, str]] = {
    "length": {
        "metres": "1", "kilometres": "1000", "centimetres": "0.01", "millimetres": "0.001", "miles": "1609.344",
        "yards": "0.9144", "feet": "0.3048", "inches": "0.0254", "nautical miles": "1852",
    },
    "mass": {
        "grams": "1", "kilograms": "1000", "milligrams": "0.001", "tonnes": "1000000", "pounds": "453.59237",
        "ounces": "28.349523125",
    },
    "volume": {
        "litres": "1", "millilitres": "0.001", "cubic metres": "1000", "US gallons": "3.785411784",
        "US pints": "0.473176473",
    },
    "time": {"seconds": "1", "minutes": "60", "hours": "3600", "days": "86400", "weeks": "604800"},
    "area": {"square metres": "1", "hectares": "10000", "square kilometres": "1000000", "acres": "4046.8564224",
             "square feet": "0.09290304"},
    "speed": {"metres per second": "1", "kilometres per hour": "1/3.6", "miles per hour": "0.44704",
              "knots": "1852/3600"},
}  # fmt: skip
METRIC = {
    "length": ("kilometres", "metres", "centimetres", "millimetres"),
    "mass": ("tonnes", "kilograms", "grams", "milligrams"),
    "volume": ("cubic metres", "litres", "millilitres"),
    "time": ("weeks", "days", "hours", "minutes", "seconds"),
}  # from large to small
LEVELS = (1, 2, 3)


def units(rng: random.Random, level: int) -> Task:
    """Level 1: to a smaller metric unit, or of time. 2: between systems, or temperatures. 3: two amounts, or a rate.

    All but level 1 are rounded to 3 decimals. `meta["expression"]` is Python that computes the gold.
    """
    while True:
        question, expression = (_smaller, _between, _compound)[level - 1](rng)
        value = exact(expression)
        if value > 0 and not is_tie(value, PLACES):
            break
    whole = level == 1
    places = 0 if whole else PLACES
    if not whole:
        question += f" Round to {PLACES} decimals."
    return ask(
        question,
        "numeric",
        decimal_text(value, places),
        "units",
        key=f"units:{question.lower()}",
        level=str(level),
        expression=expression if whole else f"round({expression}, {PLACES})",
    )


def _smaller(rng: random.Random) -> tuple[str, str]:
    quantity = rng.choice(list(METRIC))
    names = METRIC[quantity]
    i, j = sorted(rng.sample(range(len(names)), 2))
    amount = rng.randint(2, 9_999)
    text = rng.choice(["How many {v} are {n} {u}?", "Convert {n} {u} to {v}.", "{n} {u} in {v}?"])
    factor = exact(f"({FACTORS[quantity][names[i]]}) / ({FACTORS[quantity][names[j]]})")
    return text.format(n=amount, u=names[i], v=names[j]), f"{amount} * {factor}"


def _between(rng: random.Random) -> tuple[str, str]:
    if rng.random() < 0.2:
        return _temperature(rng)
    quantity = rng.choice(list(FACTORS))
    u, v = rng.sample(list(FACTORS[quantity]), 2)
    amount = f"{rng.randint(11, 99_999) / 10:.1f}"
    text = rng.choice(["How many {v} are {n} {u}?", "Convert {n} {u} to {v}.", "What is {n} {u} in {v}?"])
    return text.format(n=amount, u=u, v=v), f"{amount} * ({FACTORS[quantity][u]}) / ({FACTORS[quantity][v]})"


def _temperature(rng: random.Random) -> tuple[str, str]:
    degrees = rng.randint(40, 900)
    text, expression = rng.choice([
        ("What is {n} degrees Celsius in Fahrenheit?", "{n} * 9 / 5 + 32"),
        ("What is {n} degrees Fahrenheit in Celsius?", "({n} - 32) * 5 / 9"),
        ("What is {n} degrees Celsius in kelvin?", "{n} + 273.15"),
        ("What is {n} degrees Fahrenheit in kelvin?", "({n} - 32) * 5 / 9 + 273.15"),
    ])  # fmt: skip
    return text.format(n=degrees), expression.format(n=degrees)


def _compound(rng: random.Random) -> tuple[str, str]:
    quantity = rng.choice(["length", "mass", "volume", "area"])
    u, v, w = rng.sample(list(FACTORS[quantity]), 3)
    of = {name: f"({factor})" for name, factor in FACTORS[quantity].items()}
    a, b = f"{rng.randint(21, 9_999) / 10:.1f}", f"{rng.randint(21, 9_999) / 10:.1f}"
    if rng.random() < 0.5:
        return (f"How many {w} are {a} {u} and {b} {v} together?", f"({a} * {of[u]} + {b} * {of[v]}) / {of[w]}")
    hours, minutes = rng.randint(2, 47), rng.randint(2, 59)
    question = f"A machine handles {a} {u} a minute. How many {v} is that in {hours} hours and {minutes} minutes?"
    return question, f"{a} * {of[u]} * ({hours} * 60 + {minutes}) / {of[v]}"
