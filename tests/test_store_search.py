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
from sqlalchemy import event

from feedback_store import InvalidRecord, Store
from feedback_store.database import parse_location
from feedback_store.migrate import bring_up_to_date
from feedback_store.selection import Selection

ASKED = '[{"role": "user", "content": "number%d"}]'


@pytest.fixture
def store(place: str) -> Iterator[Store]:
    with Store.open(place) as opened:
        yield opened


def say(store: Store, owner: str, question: str, answer: str, title: str = "") -> str:
    conversation = store.create_conversation(owner, title)
    turn = store.begin_turn(conversation, [{"role": "user", "content": question}], "v0", [1])
    store.finish_turn(turn, answer, "done")
    return conversation


def found(store: Store, query: str, owner: str | None = None) -> list[str]:
    return [one.id for one in store.find_conversations(Selection(owner=owner, search=query))]


def test_questions_answers_and_titles_are_found(store: Store) -> None:
    first = say(store, "ada", "Who wrote the Odyssey?", "Homer did.")
    second = say(store, "bob", "Wer schrieb Die Räuber?", "Schiller.", title="German plays")
    assert found(store, "odyssey HOMER") == [first], "every word, in the question or the answer, in any case"
    assert found(store, "rauber") == [second], "an accent needn't be typed"
    assert found(store, "german") == [second]
    assert found(store, "odyssey schiller") == []
    assert found(store, "homer", "bob") == [], "another owner's"
    assert store.excerpts("homer", [first, second]) == {first: "Who wrote the Odyssey? Homer did."}
    store.rename_conversation(second, "Drama")
    assert found(store, "german") == []
    assert found(store, "drama") == [second]
    assert [c.id for c in store.conversations_page("ada", 10, search="homer")] == [first]
    assert store.conversations_page("ada", 10, after=first, search="homer") == []


@pytest.mark.parametrize(
    "query",
    ["3.14", "14", "example", "example.com", "http://example.com/path", "mail", "user@mail.org", "half-life", "life",
     "c:\\\\temp", "temp", "-273", "1,5", "naïve…", "word", "größe", "ⅷ", "東京", "snake_case"],
)  # fmt: skip
def test_signs_do_not_join_words(store: Store, query: str) -> None:
    said = (
        "Pi is 3.14, see http://example.com/path or user@mail.org: half-life of c:\\\\temp at -273 or 1,5; naïve…\u00a0"
        "«word»—Größe\u00d72 ⅷ、東京。snake_case"
    )
    conversation = say(store, "ada", said, "")
    say(store, "ada", "something else", "")
    assert found(store, query) == [conversation]


def test_a_search_goes_with_the_other_filters(store: Store) -> None:
    conversations = [say(store, "ada", f"The rate of {n}", "high", "Money" if n == 1 else "") for n in range(3)]
    for n, version in ((0, "v1"), (1, "v2")):
        store.begin_turn(conversations[n], [{"role": "user", "content": "And later?"}], version, [])

    def ids(**filters: str) -> list[str]:
        return [one.id for one in store.find_conversations(Selection(**filters))]

    assert set(ids(search="rate", version="v0")) == set(conversations)
    assert ids(search="later", version="v1") == conversations[:1]
    assert ids(search="rate", version="v1") == [], "another turn of it has the word"
    assert ids(search="money", version="v2") == [conversations[1]], "the title is every turn's"
    assert [one.id for one in store.find_conversations(Selection(search="rate"), 1)] == conversations[1:2]
    said = store.excerpts("high rate", conversations)
    assert said == {id: f"The rate of {n} high" for n, id in enumerate(conversations)}


def test_a_search_s_statements_do_not_grow_with_what_it_finds(store: Store) -> None:
    seen: list[str] = []
    event.listen(store._engine, "before_cursor_execute", lambda *call: seen.append(call[2]))

    def statements(n: int) -> int:
        seen.clear()
        shown = store.find_conversations(Selection(search="rate"), n)
        assert len(store.excerpts("rate", [one.id for one in shown])) == n
        return len(seen)

    for n in range(40):
        say(store, "ada", f"The rate of {n}", "high")
    assert statements(40) == statements(2)


def test_a_question_is_found_while_its_answer_is_under_way(store: Store) -> None:
    conversation = store.create_conversation("ada")
    store.begin_turn(conversation, [{"role": "user", "content": "a slow question"}], "v0", [1])
    assert found(store, "slow") == [conversation]


@pytest.mark.parametrize("query", ["", "   ", '"', "***", "-- ;", "\0", "x" * 1001])
def test_a_query_without_words_is_refused(store: Store, query: str) -> None:
    with pytest.raises(InvalidRecord, match="word"):
        found(store, query)
    with pytest.raises(InvalidRecord, match="word"):
        store.excerpts(query, [])


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
        assert found(store, query) == []


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
        assert store.excerpts("number7", ["conv_1"]) == {"conv_1": "number7 is7"}
