"""Questions about dates in three levels, of the Gregorian calendar from 1900 to 2099."""

from __future__ import annotations

import random
from datetime import date, timedelta

from online_rl.tasks.base import Task, ask

LEVELS = (1, 2, 3)
WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_FIRST, _LAST = date(1900, 1, 1), date(2099, 12, 31)


def dates(rng: random.Random, level: int) -> Task:
    """Level 1: a weekday, or the date some days on. 2: days between dates. 3: how often a weekday falls, or hours.

    `meta` has what was asked (`asked`) and the dates and numbers in it (`values`), so that it can be computed again.
    """
    asked, values, question, verifier, gold = rng.choice(_MAKERS[level])(rng)
    dated = [value for value in values if "-" in value]
    key = "|".join(f"date:{value}" for value in dated[:1])  # the second follows from the first and a distance
    return ask(question, verifier, gold, "dates", key=key, level=str(level), asked=asked, values=" ".join(values))


Made = tuple[str, list[str], str, str, str]  # what is asked, values, question, verifier, gold


def _day(rng: random.Random) -> date:
    return _FIRST + timedelta(rng.randrange((_LAST - _FIRST).days - 20_000))


def _spoken(day: date) -> str:
    return f"{day.day} {day:%B %Y}"


def _weekday(rng: random.Random) -> Made:
    day = _day(rng)
    text = rng.choice(["Which day of the week is {d}?", "On what weekday does {d} fall?", "{d} is which weekday?"])
    return "weekday", [day.isoformat()], text.format(d=_spoken(day)), "exact", WEEKDAYS[day.weekday()]


def _days_on(rng: random.Random) -> Made:
    day, n = _day(rng), rng.randint(17, 900)
    text = rng.choice(["Which date is {n} days after {d}?", "What is the date {n} days from {d}?"])
    gold = (day + timedelta(n)).isoformat()
    question = text.format(n=n, d=_spoken(day)) + " Write it as YYYY-MM-DD."
    return "days on", [day.isoformat(), str(n)], question, "exact", gold


def _between(rng: random.Random) -> Made:
    day, n = _day(rng), rng.randint(40, 9_000)
    end = day + timedelta(n)
    text = rng.choice(["How many days are there from {d} to {e}?", "How many days is {e} after {d}?"])
    return "between", [day.isoformat(), end.isoformat()], text.format(d=_spoken(day), e=_spoken(end)), "numeric", str(n)


def _weekdays_in(rng: random.Random) -> Made:
    day, n, weekday = _day(rng), rng.randint(40, 3_000), rng.randrange(7)
    end = day + timedelta(n)
    count = sum((day + timedelta(i)).weekday() == weekday for i in range(n + 1))
    question = f"How many {WEEKDAYS[weekday]}s are there from {_spoken(day)} to {_spoken(end)}, both included?"
    return "weekdays in", [day.isoformat(), end.isoformat(), str(weekday)], question, "numeric", str(count)


def _hours(rng: random.Random) -> Made:
    day, n, start, end = _day(rng), rng.randint(3, 700), rng.randint(0, 23), rng.randint(0, 23)
    last = day + timedelta(n)
    question = (
        f"How many hours pass from {start}:00 on {_spoken(day)} to {end}:00 on {_spoken(last)}? Ignore time zones."
    )
    values = [day.isoformat(), last.isoformat(), str(start), str(end)]
    return "hours", values, question, "numeric", str(24 * n + end - start)


_MAKERS = {1: (_weekday, _days_on), 2: (_between,), 3: (_weekdays_in, _hours)}
