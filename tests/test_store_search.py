"""Search: what was asked, answered and titled is found by its words, at once, and by its owner alone."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from feedback_store import InvalidRecord, Store
from feedback_store.database import parse_location
from feedback_store.migrate import bring_up_to_date

ASKED = '[{"role": "user", "content": "number%d"}]'


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "s.db") as opened:
        yield opened


def say(store: Store, owner: str, question: str, answer: str, title: str = "") -> str:
    conversation = store.create_conversation(owner, title)
    turn = store.begin_turn(conversation, [{"role": "user", "content": question}], "v0", [1])
    store.finish_turn(turn, answer, "done")
    return conversation


def found(store: Store, query: str, owner: str | None = None) -> list[str]:
    return [hit.conversation.id for hit in store.search_conversations(query, owner)]


def test_questions_answers_and_titles_are_found(store: Store) -> None:
    first = say(store, "ada", "Who wrote the Odyssey?", "Homer did.")
    second = say(store, "bob", "Wer schrieb Die Räuber?", "Schiller.", title="German plays")
    assert found(store, "odyssey HOMER") == [first], "every word, in the question or the answer, in any case"
    assert found(store, "rauber") == [second], "an accent needn't be typed"
    assert found(store, "german") == [second]
    assert found(store, "odyssey schiller") == []
    assert found(store, "homer", "bob") == [], "another owner's"
    (hit,) = store.search_conversations("homer")
    assert hit.excerpt == "Who wrote the Odyssey? Homer did."
    store.rename_conversation(second, "Drama")
    assert found(store, "german") == []
    assert found(store, "drama") == [second]
    assert [c.id for c in store.conversations_page("ada", 10, search="homer")] == [first]
    assert store.conversations_page("ada", 10, after=first, search="homer") == []


def test_a_question_is_found_while_its_answer_is_under_way(store: Store) -> None:
    conversation = store.create_conversation("ada")
    store.begin_turn(conversation, [{"role": "user", "content": "a slow question"}], "v0", [1])
    assert found(store, "slow") == [conversation]


@pytest.mark.parametrize("query", ["", "   ", '"', "***", "-- ;", "\0", "x" * 1001])
def test_a_query_without_words_is_refused(store: Store, query: str) -> None:
    with pytest.raises(InvalidRecord, match="word"):
        store.search_conversations(query)


@pytest.mark.parametrize(
    "query",
    ['homer"', "homer OR", "homer AND NOT", "text:homer", "NEAR(homer", "homer*", "^homer", "{homer}", "(homer"],
)
def test_what_is_syntax_to_the_index_is_words_here(store: Store, query: str) -> None:
    conversation = say(store, "ada", query, "an answer")
    assert found(store, query) == [conversation]


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.text(max_size=40))
def test_no_query_breaks_the_search(store: Store, query: str) -> None:
    with contextlib.suppress(InvalidRecord):
        assert store.search_conversations(query) == []


def test_an_old_record_is_searched_too(tmp_path: Path) -> None:
    path = tmp_path / "old.db"
    bring_up_to_date(parse_location(path), 5, revision="0005")
    now = "2026-01-02 03:04:05.000000"
    with closing(sqlite3.connect(path)) as old, old:
        old.execute(f"INSERT INTO conversations VALUES ('conv_1', 'ada', 'T', '{now}', '{now}', NULL)")
        old.executemany(
            "INSERT INTO turns VALUES (?, 'conv_1', '', ?, x'', 'v0', 'done', ?, '', 'h', 1, '', ?, ?)",
            [
                (f"turn_{n:04}", f'[{{"role": "user", "content": "number{n}"}}]', f"is{n}", now, now)
                for n in range(1100)
            ],
        )
    with Store.open(path) as store:
        assert found(store, "number1099 is1099") == ["conv_1"]
        assert store.search_conversations("number7")[0].turn_id == "turn_0007"
