"""What only a server does to its clients: connections end, it restarts, it refuses; and no message tells a password."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import pytest
from sqlalchemy import Connection, create_engine, text

from feedback_store import NotFound, Store, StoredStep, StoreError
from feedback_store.database import parse_location
from tests.databases import PASSWORD, Cluster, Databases, Places, edit, rows

ASK = [{"role": "user", "content": "?"}]
TERMINATE = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND pid != pg_backend_pid()"  # noqa: E501


@pytest.fixture
def place(_databases: Databases) -> Iterator[str]:
    made = _databases.new()
    yield made
    _databases.drop(made)


def step(index: int) -> StoredStep:
    return StoredStep(index, [index], [-0.5], [1], "v0", f"step {index}", "", "answer", "", None, True, 0.0)


def until(condition: Callable[[], Any], seconds: float = 60) -> Any:
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)
    return value


@contextmanager
def connected(place: str) -> Iterator[Connection]:
    engine = create_engine(parse_location(place))
    with engine.connect() as connection:
        yield connection
    engine.dispose()


class Writers:
    """Threads that each append steps to a turn, and what they were told: acknowledged, or a StoreError."""

    def __init__(self, store: Store, threads: int = 6) -> None:
        self.store, self.ended = store, threading.Event()
        self.acknowledged: dict[str, list[int]] = {}
        self.errors: list[BaseException] = []
        self.threads = [threading.Thread(target=self._write) for _ in range(threads)]

    def __enter__(self) -> Writers:
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        for thread in self.threads:
            thread.join(60)

    def _write(self) -> None:
        turn = self.store.begin_turn(self.store.create_conversation("ada"), ASK, "v0", [])
        written = self.acknowledged[turn] = []
        index = 0
        while not self.ended.is_set():
            try:
                self.store.append_step(turn, step(index))
                written.append(index)
            except Exception as error:
                self.errors.append(error)
                time.sleep(0.02)
            index += 1

    @property
    def count(self) -> int:
        return sum(len(written) for written in self.acknowledged.values())


def check_lost_connections(store: Store, writers: Writers) -> None:
    assert writers.errors
    for error in writers.errors:
        assert isinstance(error, StoreError)
        assert "PostgreSQL runs" in str(error)
        assert "acknowledged before is safe" in str(error)
    for turn, acknowledged in writers.acknowledged.items():
        kept = [one.index for one in store.turn(turn).steps]
        assert set(acknowledged) <= set(kept), "what was acknowledged is there"


def test_connections_that_end_under_load_lose_nothing_acknowledged(place: str) -> None:
    with Store.open(place) as store, Writers(store) as writers:
        for _ in range(4):
            before = writers.count
            until(lambda before=before: writers.count > before + 30)
            edit(place, TERMINATE)
        before = writers.count
        until(lambda: writers.count > before + 30)  # it goes on by itself
        writers.ended.set()
        check_lost_connections(store, writers)


def test_a_server_that_crashes_and_comes_back_is_used_again(place: str, cluster: Cluster) -> None:
    with Store.open(place) as store, Writers(store) as writers:
        until(lambda: writers.count > 50)
        cluster.stop("immediate")
        try:
            with pytest.raises(StoreError, match=r"lost.*PostgreSQL runs.*try again"):
                store.conversations()
        finally:
            cluster.start()
        before = writers.count
        until(lambda: writers.count > before + 30)
        writers.ended.set()
        check_lost_connections(store, writers)


def test_a_deadlock_is_begun_anew(place: str) -> None:
    with Store.open(place) as store, connected(place) as other:
        first, second = (store.add_task([{"role": "user", "content": q}], "math", "1", "k", "s")[0] for q in "ab")
        run = store.start_run("r", {})
        store.claim(run, 2)
        lock = "SELECT id FROM tasks WHERE id = :id FOR UPDATE"
        other.execute(text("SET deadlock_timeout = '5min'"))  # the store's transaction is the one to be undone
        other.execute(text(lock), {"id": second})
        done: list[list[str]] = []
        completing = threading.Thread(target=lambda: done.append(store.complete(run, [first, second])))
        completing.start()
        waiting = "SELECT 1 FROM pg_locks WHERE NOT granted"
        until(lambda: rows(place, waiting))
        other.execute(text(lock), {"id": first})
        other.commit()
        completing.join(60)
        assert done == [[first, second]]
        assert until(lambda: rows(place, "SELECT deadlocks FROM pg_stat_database WHERE deadlocks > 0 AND "
                                         "datname = current_database()"))  # fmt: skip


def test_a_lock_that_isnt_given_back_is_named(place: str) -> None:
    with Store.open(place, busy_seconds=0.3) as store, connected(place) as other:
        turn = store.begin_turn(store.create_conversation("ada"), ASK, "v0", [])
        other.execute(text("SELECT id FROM turns FOR UPDATE"))
        with pytest.raises(StoreError, match=r"kept a lock.*pg_stat_activity"):
            store.append_step(turn, step(0))
        assert store.turn(turn).steps == []  # readers go on
        other.rollback()
        store.append_step(turn, step(0))


def test_conversations_that_are_deleted_while_others_write_to_them(places_of_both: str) -> None:
    """Whoever comes second is told so; nobody meets an error of the database."""
    with Store.open(places_of_both) as store:
        conversations = [store.create_conversation("ada") for _ in range(25)]
        unexpected: list[BaseException] = []

        def work(job: Callable[[str], object]) -> None:
            for conversation in conversations:
                try:
                    job(conversation)
                except NotFound:
                    pass
                except Exception as error:
                    unexpected.append(error)

        def converse(conversation: str) -> None:
            turn = store.begin_turn(conversation, ASK, "v0", [])
            store.append_step(turn, step(0))
            store.finish_turn(turn, "!", "done")
            store.add_outcome(turn, "person", 1.0, "math", "1")

        def remove(conversation: str) -> None:
            try:
                store.erase(conversation=conversation)
            except StoreError as error:
                if "under way" not in str(error):
                    raise

        threads = [threading.Thread(target=work, args=(job,)) for job in (converse, converse, remove, remove)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert unexpected == []


@pytest.fixture
def places_of_both(places: Places) -> Iterator[str]:
    made = places.new()
    yield made
    places.drop(made)


def test_changes_of_what_serves_are_in_order(places_of_both: str) -> None:
    with Store.open(places_of_both) as store:
        names = [f"v{n}" for n in range(6)]
        for name in names:
            store.add_version(name, None, name, {}, "published")
        conversation = store.create_conversation("ada")

        def switch(name: str) -> None:
            for _ in range(5):
                store.set_current(name, "test", move_conversations=True)
                store.begin_turn(conversation, ASK, name, [], stays=True)

        threads = [threading.Thread(target=switch, args=(name,)) for name in names]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        changes = store.version_changes(limit=1000)[::-1]
        assert [change.previous for change in changes] == [None, *[change.version_id for change in changes[:-1]]]
        assert store.in_service(conversation, "ada", 60).kept in (None, store.current_version())


# -- servers that can't be used


def test_a_wrong_password_is_said_and_no_password_told(place: str, cluster: Cluster) -> None:
    database = str(parse_location(place).database)
    with pytest.raises(StoreError, match=r"refused the user.*password in the URL") as caught:
        Store.open(cluster.url(database, password="wr0ng-of-the-tests"))
    assert "wr0ng" not in str(caught.value)
    with pytest.raises(StoreError, match="refused the user"):
        Store.open(cluster.url(database, user="nobody_at_all"))


@pytest.mark.parametrize(
    ("url", "why"),
    [
        (f"postgresql://ada:{PASSWORD}@localhost:port/db", "no database URL"),
        (f"postgresql://ada:with/{PASSWORD}@localhost/db", "."),
        (f"postgresql://ada:at@{PASSWORD}@localhost/db", "%40"),
        (f"postgresql://ada:{PASSWORD}@localhost", "names no database"),
        (f"postgresql://ada@127.0.0.1:1/db?password={PASSWORD}", "PostgreSQL runs"),
        (f"postgresql://ada:{PASSWORD}@127.0.0.1:1/db", "PostgreSQL runs"),
        (f"postgresql://ada:{PASSWORD}@no.such.host.invalid/db", "PostgreSQL runs"),
        (f"mysql+nosuch://ada:{PASSWORD}@localhost/db", "driver"),
    ],
)
def test_no_message_tells_the_password(url: str, why: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG), pytest.raises(StoreError, match=why) as caught:
        Store.open(url, busy_seconds=1)
    assert PASSWORD not in str(caught.value)
    assert PASSWORD not in caplog.text


def test_what_a_store_says_of_itself_has_no_password(place: str) -> None:
    with Store.open(place) as store:
        assert PASSWORD not in store.where
        assert "***" in store.where
        with pytest.raises(StoreError) as caught:
            store.create_conversation(object())  # type: ignore[arg-type]
    assert PASSWORD not in f"{caught.value!r} {caught.value.__cause__!r}"


def test_a_missing_database_says_how_to_make_it(cluster: Cluster) -> None:
    with pytest.raises(StoreError, match=r"no such database.*createdb"):
        Store.open(cluster.url("not_there"))


@pytest.fixture
def guest(cluster: Cluster, _databases: Databases) -> Iterator[str]:
    """A database that another user may reach and not write to, by that user's URL."""
    place = _databases.blank()
    database = str(parse_location(place).database)
    cluster.execute("CREATE ROLE guest LOGIN PASSWORD 'guest'", database=database)
    yield cluster.url(database, "guest", "guest")
    _databases.drop(place)
    cluster.execute("DROP ROLE guest")


def test_a_user_without_rights_is_told_which(guest: str) -> None:
    with pytest.raises(StoreError, match=r"lacks a right.*GRANT ALL ON SCHEMA"):
        Store.open(guest)


def test_too_many_connections_say_so(guest: str, cluster: Cluster) -> None:
    cluster.execute("ALTER ROLE guest CONNECTION LIMIT 1")
    with connected(guest), pytest.raises(StoreError, match=r"no connection left.*store_connections"):
        Store.open(guest)


def test_threads_wait_for_a_connection_and_not_for_ever(place: str) -> None:
    with Store.open(place, connections=1, busy_seconds=0.3) as store:
        with store._read(), pytest.raises(StoreError, match=r"every connection.*store_connections"):
            store.conversations()
        assert store.conversations() == []


def test_a_server_that_only_reads_is_said(place: str, cluster: Cluster) -> None:
    database = parse_location(place).database
    cluster.execute(f"ALTER DATABASE {database} SET default_transaction_read_only = on")
    with Store.open(place) as store:
        assert store.conversations() == []
        with pytest.raises(StoreError, match=r"only lets itself be read.*primary"):
            store.create_conversation("ada")


def test_a_full_disk_keeps_what_was_acknowledged(place: str) -> None:
    """The server's own error for it, raised at a time of the test's choosing."""
    with Store.open(place) as store:
        turn = store.begin_turn(store.create_conversation("ada"), ASK, "v0", [])
        store.append_step(turn, step(0))
        edit(
            place,
            "CREATE FUNCTION full_disk() RETURNS trigger LANGUAGE plpgsql AS "
            "$$ BEGIN RAISE EXCEPTION 'could not extend file' USING ERRCODE = 'disk_full'; END $$",
            "CREATE TRIGGER full_disk BEFORE INSERT ON steps FOR EACH ROW EXECUTE FUNCTION full_disk()",
        )
        with pytest.raises(StoreError, match=r"disk is full.*safe"):
            store.append_step(turn, step(1))
        edit(place, "DROP TRIGGER full_disk ON steps")
        store.append_step(turn, step(1))
        assert [one.index for one in store.turn(turn).steps] == [0, 1]


def test_a_server_that_is_too_old_or_cant_hold_every_text_is_refused(
    place: str, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster.execute("CREATE DATABASE ascii ENCODING 'SQL_ASCII' LOCALE_PROVIDER libc LOCALE 'C' TEMPLATE template0")
    with pytest.raises(StoreError, match=r"SQL_ASCII.*createdb --encoding=UTF8"):
        Store.open(cluster.url("ascii"))
    monkeypatch.setattr("feedback_store.postgres.OLDEST", 99)
    with pytest.raises(StoreError, match=r"PostgreSQL 1\d.*99 or later"):
        Store.open(place)


def test_a_store_of_a_later_release_names_the_dump(place: str) -> None:
    edit(place, "UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(StoreError, match=r"later release.*pg_restore"):
        Store.open(place)


# -- the same answers whatever the server is set to


def test_the_tests_server_sorts_as_people_do(place: str) -> None:
    """So that an order which leans on bytes would be found."""
    assert rows(place, "SELECT 'a' < 'B' AND 'B' < 'c'") == [(True,)]
    with Store.open(place) as store:
        made = [store.create_conversation("ada") for _ in range(300)]
        assert [c.id for c in store.conversations_page("ada", 1000)] == sorted(made, reverse=True)
        assert [c.id for c in store.conversations_page("ada", 5, made[20])] == made[15:20][::-1]


def test_a_servers_time_zone_and_isolation_change_nothing(place: str, cluster: Cluster) -> None:
    database = parse_location(place).database
    cluster.execute(
        f"ALTER DATABASE {database} SET timezone = 'Asia/Ulaanbaatar'",
        f"ALTER DATABASE {database} SET default_transaction_isolation = 'serializable'",
    )
    moment = datetime(2026, 3, 1, 12, 0, 0, 123456, tzinfo=UTC)
    with Store.open(f"{place}&options=-c%20timezone%3DAmerica/Lima", now=lambda: moment) as store:
        conversation = store.conversation(store.create_conversation("ada"))
        assert (conversation.created_at, conversation.created_at.tzinfo) == (moment, UTC)
        with store._write() as connection:
            assert connection.execute(text("SHOW timezone")).scalar() == "America/Lima", "the URL's options win"
            assert connection.execute(text("SHOW transaction_isolation")).scalar() == "read committed"
        with store._read() as connection:
            assert connection.execute(text("SHOW transaction_isolation")).scalar() == "repeatable read"
