"""The generators: levels get harder, recorded sets stay what they were, and every gold is right by other means too."""

from __future__ import annotations

import hashlib
import json
import random
from datetime import date

import pytest

from online_rl import verifiers
from online_rl.tasks.base import ask
from online_rl.tasks.dates import WEEKDAYS
from online_rl.tasks.generated import KINDS, LEVELS, generate
from online_rl.tasks.recheck import agrees, by_day_number, by_decimal, day_number, recheck
from tools.search.index import LocalIndex
from tools.search.library import open_library

# Results that were recorded rest on these: a change here makes them wrong.
RECORDED = {
    ("arithmetic", 0, "heldout"): "40f31f136c1f",
    ("lookup", 0, "heldout"): "1463d85737c1",
    ("mixed", 0, "heldout"): "f3e1178dfc33",
    ("plain", 0, "heldout"): "8c0a65cc902e",
}


@pytest.fixture(scope="module")
def index(tmp_path_factory) -> LocalIndex:
    return open_library(tmp_path_factory.mktemp("index"))


@pytest.mark.parametrize("which", RECORDED, ids=str)
def test_sets_that_results_were_recorded_on_stay_what_they_were(which):
    kind, seed, split = which
    asked = [(task.question, task.gold) for task in generate(kind, 20, seed, split)]
    assert hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:12] == RECORDED[which]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "plain"])
async def test_the_gold_is_right_by_other_means(kind, index):
    """Decimals instead of fractions, day numbers instead of datetime, the index instead of the tables."""
    for task in generate(kind, 40, 5, "train"):
        again = await recheck(task, index)
        assert again is not None
        assert agrees(task, again), (task.question, task.gold, again)
        assert verifiers.get(task.verifier).score(task.gold, task.gold).right, task.question


async def test_a_wrong_gold_is_noticed(index):
    for kind in ("digits", "units", "dates", "two_hop", "lookup"):
        task = generate(kind, 1, 6, "train")[0]
        wrong = ask(task.question, task.verifier, "12345", kind, **task.meta)
        assert not agrees(wrong, await recheck(wrong, index))
    gone = generate("lookup", 1, 6, "train")[0]
    facts = json.loads(gone.meta["facts"])
    facts[0]["subject"] = "Atlantis"
    with pytest.raises(ValueError, match=r"has no .* of Atlantis"):
        await recheck(ask("?", "exact", "x", "lookup", facts=json.dumps(facts)), index)


@pytest.mark.parametrize("kind", LEVELS)
def test_each_level_is_made_and_named(kind):
    for level in LEVELS[kind]:
        tasks = generate(kind, 12, 1, "train", level=level)
        if kind == "mixed":
            assert {len(json.loads(task.meta["facts"])) for task in tasks} == {level}
        else:
            assert {task.meta["level"] for task in tasks} == {str(level)}
    if kind != "mixed":
        mixed = generate(kind, 4 * len(LEVELS[kind]), 1, "train")
        assert {task.meta["level"] for task in mixed} == {str(level) for level in LEVELS[kind]}


def test_digits_get_longer_with_the_level():
    def longest(level: int) -> float:
        tasks = generate("digits", 60, 2, "train", level=level)
        return sum(max(len(n) for n in task.meta["key"][8:].split(",")) for task in tasks) / len(tasks)

    assert longest(1) < longest(2) < longest(3) < longest(4)


def test_python_computes_the_gold_of_conversions_and_long_sums():
    for kind in ("digits", "units"):
        for task in generate(kind, 200, 9, "train"):
            value = eval(task.meta["expression"], {"__builtins__": {"round": round}})
            assert verifiers.get("numeric").score(task.gold, repr(value)).right, (task.question, task.gold, value)


def test_a_two_hop_question_doesnt_name_what_the_second_look_up_needs():
    for task in generate("two_hop", 200, 4, "train"):
        first, second = json.loads(task.meta["facts"])
        assert task.gold == second["value"]
        assert task.gold.lower() not in task.question.lower()
        told = first["subject"] if first["relation"] == "country" else first["value"]
        assert told in task.question
        if first["relation"] == "country":
            assert first["value"] == second["subject"]
        else:
            assert first["subject"] == second["subject"]


def test_a_mental_question_is_wrong_when_a_tool_was_called():
    for task in generate("mental", 60, 3, "heldout"):
        verifier = verifiers.get(task.verifier)
        assert verifier.score(task.gold, task.gold).right
        assert not verifier.score(task.gold, task.gold, tool_calls=1).right
        assert not verifier.score(task.gold, task.question).right, task.question  # the echo is no answer


def test_day_numbers_are_those_of_the_calendar():
    rng = random.Random(0)
    for _ in range(500):
        day = date.fromordinal(rng.randint(date(1900, 1, 1).toordinal(), date(2099, 12, 31).toordinal()))
        assert day_number(day.isoformat()) == day.toordinal() + 1_721_425
        assert by_day_number("weekday", [day.isoformat()]) == WEEKDAYS[day.weekday()]
        assert by_day_number("days on", [day.isoformat(), "0"]) == day.isoformat()
    assert by_day_number("between", ["2024-02-28", "2024-03-01"]) == "2"
    assert by_day_number("between", ["1900-02-28", "1900-03-01"]) == "1"


def test_decimals_agree_to_half_of_the_last_place():
    assert by_decimal("round(2 / 3, 2)").startswith("0.6666")
    assert agrees(ask("?", "numeric", "0.67", "units"), by_decimal("2 / 3"))
    assert not agrees(ask("?", "numeric", "0.66", "units"), by_decimal("2 / 3"))
    assert not agrees(ask("?", "numeric", "17", "digits"), "17.2")
    with pytest.raises(ValueError, match="cannot evaluate"):
        by_decimal("open('x')")
