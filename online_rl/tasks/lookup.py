"""Look-up tasks over the bundled corpus: one fact asked in many ways."""

from __future__ import annotations

import json
import random
from dataclasses import asdict
from functools import cache

from online_rl.tasks.base import Task, ask
from tools.search.corpus import Fact, facts

PHRASINGS: dict[tuple[str, str], tuple[str, ...]] = {
    ("country", "capital"): (
        "What is the capital of {s}?",
        "Which city is the capital of {s}?",
        "what's the capital city of {s}",
        "Name the capital of {s}.",
        "I forgot: {s} has which capital?",
    ),
    ("country", "continent"): (
        "On which continent is {s}?",
        "What continent does {s} belong to?",
        "Which continent would I find {s} on?",
        "{s} is on what continent?",
    ),
    ("country", "population"): (
        "What is the population of {s}?",
        "How many people live in {s}?",
        "How big is the population of {s}?",
        "number of inhabitants of {s}?",
        "Tell me how many inhabitants {s} has.",
    ),
    ("country", "area"): (
        "What is the area of {s} in square kilometres?",
        "How many square kilometres does {s} cover?",
        "How large is {s}, in km2?",
        "What's the surface of {s} in square kilometres?",
    ),
    ("country", "currency"): (
        "Which currency is used in {s}?",
        "What is the currency of {s}?",
        "What money do people pay with in {s}?",
        "Name the currency of {s}.",
        "what currency do i need for a trip to {s}",
    ),
    ("country", "calling code"): (
        "What is the calling code of {s}?",
        "Which international dialling code does {s} have?",
        "What country code do I dial to phone {s}?",
        "Give me the telephone prefix for {s}.",
    ),
    ("country", "country code"): (
        "What is the two-letter country code of {s}?",
        "Which ISO two-letter code stands for {s}?",
        "What's the 2-letter ISO code for {s}?",
        "Give the two-letter country code for {s}.",
    ),
    ("city", "country"): (
        "In which country is {s}?",
        "Which country is the city of {s} in?",
        "What country does the city {s} belong to?",
        "where is {s}? just the country",
        "The city of {s} lies in which country?",
    ),
    ("city", "population"): (
        "How many people live in {s}?",
        "What is the population of the city of {s}?",
        "How many inhabitants does {s} have?",
        "population of {s}?",
        "Find the number of people living in {s}.",
    ),
    ("element", "symbol"): (
        "What is the chemical symbol of {s}?",
        "Which symbol stands for the element {s}?",
        "what's the symbol for {s}",
        "How is {s} abbreviated in the periodic table?",
    ),
    ("element", "atomic number"): (
        "What is the atomic number of {s}?",
        "what's the atomic number of {s}",
        "How many protons does an atom of {s} have?",
        "At which number does {s} stand in the periodic table?",
    ),
    ("element", "atomic mass"): (
        "What is the atomic mass of {s}?",
        "How heavy is an atom of {s}, in atomic mass units?",
        "Give the standard atomic weight of {s}.",
        "what's the relative atomic mass of {s}",
    ),
    ("element", "density"): (
        "What is the density of {s} in grams per cubic centimetre?",
        "How dense is {s}, in g/cm3?",
        "How many grams does one cubic centimetre of {s} weigh?",
        "Find the density of {s} in g/cm3.",
    ),
}
NUMERIC = {"population", "area", "calling code", "atomic number", "atomic mass", "density"}

_ARTICLE = (
    "Bahamas", "British Virgin Islands", "Cayman Islands", "Central African Republic", "Cocos Islands", "Comoros",
    "Cook Islands", "Democratic Republic of the Congo", "Dominican Republic", "Falkland Islands", "Faroe Islands",
    "French Southern Territories", "Gambia", "Isle of Man", "Maldives", "Marshall Islands", "Netherlands",
    "Northern Mariana Islands", "Philippines", "Republic of the Congo", "Seychelles", "Solomon Islands",
    "Turks and Caicos Islands", "U.S. Virgin Islands", "United Arab Emirates", "United Kingdom", "United States",
    "Vatican",
)  # fmt: skip

# Facts that are disputed, split between two right answers, or changed since the data was made.
_DISPUTED = {
    "capital": {
        "Bolivia", "Burundi", "Eswatini", "Israel", "Kazakhstan", "Montserrat", "Palestinian Territory",
        "South Africa", "Sri Lanka", "Western Sahara",
    },
    "continent": {
        "Armenia", "Azerbaijan", "Cyprus", "Egypt", "Georgia", "Indonesia", "Kazakhstan", "Russia", "Timor Leste",
        "Turkey",
    },
    "currency": {
        "Croatia", "Bulgaria", "Cuba", "Mauritania", "Sao Tome and Principe", "Sierra Leone", "Venezuela", "Zimbabwe",
    },
}  # fmt: skip
# Names that people write in several ways, none of which contains the other.
_MANY_SPELLINGS = {
    "US Dollar", "Pound Sterling", "CFA Franc BCEAO", "CFA Franc BEAC", "CFP Franc", "UAE Dirham", "Caribbean Guilder",
    "New Israeli Sheqel", "Convertible Mark", "Yuan Renminbi", "Bolívar Soberano",
}  # fmt: skip


@cache
def askable() -> dict[tuple[str, str], tuple[Fact, ...]]:
    """The facts with one right answer, by (kind, relation)."""
    by_name: dict[str, set[str]] = {}
    for fact in facts():
        by_name.setdefault(fact.subject, set()).add(fact.document_id)
    pools: dict[tuple[str, str], list[Fact]] = {key: [] for key in PHRASINGS}
    for fact in facts():
        key = (fact.kind, fact.relation)
        if key in pools and len(by_name[fact.subject]) == 1 and _has_one_answer(fact):
            pools[key].append(fact)
    return {key: tuple(pool) for key, pool in pools.items()}


def _has_one_answer(fact: Fact) -> bool:
    text = fact.relation not in NUMERIC
    code = fact.relation in ("symbol", "country code")  # short enough to stand in a name by chance
    return (
        fact.subject.isascii()
        and "(" not in fact.subject
        and fact.subject not in _DISPUTED.get(fact.relation, set())
        and not (text and (not fact.value.isascii() or fact.value in _MANY_SPELLINGS))
        and not (text and not code and fact.value.lower() in fact.subject.lower())  # the question would hold the answer
    )


def spoken(fact: Fact, rng: random.Random) -> str:
    """The subject as it stands inside a sentence."""
    if fact.kind == "element" and rng.random() < 0.5:
        return fact.subject.lower()
    name = fact.subject.removeprefix("The ")
    return f"the {name}" if fact.kind == "country" and name in _ARTICLE else fact.subject


def meta_of(*used: Fact) -> dict[str, str]:
    """What a task says about its facts: the keys that decide its split, and the facts themselves as JSON."""
    subjects = sorted({f"subject:{fact.subject}" for fact in used})
    return {"key": "|".join(subjects), "facts": json.dumps([asdict(fact) for fact in used], ensure_ascii=False)}


def lookup(rng: random.Random) -> Task:
    """One fact of the corpus, every (kind, relation) equally often. Verifier: `numeric` for numbers, else `exact`."""
    key = rng.choice(list(PHRASINGS))
    fact = rng.choice(askable()[key])
    question = rng.choice(PHRASINGS[key]).format(s=spoken(fact, rng))
    verifier = "numeric" if fact.relation in NUMERIC else "exact"
    return ask(question[0].upper() + question[1:] if question.startswith("the ") else question,
               verifier, fact.value, "lookup", **meta_of(fact))  # fmt: skip
