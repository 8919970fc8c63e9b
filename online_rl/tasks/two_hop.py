"""Two-hop look-ups over the bundled corpus: the answer of one look-up says what to look up next."""

from __future__ import annotations

import random
from collections import Counter
from functools import cache

from online_rl.tasks.base import Task, ask
from online_rl.tasks.lookup import NUMERIC, askable, meta_of
from tools.search.corpus import Fact, facts

LEVELS = (1, 2)
_OF_COUNTRY = {
    "capital": "What is the capital of {x}?",
    "continent": "On which continent is {x}?",
    "population": "What is the population of {x}?",
    "area": "What is the area of {x} in square kilometres?",
    "currency": "Which currency is used in {x}?",
    "calling code": "What is the calling code of {x}?",
    "country code": "What is the two-letter country code of {x}?",
}
_OF_ELEMENT = {
    "atomic number": "What is the atomic number of {x}?",
    "atomic mass": "What is the atomic mass of {x}?",
    "density": "What is the density of {x} in g/cm3?",
}


def two_hop(rng: random.Random, level: int) -> Task:
    """Level 1: from a name that stands for its subject (a capital, a symbol). 2: from a city to its country."""
    while True:
        first, second, question = _described(rng) if level == 1 else _by_city(rng)
        if second.value.lower() not in question.lower():
            break
    verifier = "numeric" if second.relation in NUMERIC else "exact"
    return ask(question, verifier, second.value, "two_hop", level=str(level), **meta_of(first, second))


def _described(rng: random.Random) -> tuple[Fact, Fact, str]:
    if rng.random() < 0.3:
        relation = rng.choice(list(_OF_ELEMENT))
        second = rng.choice(askable()["element", relation])
        first = _by_subject("element", "symbol")[second.subject]
        return first, second, _OF_ELEMENT[relation].format(x=f"the element with the symbol {first.value}")
    relation = rng.choice([name for name in _OF_COUNTRY if name != "capital"])
    pool = [fact for fact in askable()["country", relation] if fact.subject in _unique_capitals()]
    second = rng.choice(pool)
    first = _unique_capitals()[second.subject]
    return first, second, _OF_COUNTRY[relation].format(x=f"the country whose capital is {first.value}")


def _by_city(rng: random.Random) -> tuple[Fact, Fact, str]:
    relation = rng.choice(list(_OF_COUNTRY))
    of = _by_subject("country", relation)
    first = rng.choice([fact for fact in askable()["city", "country"] if fact.value in of])
    return first, of[first.value], _OF_COUNTRY[relation].format(x=f"the country that the city of {first.subject} is in")


@cache
def _by_subject(kind: str, relation: str) -> dict[str, Fact]:
    return {fact.subject: fact for fact in askable()[kind, relation]}


@cache
def _unique_capitals() -> dict[str, Fact]:
    """By country, its capital, where no other country's has that name."""
    count = Counter(fact.value for fact in facts() if fact.relation == "capital")
    return {fact.subject: fact for fact in askable()["country", "capital"] if count[fact.value] == 1}
