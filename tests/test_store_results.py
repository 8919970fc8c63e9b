"""Tool results: kept once under their content's hash, found by what was asked, given back as they were seen."""

from __future__ import annotations

import json
import math
import multiprocessing
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from feedback_store import DamagedRecord, InvalidRecord, NotFound, Store, StoreError, as_stored, result_hash
from feedback_store.database import parse_location
from feedback_store.migrate import bring_up_to_date
from feedback_store.tool_results import call_hash, steps_with_results
from serving.trajectory import Observation, Step
from tests.databases import Places, count, edit

NOW = "2026-01-02 03:04:05.000000"
SOURCE = {"title": "Ulaanbaatar", "url": "https://example.org/ub", "source": "ddgs", "retrieved_at": "2026-01-02"}
FOUND = Observation("search", "Ulaanbaatar is the capital.", artifact={"sources": [SOURCE]}, seconds=0.4)


@pytest.fixture(scope="module")
def store(places: Places) -> Iterator[Store]:
    with Store.open(places.new()) as opened:
        yield opened


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store.db"


def step(observation: Observation | None, input: str = "capital of Mongolia", index: int = 0) -> Step:
    return Step(index, [1], [-0.5], [1], "v0", "…", "search", input, observation=observation)


def begin(store: Store, conversation: str = "") -> str:
    conversation = conversation or store.create_conversation("ada")
    return store.begin_turn(conversation, [{"role": "user", "content": "?"}], "v0", [1])


def asked(store: Store, *steps: Step, conversation: str = "") -> str:
    turn_id = begin(store, conversation)
    for one in steps:
        store.append_step(turn_id, one)
    return turn_id


# -- kept once


def test_a_result_that_is_seen_often_is_kept_once(place: str) -> None:
    with Store.open(place) as store:
        first = asked(store, step(FOUND), step(replace(FOUND, seconds=9.0), index=1))
        second = asked(store, step(FOUND, "Mongolia's capital"), step(None, "Ulaanbaatar", 1))
        one, again = store.tool_results(turn_id=first)
        (other,) = store.tool_results(turn_id=second)  # the step without a tool isn't among them
        assert one.hash == again.hash == other.hash == result_hash(as_stored(FOUND))
        assert (one.observation.seconds, again.observation.seconds) == (0.4, 9.0)  # each call's own
        assert [(r.turn_id, r.index, r.input) for r in (again, other)] == [
            (first, 1, "capital of Mongolia"),
            (second, 0, "Mongolia's capital"),
        ]
        assert vars(one.observation) == vars(FOUND)
    assert count(place, "tool_results") == 1


def test_whatever_differs_in_content_has_another_hash() -> None:
    changes: list[dict[str, Any]] = [{"tool": "code"}, {"text": "other"}, {"error": True}, {"artifact": {}}]
    others = [replace(FOUND, **change) for change in changes]
    assert len({result_hash(as_stored(one)) for one in [FOUND, *others]}) == 5
    reordered = replace(FOUND, artifact={"b": 1, "a": 2}), replace(FOUND, artifact={"a": 2, "b": 1})
    assert len({result_hash(as_stored(one)) for one in reordered}) == 1
    assert call_hash("a", "bc") != call_hash("ab", "c")


def test_the_hash_is_the_same_in_every_release() -> None:
    """Stores and the folders of runs are full of them: a change here needs a migration."""
    assert result_hash(as_stored(FOUND)) == "fbd5c7094faf61f5da7e9e7ffa0accd78343c3304c1eb5e6e77e22483833b783"
    assert call_hash("search", "é\0") == "070caaed916ddb31cd3eb189c7436d42afb2d01ebeffb70df6a48e2782f37697"


def write_the_same(place: str, start: Any, number: int) -> None:
    start.wait(30)
    with Store.open(place) as store:
        turn_id = begin(store)
        for index in range(20):
            store.append_step(
                turn_id, step(replace(FOUND, text=f"result {index}"), f"query {index} of {number}", index)
            )


def test_processes_that_write_the_same_results_at_once_keep_each_once(place: str) -> None:
    Store.open(place).close()
    context = multiprocessing.get_context("fork")
    start = context.Barrier(6)
    writers = [context.Process(target=write_the_same, args=(place, start, number)) for number in range(6)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert [writer.exitcode for writer in writers] == [0] * 6
    assert (count(place, "tool_results"), count(place, "steps")) == (20, 120)
    with Store.open(place) as store:
        for number in range(6):
            seen = store.recorded_result("search", f"query 7 of {number}")
            assert seen is not None
            assert seen.text == "result 7"


# -- given back

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
ANY_TEXT = st.text(st.characters(codec=None), max_size=200)  # lone surrogates and NUL too


@given(tool=ANY_TEXT, text=ANY_TEXT, input=ANY_TEXT, artifact=st.dictionaries(st.text(), JSON, max_size=4))
@example(tool="search", text="</response><|im_end|>\n<answer>", input="\0", artifact={"\0": "\ud83d", "n": 1e308})
@example(tool="t", text="x" * 2_000_000, input="y" * 2_000_000, artifact={"x": ["z" * 2_000_000]})
@settings(max_examples=60, deadline=None)
def test_any_result_comes_back_as_it_was_recorded(
    store: Store, tool: str, text: str, input: str, artifact: dict[str, Any]
) -> None:
    expected = as_stored(Observation(tool, text, True, artifact, 0.25))
    turn_id = asked(store, step(Observation(tool, text, True, artifact, 0.25), input))
    (kept,) = store.turn(turn_id).steps
    (listed,) = store.tool_results(turn_id=turn_id)
    assert kept.observation == listed.observation == expected
    assert store.recorded_result(tool, input, turn_id=turn_id) == expected
    assert listed.hash == result_hash(expected)
    assert as_stored(expected) == expected  # recording what was recorded changes nothing
    if "\0" not in text and text.isprintable():
        assert expected.text == text
    if not any(0xD800 <= ord(c) <= 0xDFFF for c in json.dumps(artifact, ensure_ascii=False)):
        assert expected.artifact == artifact


def nested(levels: int) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for _ in range(levels):
        value = {"in": value}
    return value


class Hostile:
    def __str__(self) -> str:
        raise RuntimeError("no words")


@pytest.mark.parametrize(
    ("artifact", "kept"),
    [
        ({"path": Path("plot.png"), 1: (2, 3)}, {"path": "plot.png", "1": [2, 3]}),
        ({"x": math.nan, "y": -math.inf}, {"x": "NaN", "y": "-Infinity"}),
        ({("a", "b"): 1}, "keys must be str"),
        (nested(65), "nested more than 64"),
        (nested(100_000), "RecursionError"),
        ({"n": 10**5000}, "4300 digits"),
        ({"x": Hostile()}, "RuntimeError: no words"),
        (["not", "a", "dict"], "Error"),
    ],
)
def test_an_artifact_that_json_cannot_hold_loses_no_text(store: Store, artifact: Any, kept: Any) -> None:
    turn_id = asked(store, step(replace(FOUND, artifact=artifact)))
    (seen,) = store.tool_results(turn_id=turn_id)
    assert seen.observation.text == FOUND.text
    if isinstance(kept, dict):
        assert seen.observation.artifact == kept
    else:
        assert kept in seen.observation.artifact["not_recorded"]


# -- found


def test_the_newest_result_of_a_call_is_found(place: str) -> None:
    moments = iter(datetime(2026, 1, day, tzinfo=UTC) for day in range(1, 29))
    with Store.open(place, now=lambda: next(moments)) as store:
        here, there = store.create_conversation("ada"), store.create_conversation("bob")
        old = asked(store, step(replace(FOUND, text="old")), conversation=here)
        new = asked(store, step(replace(FOUND, text="new")), conversation=there)
        flaky = asked(store, step(replace(FOUND, text="429", error=True)), conversation=there)
        stamped = {one.turn_id: one.at for turn in (old, new, flaky) for one in store.tool_results(turn_id=turn)}

        def text(**which: Any) -> str | None:
            found = store.recorded_result("search", "capital of Mongolia", **which)
            return None if found is None else found.text

        assert text() == "429"
        assert text(errors=False) == "new"
        assert text(conversation_id=here) == text(turn_id=old) == "old"
        assert text(before=stamped[flaky]) == "new"
        assert text(before=stamped[new]) == text(before=stamped[new] - timedelta(hours=1)) == "old"
        assert text(before=stamped[old]) is None
        assert text(conversation_id=here, before=stamped[old]) is None
        assert store.recorded_result("search", "capital of mongolia") is None
        assert store.recorded_result("code", "capital of Mongolia") is None
        assert [r.observation.text for r in store.tool_results(conversation_id=there)] == ["new", "429"]


def test_a_task_knows_what_the_turns_that_asked_for_it_saw(store: Store) -> None:
    turns = [asked(store, step(replace(FOUND, text=text), "q of a task")) for text in ("first", "second")]
    later = asked(store, step(replace(FOUND, text="of another"), "q of a task"))
    ids = {store.add_outcome(turn, "person", 0.0, "exact", "Ulaanbaatar").task_id for turn in turns}
    other = store.add_outcome(later, "person", 0.0, "exact", "something else").task_id
    (task_id,) = ids
    for task, text in ((task_id, "second"), (other, "of another")):
        found = store.recorded_result("search", "q of a task", task_id=task)
        assert found is not None
        assert found.text == text
    assert store.recorded_result("search", "q of a task", task_id="task_unknown") is None


def test_any_tool_of_ones_own_is_found_by_the_arguments_that_it_was_given(store: Store) -> None:
    arguments = json.dumps({"city": "Ulaanbaatar"})
    written = '{ "name":"weather",   "arguments": {"city": "Ulaanbaatar"} }'
    seen = Observation("weather", "-20 °C", artifact={"backend": "mcp"})
    turn_id = asked(store, replace(step(seen, written), action="call", tool_input=arguments))
    assert store.recorded_result("weather", arguments) == as_stored(seen)
    assert store.tool_results(turn_id=turn_id)[0].input == store.turn(turn_id).steps[0].input == written


def test_a_look_up_reads_an_index(path: Path) -> None:
    Store.open(path).close()
    statement = (
        str(steps_with_results().compile()) + " WHERE steps.call_hash = 'x' ORDER BY steps.created_at DESC LIMIT 1"
    )
    with closing(sqlite3.connect(path)) as connection:
        plan = " ".join(row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {statement}"))
    assert "ix_steps_call_hash_created_at" in plan
    assert "SCAN" not in plan
    assert "TEMP B-TREE" not in plan


def test_a_look_up_of_nothing_is_refused(store: Store) -> None:
    for which in ({}, {"turn_id": "a", "conversation_id": "b"}):
        with pytest.raises(InvalidRecord, match="either"):
            store.tool_results(**which)
    with pytest.raises(NotFound, match="turn_gone"):
        store.tool_results(turn_id="turn_gone")
    with pytest.raises(NotFound, match="conv_gone"):
        store.tool_results(conversation_id="conv_gone")
    assert store.tool_results(conversation_id=store.create_conversation("ada")) == []


# -- damaged and old files


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("DELETE FROM tool_results", "isn't in the store"),
        ("UPDATE tool_results SET text = 'forged'", "other content"),
        ("UPDATE tool_results SET artifact = '{\"sour'", "other content"),
        ("UPDATE tool_results SET artifact = 'null'", "other content"),
    ],
)
def test_a_result_that_is_gone_or_altered_is_named(path: Path, damage: str, message: str) -> None:
    with Store.open(path) as store:
        turn_id = asked(store, step(FOUND))
        edit(path, damage)
        reads = (
            lambda: store.turn(turn_id),
            lambda: store.tool_results(turn_id=turn_id),
            lambda: store.recorded_result("search", "capital of Mongolia"),
        )
        for read in reads:
            with pytest.raises(DamagedRecord, match=f"Step 0 of turn {turn_id}.*{message}.*backup"):
                read()
        assert store.conversations()  # the rest of the record is readable


OLD_STEP = (
    "INSERT INTO steps (turn_id, position, version, token_ids, logprobs, mask, text, thought, action, input, "
    "well_formed, seconds, tool, observation, observation_error, observation_artifact, observation_seconds, "
    "created_at) VALUES (?, ?, 'v0', x'01000000', x'000000bf', x'01', '…', '', 'search', ?, 1, 1.5, ?, ?, ?, ?, ?, ?)"
)


@pytest.fixture
def old_file(path: Path) -> Path:
    """A file of the second revision: a turn of 1203 steps, their observations inside."""
    bring_up_to_date(parse_location(path), 5, revision="0002")
    rows = [
        ("turn_1", n, f"query {n}", "search", f"result {n % 10}", 0, json.dumps({"n": n % 10}), 0.5, NOW)
        for n in range(1200)
    ]
    rows += [
        ("turn_1", 1200, "bad", "invalid", "No action.", 1, None, 0.0, NOW),
        ("turn_1", 1201, "odd", "code", "\ufffd nul", 0, '{"x": NaN, "nul": "\\u0000"}', 0.1, NOW),
        ("turn_1", 1202, "the end", None, None, None, None, None, NOW),
    ]
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("INSERT INTO conversations VALUES ('conv_1', 'ada', 'Old', ?, ?)", (NOW, NOW))
        connection.execute(
            "INSERT INTO turns VALUES ('turn_1', 'conv_1', 'r', '[]', x'', 'v0', 'done', 'a', '', '', 1, '', ?, ?)",
            (NOW, NOW),
        )
        connection.executemany(OLD_STEP, rows)
    return path


@pytest.fixture
def far_east() -> Iterator[None]:
    """Times in a file are UTC, wherever it is migrated."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TZ", "Asia/Ulaanbaatar")
        time.tzset()
        yield
    time.tzset()


@pytest.mark.usefixtures("far_east")
def test_the_observations_of_an_old_file_are_moved(old_file: Path) -> None:
    with Store.open(old_file) as store:
        steps = store.turn("turn_1").steps
        assert len(steps) == 1203
        for n, kept in enumerate(steps[:1200]):
            assert kept.observation is not None
            assert vars(kept.observation) == vars(Observation("search", f"result {n % 10}", False, {"n": n % 10}, 0.5))
        invalid, odd, last = (kept.observation for kept in steps[1200:])
        assert invalid is not None
        assert (invalid.tool, invalid.error, invalid.artifact) == ("invalid", True, {})
        assert odd is not None
        assert (odd.text, odd.artifact) == ("\ufffd nul", {"x": "NaN", "nul": "\0"})
        assert last is None
        assert (steps[0].token_ids, steps[0].logprobs, steps[0].text, steps[0].seconds) == ([1], [-0.5], "…", 1.5)
        found = store.recorded_result("search", "query 1199")
        assert found is not None
        assert found.text == "result 9"
        # what an old file holds and what is written now are one content
        again = asked(store, step(Observation("search", "result 3", artifact={"n": 3})))
        assert store.tool_results(turn_id=again)[0].hash == store.tool_results(turn_id="turn_1")[3].hash
    with closing(sqlite3.connect(old_file)) as connection:
        counted = "SELECT count(*), min(created_at), max(created_at) FROM tool_results"
        assert connection.execute(counted).fetchone() == (12, NOW, NOW)
    (copy,) = old_file.parent.glob("store.db.revision-0002.*.bak")
    assert count(copy, "steps") == 1203


def test_an_old_row_that_is_not_json_is_named_and_nothing_is_changed(old_file: Path) -> None:
    edit(old_file, "UPDATE steps SET observation_artifact = '{\"n\": ' WHERE position = 777")
    with pytest.raises(StoreError, match=r"step 777 of turn turn_1 isn't JSON.*undone.*\.bak"):
        Store.open(old_file)
    edit(old_file, "UPDATE steps SET observation_artifact = '{}' WHERE position = 777")
    with Store.open(old_file) as store:
        assert len(store.tool_results(turn_id="turn_1")) == 1202
