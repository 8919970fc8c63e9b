"""Arithmetic tasks in three levels, from templates whose gold is computed exactly."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, field

from online_rl.tasks.base import Task, ask
from online_rl.tasks.expression import decimal_text, exact, is_tie

NAMES = ("Amara", "Ben", "Chloe", "Dmitri", "Elif", "Farid", "Grace", "Hiro", "Ines", "Jonas", "Kavya", "Liam")
ITEMS = ("notebooks", "mugs", "lamps", "bricks", "tickets", "cables", "candles", "cushions", "seedlings", "tiles")

Range = tuple[int, int] | tuple[int, int, int]  # lowest, highest, and decimal places when not whole


@dataclass(frozen=True)
class Template:
    """`text` and `expression` share the placeholders named in `ranges` and `derived`.

    `places` is how many decimals the answer has; with `rounded` it is rounded to them, else it must be exact at them.
    """

    text: str
    expression: str
    ranges: dict[str, Range]
    places: int = 0
    rounded: bool = False
    derived: dict[str, str] = field(default_factory=dict)


TWO: dict[str, Range] = {"a": (101, 99_999), "b": (101, 99_999)}
PAIR: dict[str, Range] = {"a": (101, 9_999), "b": (101, 9_999)}
THREE: dict[str, Range] = {"a": (12, 9_999), "b": (12, 999), "c": (12, 999)}
RATIO: dict[str, Range] = {"a": (1_000, 99_999), "b": (13, 999)}
POWER: dict[str, Range] = {"a": (12, 199), "b": (3, 6)}
PERCENT: dict[str, Range] = {"a": (3, 97), "b": (101, 99_999)}

LEVEL_1 = (
    Template("What is {a} * {b}?", "{a} * {b}", PAIR),
    Template("Calculate {a} × {b}.", "{a} * {b}", PAIR),  # noqa: RUF001 - people write the sign
    Template("Work out the product of {a} and {b}.", "{a} * {b}", PAIR),
    Template("{a} times {b} = ?", "{a} * {b}", PAIR),
    Template("Multiply {a} by {b}.", "{a} * {b}", PAIR),
    Template("how much is {a} x {b}", "{a} * {b}", PAIR),
    Template("I need {a} multiplied by {b}, exactly.", "{a} * {b}", PAIR),
    Template("What is {a} + {b}?", "{a} + {b}", TWO),
    Template("Add {a} and {b}.", "{a} + {b}", TWO),
    Template("What is the sum of {a} and {b}?", "{a} + {b}", TWO),
    Template("{a} plus {b}, please", "{a} + {b}", TWO),
    Template("What is {a} - {b}?", "{a} - {b}", TWO),
    Template("Subtract {b} from {a}.", "{a} - {b}", TWO),
    Template("Find the difference: {a} minus {b}.", "{a} - {b}", TWO),
    Template("How much is left when you take {b} away from {a}?", "{a} - {b}", TWO),
)

LEVEL_2 = (
    Template("What is ({a} + {b}) * {c}?", "({a} + {b}) * {c}", THREE),
    Template("Compute {a} * {b} - {c}.", "{a} * {b} - {c}", THREE),
    Template("Evaluate {a} * ({b} - {c}).", "{a} * ({b} - {c})", THREE),
    Template("Add {a} to the product of {b} and {c}.", "{a} + {b} * {c}", THREE),
    Template("Multiply {a}, {b} and {c} together.", "{a} * {b} * {c}", THREE),
    Template("What is {p} / {b}?", "{p} / {b}", {"a": (101, 9_999), "b": (12, 999)}, derived={"p": "{a} * {b}"}),
    Template("How many times does {b} go into {p}?", "{p} // {b}", RATIO, derived={"p": "{a} * {b}"}),
    Template("What is {a} divided by {b}, rounded to 2 decimals?", "{a} / {b}", RATIO, 2, True),
    Template("Divide {a} by {b}. Give two decimal places.", "{a} / {b}", RATIO, 2, True),
    Template("What is ({a} - {b}) / {c}, to 2 decimals?", "({a} - {b}) / {c}", THREE, 2, True),
    Template("What is {a}% of {b}?", "{b} * {a} / 100", PERCENT, 2),
    Template("Increase {b} by {a} percent.", "{b} * (100 + {a}) / 100", PERCENT, 2),
    Template("What remains of {b} after a cut of {a}%?", "{b} * (100 - {a}) / 100", PERCENT, 2),
    Template(
        "What percentage of {b} is {a}? Round to 2 decimals.",
        "{a} / {b} * 100",
        {"a": (101, 4_999), "b": (5_000, 99_999)},
        2,
        True,
    ),
    Template("What is {a} to the power of {b}?", "{a} ** {b}", POWER),
    Template("Calculate {a}^{b}.", "{a} ** {b}", POWER),
    Template("What is the square of {a}?", "{a} ** 2", {"a": (101, 9_999)}),
    Template("What is the remainder when {a} is divided by {b}?", "{a} % {b}", RATIO),
    Template("{a} mod {b} = ?", "{a} % {b}", RATIO),
    Template("What is the average of {a}, {b} and {c}, to 2 decimals?", "({a} + {b} + {c}) / 3", THREE, 2, True),
)

LEVEL_3 = (
    Template(
        "If a shop sells {a} {item} at {b} dollars each, how much does it take in?",
        "{a} * {b}",
        {"a": (113, 987), "b": (3, 94, 2)},
        2,
    ),
    Template(
        "{name} buys {a} {item} at ${b} each and pays with ${c}. How much change is due?",
        "{c} - {a} * {b}",
        {"a": (6, 38), "b": (1, 19, 2), "c": (500, 999)},
        2,
    ),
    Template(
        "A crate holds {a} {item}. A warehouse has {b} crates and ships {c} {item}. How many {item} are left?",
        "{a} * {b} - {c}",
        {"a": (24, 144), "b": (37, 412), "c": (112, 2_900)},
    ),
    Template(
        "A train travels {a} km/h for {b} hours and then {c} km/h for {d} hours. How many kilometres does it cover?",
        "{a} * {b} + {c} * {d}",
        {"a": (61, 289), "b": (3, 17), "c": (47, 198), "d": (3, 15)},
    ),
    Template(
        "A car uses {a} litres per 100 km. How many litres does it need for {b} km?",
        "{a} * {b} / 100",
        {"a": (4, 12, 1), "b": (213, 4_870)},
        3,
    ),
    Template(
        "{name} earns ${a} an hour and works {b} hours a week. How many dollars is that in {c} weeks?",
        "{a} * {b} * {c}",
        {"a": (13, 74, 2), "b": (17, 41), "c": (5, 51)},
        2,
    ),
    Template(
        "How many seconds are there in {a} hours and {b} minutes?",
        "{a} * 3600 + {b} * 60",
        {"a": (3, 487), "b": (2, 59)},
    ),
    Template(
        "How many minutes are {a} days, {b} hours and {c} minutes?",
        "{a} * 1440 + {b} * 60 + {c}",
        {"a": (3, 364), "b": (2, 23), "c": (2, 59)},
    ),
    Template(
        "{name} runs {a} metres every day for {b} days. How many kilometres is that in total?",
        "{a} * {b} / 1000",
        {"a": (1_130, 9_870), "b": (12, 365)},
        3,
    ),
    Template(
        "Convert {a} miles to kilometres, with 1.609 km to the mile. Round to 2 decimals.",
        "{a} * 1.609",
        {"a": (113, 9_870)},
        2,
        True,
    ),
    Template(
        "What is {a} degrees Fahrenheit in Celsius, to 2 decimals?", "({a} - 32) * 5 / 9", {"a": (113, 4_999)}, 2, True
    ),
    Template(
        "{a} litres of a {b}% salt solution are mixed with {c} litres of a {d}% one. "
        "What is the percentage of salt in the mixture, to 2 decimals?",
        "({a} * {b} + {c} * {d}) / ({a} + {c})",
        {"a": (12, 480), "b": (3, 45), "c": (12, 480), "d": (3, 45)},
        2,
        True,
    ),
    Template(
        "A jacket costs ${b}. It is reduced by {a}% and then {c} dollars of tax are added. What is the final price?",
        "{b} * (100 - {a}) / 100 + {c}",
        {"a": (5, 70), "b": (114, 988), "c": (3, 29)},
        2,
    ),
    Template(
        "A hall has {a} rows of {b} seats. Tickets cost ${c} and {d} seats stay empty. "
        "How many dollars do the tickets bring in?",
        "({a} * {b} - {d}) * {c}",
        {"a": (17, 64), "b": (18, 72), "c": (7, 89), "d": (13, 280)},
    ),
    Template(
        "{name} saves ${a} every month and already has ${b}. How many dollars will there be after {c} months?",
        "{b} + {a} * {c}",
        {"a": (113, 987), "b": (1_013, 9_870), "c": (13, 96)},
    ),
    Template(
        "A rectangular field is {a} m long and {b} m wide. What does a fence around it cost at ${c} a metre?",
        "2 * ({a} + {b}) * {c}",
        {"a": (113, 978), "b": (47, 634), "c": (3, 58)},
    ),
    Template(
        "{p} {item} are shared equally among {b} schools. Each school keeps {c} and gives the rest away. "
        "How many does one school give away?",
        "{p} / {b} - {c}",
        {"a": (213, 987), "b": (13, 87), "c": (17, 198)},
        derived={"p": "{a} * {b}"},
    ),
    Template(
        "A pump moves {a} litres a minute. How many litres does it move in {b} hours and {c} minutes?",
        "{a} * ({b} * 60 + {c})",
        {"a": (13, 487), "b": (2, 47), "c": (3, 58)},
    ),
    Template(
        "{name} puts ${a} in a bank at {b}% simple interest a year. How much interest is that after {c} years?",
        "{a} * {b} * {c} / 100",
        {"a": (1_130, 98_700), "b": (2, 11), "c": (3, 24)},
        2,
    ),
    Template(
        "A printer makes {a} pages a minute. How many minutes does it need for {b} copies of a report of {c} pages, "
        "rounded to 2 decimals?",
        "{b} * {c} / {a}",
        {"a": (17, 68), "b": (13, 240), "c": (17, 310)},
        2,
        True,
    ),
)
LEVELS: dict[int, tuple[Template, ...]] = {1: LEVEL_1, 2: LEVEL_2, 3: LEVEL_3}


def arithmetic(rng: random.Random, level: int) -> Task:
    """One task of `level` 1 (two operands), 2 (several steps, rounding, percentages) or 3 (a word problem).

    `meta["expression"]` is Python that computes the gold; every value is positive.
    """
    if level not in LEVELS:
        raise ValueError(f"unknown arithmetic level {level!r}: choose one of {sorted(LEVELS)}")
    template = rng.choice(LEVELS[level])
    while True:
        numbers = {name: _draw(rng, bounds) for name, bounds in template.ranges.items()}
        for name, source in template.derived.items():
            numbers[name] = decimal_text(exact(source.format(**numbers)), 0)
        expression = template.expression.format(**numbers)
        value = exact(expression)
        if value > 0 and not (template.rounded and is_tie(value, template.places)):
            break
    shown = {k: _grouped(v) for k, v in numbers.items()} if rng.random() < 0.15 else numbers
    question = template.text.format(**shown, name=rng.choice(NAMES), item=rng.choice(ITEMS))
    return ask(
        question,
        "numeric",
        decimal_text(value, template.places),
        "arithmetic",
        key="numbers:" + ",".join(sorted(re.findall(r"\d+(?:\.\d+)?", question.replace(",", "")))),
        level=str(level),
        expression=f"round({expression}, {template.places})" if template.rounded else expression,
    )


def _draw(rng: random.Random, bounds: Range) -> str:
    lowest, highest, *places = bounds
    if not places:
        return str(rng.randint(lowest, highest))
    scale = 10 ** places[0]
    cents = rng.randint(lowest * scale, highest * scale)
    return f"{cents / scale:.{places[0]}f}"


def _grouped(number: str) -> str:
    """With commas between thousands, as some people write."""
    whole, dot, rest = number.partition(".")
    return f"{int(whole):,}{dot}{rest}"
