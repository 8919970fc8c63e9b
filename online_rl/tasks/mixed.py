"""Mixed tasks: look a fact or two up, then compute with them."""

from __future__ import annotations

import random
from collections.abc import Callable

from online_rl.tasks.base import Task, ask
from online_rl.tasks.expression import decimal_text, exact, is_tie
from online_rl.tasks.lookup import askable, meta_of, spoken
from tools.search.corpus import Fact


def mixed(rng: random.Random) -> Task:
    """One question whose gold follows from facts of the corpus; `meta` has the facts and the Python expression."""
    while True:
        used, question, expression, places = rng.choice(_MAKERS)(rng)
        value = exact(expression)
        if value > 0 and not (places and is_tie(value, places)):
            break
    code = f"round({expression}, {places})" if places else expression
    return ask(question, "numeric", decimal_text(value, places), "mixed", **meta_of(*used), expression=code)


Made = tuple[list[Fact], str, str, int]  # facts, question, expression, decimal places


def _pair(rng: random.Random, kind: str, relation: str) -> tuple[Fact, Fact]:
    """Two facts of one relation, the larger first."""
    x, y = rng.sample(askable()[kind, relation], 2)
    return (x, y) if float(x.value) >= float(y.value) else (y, x)


def _times_larger(rng: random.Random) -> Made:
    x, y = _pair(rng, rng.choice(["country", "city"]), "population")
    text = rng.choice([
        "How many times larger is the population of {x} than that of {y}, to 2 decimals?",
        "Divide the population of {x} by the population of {y} and round to 2 decimals.",
    ])  # fmt: skip
    return [x, y], text.format(x=spoken(x, rng), y=spoken(y, rng)), f"{x.value} / {y.value}", 2


def _more_people(rng: random.Random) -> Made:
    x, y = _pair(rng, rng.choice(["country", "city"]), "population")
    text = rng.choice([
        "How many more people live in {x} than in {y}?",
        "What is the difference in population between {x} and {y}?",
    ])  # fmt: skip
    return [x, y], text.format(x=spoken(x, rng), y=spoken(y, rng)), f"{x.value} - {y.value}", 0


def _together(rng: random.Random) -> Made:
    x, y = _pair(rng, rng.choice(["country", "city"]), "population")
    text = rng.choice([
        "What is the combined population of {x} and {y}?",
        "How many people live in {x} and {y} together?",
    ])  # fmt: skip
    return [x, y], text.format(x=spoken(x, rng), y=spoken(y, rng)), f"{x.value} + {y.value}", 0


def _area_ratio(rng: random.Random) -> Made:
    x, y = _pair(rng, "country", "area")
    question = f"How many times does {spoken(y, rng)} fit into {spoken(x, rng)} by area, to 2 decimals?"
    return [x, y], question, f"{x.value} / {y.value}", 2


def _people_per_area(rng: random.Random) -> Made:
    areas = {fact.subject: fact for fact in askable()["country", "area"] if float(fact.value) >= 100}
    x = rng.choice([fact for fact in askable()["country", "population"] if fact.subject in areas])
    area = areas[x.subject]
    question = f"How many people per square kilometre live in {spoken(x, rng)}, to 2 decimals?"
    return [x, area], question, f"{x.value} / {area.value}", 2


def _atomic_product(rng: random.Random) -> Made:
    x = rng.choice(askable()["element", "atomic number"])
    factor = rng.randint(13, 997)
    text = rng.choice([
        "What is the atomic number of {x} multiplied by {n}?",
        "Take the atomic number of {x} times {n}. What do you get?",
    ])  # fmt: skip
    return [x], text.format(x=spoken(x, rng), n=factor), f"{x.value} * {factor}", 0


def _atomic_sum(rng: random.Random) -> Made:
    x, y = _pair(rng, "element", "atomic number")
    question = f"What is the sum of the atomic numbers of {spoken(x, rng)} and {spoken(y, rng)}?"
    return [x, y], question, f"{x.value} + {y.value}", 0


def _moles(rng: random.Random) -> Made:
    x = rng.choice(askable()["element", "atomic mass"])
    n = rng.randint(3, 480)
    question = f"How many grams do {n} moles of {spoken(x, rng)} weigh, to 2 decimals?"
    return [x], question, f"{n} * {x.value}", 2


def _volume(rng: random.Random) -> Made:
    x = rng.choice(askable()["element", "density"])
    n = rng.randint(13, 980)
    question = f"How many grams do {n} cubic centimetres of {spoken(x, rng)} weigh, to 2 decimals?"
    return [x], question, f"{n} * {x.value}", 2


_MAKERS: tuple[Callable[[random.Random], Made], ...] = (
    _times_larger, _more_people, _together, _area_ratio, _people_per_area, _atomic_product, _atomic_sum, _moles,
    _volume,
)  # fmt: skip
