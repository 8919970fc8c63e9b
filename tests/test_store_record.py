"""What was said is kept exactly: conversations, turns, steps to the bit, outcomes, and what the console counts."""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from feedback_store import InvalidRecord, NotFound, Store, StoreError
from feedback_store.codec import (
    pack_ids,
    pack_mask,
    pack_step_ids,
    pack_step_mask,
    unpack_step_ids,
    unpack_step_mask,
)
from serving.trajectory import Observation, Step
from tests.databases import Places

ASK = [{"role": "system", "content": "Use tools."}, {"role": "user", "content": "What is 17 * 23?"}]
STEP = Step(
    index=0,
    token_ids=[1, 49151, 7],
    logprobs=[-0.1, -2.5, 0.0],
    mask=[1, 1, 0],
    version="v0",
    text="<code>print(17 * 23)</code>",
    action="code",
    input="print(17 * 23)",
    thought="I'll multiply.",
    observation=Observation("code", "391", artifact={"files": ["plot.png"], "n": 1}, seconds=0.25),
    seconds=1.5,
)


@pytest.fixture(scope="module")
def store(places: Places) -> Iterator[Store]:
    with Store.open(places.new()) as opened:
        yield opened


@pytest.fixture
def conversation(store: Store) -> str:
    return store.create_conversation("ada")


def begin(store: Store, conversation: str, question: str = "What is 17 * 23?") -> str:
    return store.begin_turn(conversation, [{"role": "user", "content": question}], "v0", [1, 2, 3])


def test_a_turn_comes_back_with_its_steps(store: Store, conversation: str) -> None:
    turn_id = store.begin_turn(conversation, ASK, "v0", [5, 6, 7], request_id="chatcmpl-1")
    running = store.turn(turn_id)
    assert (running.status, running.steps, running.finished_at) == ("running", [], None)
    last = replace(STEP, index=1, observation=None, action="answer", text="391", input="391", well_formed=False)
    store.append_step(turn_id, STEP)
    store.append_step(turn_id, last)
    store.finish_turn(turn_id, "391", "done")

    turn = store.turn(turn_id)
    assert (turn.conversation_id, turn.messages, turn.prompt_ids) == (conversation, ASK, [5, 6, 7])
    assert (turn.version, turn.status, turn.answer, turn.error) == ("v0", "done", "391", "")
    first, second = turn.steps
    for name in ("index", "token_ids", "mask", "version", "text", "action", "input", "thought", "seconds"):
        assert getattr(first, name) == getattr(STEP, name)
    assert first.logprobs == [float(np.float32(p)) for p in STEP.logprobs]
    assert first.observation is not None
    assert vars(first.observation) == vars(STEP.observation)
    assert (second.index, second.observation, second.well_formed) == (1, None, False)
    assert timedelta(0) <= datetime.now(UTC) - turn.created_at < timedelta(minutes=1)
    assert turn.finished_at is not None
    assert turn.finished_at.utcoffset() == timedelta(0)
    assert turn.request_id == "chatcmpl-1"


TOKENS = st.lists(st.tuples(st.integers(-(2**31), 2**31 - 1), st.floats(width=32), st.integers(0, 255)), max_size=50)


@given(TOKENS)
@settings(max_examples=25, deadline=None)
def test_tokens_logprobs_and_masks_come_back_to_the_bit(store: Store, tokens: list[tuple[int, float, int]]) -> None:
    ids, logprobs, mask = ([entry[i] for entry in tokens] for i in range(3))
    turn_id = begin(store, store.create_conversation("hypothesis"))
    store.append_step(turn_id, replace(STEP, token_ids=ids, logprobs=logprobs, mask=mask))
    (step,) = store.turn(turn_id).steps
    assert step.token_ids == ids
    assert step.mask == mask
    for kept, given_value in zip(step.logprobs, logprobs, strict=True):
        assert kept == given_value or (math.isnan(kept) and math.isnan(given_value))
        assert math.copysign(1, kept) == math.copysign(1, given_value)


@given(st.lists(st.tuples(st.integers(-(2**31), 2**31 - 1) | st.integers(0, 70_000), st.integers(0, 1)), max_size=40))
@settings(deadline=None)
def test_a_step_of_an_earlier_release_is_read_as_one_of_this(tokens: list[tuple[int, int]]) -> None:
    ids, mask = [token for token, _ in tokens], [own for _, own in tokens]
    for packed in (pack_ids(ids), pack_step_ids(ids)):
        assert unpack_step_ids(packed, len(ids)) == ids
    for packed in (pack_mask(mask), pack_step_mask(mask)):
        assert unpack_step_mask(packed, len(mask)) == mask


def test_tokens_are_stored_in_no_more_bytes_than_they_need() -> None:
    widths = [len(pack_step_ids([0, top])) // 2 for top in (2**16 - 1, 2**16, 2**24 - 1, 2**24)]
    assert (widths, len(pack_step_mask([1, 0] * 500)), len(pack_step_mask([2]))) == ([2, 3, 3, 4], 125, 1)


@given(st.text())
@settings(max_examples=25, deadline=None)
def test_any_text_is_kept(store: Store, text: str) -> None:
    turn_id = begin(store, store.create_conversation("hypothesis"), text)
    store.append_step(turn_id, replace(STEP, text=text, observation=Observation("code", text, artifact={"out": text})))
    store.finish_turn(turn_id, text, "done")
    turn = store.turn(turn_id)
    expected = text.replace("\0", "\ufffd")
    observation = turn.steps[0].observation
    assert observation is not None
    assert (turn.answer, turn.steps[0].text, observation.text) == (expected, expected, expected)
    assert (turn.messages[0]["content"], observation.artifact["out"]) == (text, text)


def test_half_a_character_from_a_client_loses_no_record(store: Store, conversation: str) -> None:
    turn_id = begin(store, conversation, "cut \ud83d")
    store.finish_turn(turn_id, "ok \ud83d\ude00 \ud83d", "done")
    assert store.turn(turn_id).answer == "ok 😀 \ufffd"
    assert store.history(conversation)[0]["content"] == "cut \ufffd"


def test_an_artifact_that_json_has_no_word_for_loses_no_step(store: Store, conversation: str) -> None:
    turn_id = begin(store, conversation)
    store.append_step(turn_id, replace(STEP, observation=Observation("code", "", artifact={"file": Path("a/b.png")})))
    observation = store.turn(turn_id).steps[0].observation
    assert observation is not None
    assert observation.artifact == {"file": "a/b.png"}


def test_history_has_the_done_turns_in_openai_shape(store: Store, conversation: str) -> None:
    for question, answer, status in [("one?", "1", "done"), ("two?", "", "no_answer"), ("three?", "3", "done")]:
        prompt = [ASK[0], *store.history(conversation), {"role": "user", "content": question}]
        store.finish_turn(store.begin_turn(conversation, prompt, "v0", []), answer, status)
    begin(store, conversation, "still running?")
    assert store.history(conversation) == [
        {"role": "user", "content": "one?"},
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": "three?"},
        {"role": "assistant", "content": "3"},
    ]


def test_conversations_are_listed_by_last_use_and_owner(store: Store) -> None:
    first, second = store.create_conversation("grace", "Compilers"), store.create_conversation("grace")
    begin(store, second, "  Where is\nLima?  ")
    begin(store, first)
    assert [c.id for c in store.conversations("grace")] == [first, second]
    assert [c.id for c in store.conversations("grace", limit=1)] == [first]
    assert (store.conversation(first).title, store.conversation(second).title) == ("Compilers", "Where is Lima?")
    assert store.conversation(first).turns == 1
    store.rename_conversation(second, "Peru")
    assert store.conversation(second).title == "Peru"
    assert [t.conversation_id for t in store.turns(second)] == [second]
    assert store.conversations("nobody") == []


def test_ids_sort_by_time(store: Store) -> None:
    ids = [store.create_conversation("ids") for _ in range(20)]
    assert ids == sorted(ids)
    assert all(len(i) <= 40 for i in ids)


def test_what_is_not_there_is_named(store: Store) -> None:
    calls = {
        "conv_x": [
            lambda: store.conversation("conv_x"),
            lambda: store.history("conv_x"),
            lambda: begin(store, "conv_x"),
        ],
        "turn_x": [
            lambda: store.turn("turn_x"),
            lambda: store.append_step("turn_x", STEP),
            lambda: store.finish_turn("turn_x", "", "done"),
            lambda: store.add_outcome("turn_x", "person", 1.0),
            lambda: store.add_task(ASK, "math", "1", "math", "client", turn_id="turn_x"),
        ],
    }
    for name, attempts in calls.items():
        for attempt in attempts:
            with pytest.raises(NotFound, match=repr(name)):
                attempt()


def test_an_id_that_is_no_text_is_a_store_error(store: Store) -> None:
    with pytest.raises(StoreError):
        store.turn("turn_\ud83d")


def test_a_finished_turn_takes_no_more(store: Store, conversation: str) -> None:
    turn_id = begin(store, conversation)
    store.finish_turn(turn_id, "", "error", error="the tool hung")
    assert store.turn(turn_id).error == "the tool hung"
    with pytest.raises(InvalidRecord, match="finished"):
        store.append_step(turn_id, STEP)
    with pytest.raises(InvalidRecord, match="finished"):
        store.finish_turn(turn_id, "391", "done")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask": [1]}, "parallel"),
        ({"token_ids": [1, 2, 2**31]}, "token ids"),
        ({"mask": [1, 1, 256]}, "mask"),
        ({"logprobs": [0.0, 0.0, 1e300]}, "logprobs"),
    ],
)
def test_a_malformed_step_is_refused(
    store: Store, conversation: str, change: dict[str, list[int]], message: str
) -> None:
    turn_id = begin(store, conversation)
    with pytest.raises(InvalidRecord, match=message):
        store.append_step(turn_id, replace(STEP, **change))
    assert store.turn(turn_id).steps == []


def test_bad_calls_are_refused_and_leave_nothing(store: Store, conversation: str) -> None:
    turn_id = begin(store, conversation)
    store.append_step(turn_id, STEP)
    with pytest.raises(InvalidRecord, match="already has a step 0"):
        store.append_step(turn_id, STEP)
    with pytest.raises(InvalidRecord, match="empty"):
        store.begin_turn(conversation, [], "v0", [])
    with pytest.raises(InvalidRecord, match="role"):
        store.begin_turn(conversation, [{"content": "hi"}], "v0", [])
    with pytest.raises(InvalidRecord, match="finished well"):
        store.finish_turn(turn_id, "", "finished well")  # type: ignore[arg-type]
    for score in (-0.1, 1.1, math.nan):
        with pytest.raises(InvalidRecord, match="score"):
            store.add_outcome(turn_id, "person", score)
    with pytest.raises(InvalidRecord, match="source"):
        store.add_outcome(turn_id, "ghost", 1.0)  # type: ignore[arg-type]
    assert len(store.turns(conversation)) == 1
    assert store.outcomes(turn_id) == []


def test_an_outcome_makes_its_task_exactly_once(place: str) -> None:
    with Store.open(place) as store:
        conversation = store.create_conversation("ada")
        turns = [store.begin_turn(conversation, ASK, "v0", []) for _ in range(2)]
        made = store.add_outcome(turns[0], "verifier", 1.0, "math", "391", owner="ada")
        again = store.add_outcome(turns[1], "person", 0.0, "math", "391", reason="too slow", owner="bob")
        other_gold = store.add_outcome(turns[1], "person", None, "math", "392")
        assert made.note == ""
        assert (again.task_id, again.note) == (made.task_id, "This task was already in the queue.")
        assert other_gold.task_id not in (None, made.task_id)
        assert store.add_outcome(turns[0], "person", 1.0).task_id is None
        assert "gold is missing" in store.add_outcome(turns[0], "client", 1.0, "math").note
        first, _ = store.tasks()
        assert (first.id, first.messages, first.verifier, first.gold) == (made.task_id, ASK, "math", "391")
        assert store.add_task(ASK, "math", "391", "math", "client") == (made.task_id, False)
        assert len(store.outcomes()) == 5
        assert store.outcomes(turns[1])[-1] == again


def test_a_full_queue_keeps_the_outcome_and_says_so(place: str) -> None:
    with Store.open(place, max_pending=1) as store:
        turn_id = begin(store, store.create_conversation("ada"))
        made = store.add_outcome(turn_id, "verifier", 1.0, "math", "391")
        full = store.add_outcome(turn_id, "verifier", 0.0, "math", "392")
        assert full.task_id is None
        assert "queue is full" in full.note
        assert store.outcomes(turn_id)[0] == full
        assert store.add_outcome(turn_id, "person", 1.0, "math", "391").task_id == made.task_id
        assert store.queue_stats()["pending"] == 1


def test_stats_count_everything(place: str) -> None:
    with Store.open(place) as store:
        conversation = store.create_conversation("ada")
        done, _ = begin(store, conversation), begin(store, conversation)
        store.finish_turn(done, "391", "done")
        store.add_outcome(done, "verifier", 1.0, "math", "391")
        store.add_outcome(done, "verifier", 0.5)
        store.add_outcome(done, "person", None)
        stats = store.stats()
        assert (stats["conversations"], stats["turns"]) == (1, {"done": 1, "running": 1})
        assert stats["outcomes"] == {
            "verifier": {"count": 2, "mean_score": 0.75},
            "person": {"count": 1, "mean_score": None},
        }
        assert stats["queue"]["by_kind"] == {"math": {"pending": 1}}
        assert stats["current_version"] is None


def test_many_threads_share_one_store(store: Store) -> None:
    def converse(number: int) -> str:
        conversation = store.create_conversation("threads")
        turn_id = begin(store, conversation, f"question {number}")
        store.append_step(turn_id, STEP)
        store.finish_turn(turn_id, f"answer {number}", "done")
        return str(store.history(conversation)[-1]["content"])

    with ThreadPoolExecutor(32) as threads:
        assert list(threads.map(converse, range(48))) == [f"answer {n}" for n in range(48)]


def test_a_closed_store_says_so(place: str, places: Places) -> None:
    store = Store.open(place)
    store.close()
    store.close()
    with pytest.raises(StoreError, match="closed"):
        store.conversations()
    if places.kind == "sqlite":
        assert [path.name for path in Path(place).parent.iterdir()] == ["store.db"]  # the log was folded in
