"""Opening: old files are migrated with a copy kept; files that can't be used are refused with the way out."""

from __future__ import annotations

import os
import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import create_engine, event
from sqlalchemy.dialects import postgresql
from sqlalchemy.engine import Engine
from sqlalchemy.schema import CreateIndex, CreateTable

from feedback_store import Store, StoreError
from feedback_store.database import parse_location
from feedback_store.migrate import bring_up_to_date
from feedback_store.schema import metadata

NOW = "2026-01-02 03:04:05.000000"


def edit(path: Path, *statements: str) -> None:
    with closing(sqlite3.connect(path)) as connection, connection:
        for statement in statements:
            connection.execute(statement)


def revision_of(path: Path) -> str:
    with closing(sqlite3.connect(path)) as connection:
        return str(connection.execute("SELECT version_num FROM alembic_version").fetchone()[0])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store.db"


@pytest.fixture
def old_file(path: Path) -> Path:
    """A file of the first revision, with a version in service and a conversation."""
    bring_up_to_date(parse_location(path), 5, revision="0001")
    edit(
        path,
        f"INSERT INTO conversations VALUES ('conv_1', 'ada', 'Old', '{NOW}', '{NOW}')",
        f"INSERT INTO versions VALUES ('v0', NULL, NULL, 'versions/v0', '{{}}', 'published', '{NOW}', '{NOW}')",
        f"INSERT INTO current_version VALUES (1, 'v0', '{NOW}')",
    )
    assert revision_of(path) == "0001"
    return path


def test_an_old_file_is_migrated_with_all_it_holds(old_file: Path) -> None:
    with Store.open(old_file) as store:
        assert store.conversation("conv_1").title == "Old"
        assert store.current_version() == "v0"
        (change,) = store.version_changes()
        assert (change.previous, f"{change.at:%Y-%m-%d %H:%M:%S.%f}") == (None, NOW)
    assert revision_of(old_file) == "0009"


def test_a_copy_from_before_is_kept_and_is_whole(old_file: Path) -> None:
    Store.open(old_file).close()
    (copy,) = old_file.parent.glob("store.db.revision-0001.*.bak")
    assert revision_of(copy) == "0001"
    with closing(sqlite3.connect(copy)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert connection.execute("SELECT title FROM conversations").fetchall() == [("Old",)]
    with Store.open(copy) as restored:  # the way back works
        assert restored.current_version() == "v0"


def test_a_file_that_is_up_to_date_is_not_copied(path: Path) -> None:
    for _ in range(2):
        Store.open(path).close()
    assert [p.name for p in path.parent.iterdir()] == ["store.db"]


def test_a_migration_that_fails_leaves_the_file_as_it_was(old_file: Path) -> None:
    edit(old_file, "CREATE TABLE version_changes (in_the_way TEXT)")
    with pytest.raises(StoreError, match=r"undone.*\.bak"):
        Store.open(old_file)
    assert revision_of(old_file) == "0001"
    edit(old_file, "DROP TABLE version_changes")
    with Store.open(old_file) as store:
        assert store.current_version() == "v0"


def test_a_migration_finds_rows_that_point_nowhere(old_file: Path) -> None:
    edit(old_file, f"INSERT INTO run_stages VALUES (1, 'run_gone', 'train', '{{}}', '{NOW}')")
    with pytest.raises(StoreError, match="run_stages"):
        Store.open(old_file)
    assert revision_of(old_file) == "0001"


def _not_the_search_index(name: str | None, kind: str, parents: Any) -> bool:
    return not (kind == "table" and str(name).startswith("search_index"))  # a virtual table and what FTS5 keeps for it


def test_the_migrations_make_the_schema(path: Path) -> None:
    Store.open(path).close()
    with create_engine(f"sqlite:///{path}").connect() as connection:
        context = MigrationContext.configure(
            connection, opts={"compare_type": True, "include_name": _not_the_search_index}
        )
        assert compare_metadata(context, metadata) == []


def test_the_schema_fits_postgresql() -> None:
    dialect = postgresql.dialect()  # type: ignore[no-untyped-call]
    for table in metadata.sorted_tables:
        assert str(CreateTable(table).compile(dialect=dialect))
        for index in table.indexes:
            assert len(str(index.name)) <= 63
            assert str(CreateIndex(index).compile(dialect=dialect))


def test_a_file_of_a_later_release_is_refused_untouched(path: Path) -> None:
    Store.open(path).close()
    edit(path, "UPDATE alembic_version SET version_num = '9999'")
    before = path.read_bytes()
    with pytest.raises(StoreError, match=r"later release.*'9999'.*'0009'.*Upgrade"):
        Store.open(path)
    assert path.read_bytes() == before


def test_a_file_of_another_program_is_refused_untouched(path: Path) -> None:
    edit(path, "CREATE TABLE bookmarks (url TEXT)")
    before = path.read_bytes()
    with pytest.raises(StoreError, match=r"another program.*bookmarks"):
        Store.open(path)
    assert path.read_bytes() == before


def test_a_file_that_is_no_database_is_refused(path: Path) -> None:
    path.write_bytes(b"not a database at all, " * 100)
    with pytest.raises(StoreError, match=r"not an SQLite database.*move the file away"):
        Store.open(path)


def test_a_damaged_file_says_how_to_save_it(path: Path) -> None:
    with Store.open(path) as store:
        for n in range(60):
            store.create_conversation(f"owner {n}", "x" * 1000)
    content = bytearray(path.read_bytes())
    content[4096 * 8 :] = os.urandom(len(content) - 4096 * 8)
    path.write_bytes(content)
    with pytest.raises(StoreError, match=r"damaged.*backup"), Store.open(path) as store:
        store.conversations(limit=1000)


def test_a_damaged_old_file_is_not_migrated(old_file: Path) -> None:
    edit(old_file, "PRAGMA wal_checkpoint(TRUNCATE)")
    with closing(sqlite3.connect(old_file)) as connection:
        (page,) = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = 'conversations'").fetchone()
    content = bytearray(old_file.read_bytes())
    content[4096 * (page - 1) : 4096 * page] = os.urandom(4096)
    old_file.write_bytes(content)
    with pytest.raises(StoreError, match="damaged"):
        Store.open(old_file)
    assert list(old_file.parent.glob("*.bak")) == []
    assert revision_of(old_file) == "0001"


def in_child_without_rights(work: Callable[[], Any]) -> str:
    """What `work` raises in a process that is not the superuser: for whom no file is read-only."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            if os.getuid() == 0:
                os.setgid(65534)
                os.setuid(65534)
            work()
            answer = "nothing was raised"
        except BaseException as error:
            answer = f"{type(error).__name__}: {error}"
        os.write(writing, answer.encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(writing)
    with open(reading) as answer_pipe:
        return answer_pipe.read()


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user can reach, which pytest's own is not."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    folder.chmod(0o755)
    shutil.rmtree(folder)


def test_a_read_only_file_is_refused(open_folder: Path) -> None:
    path = open_folder / "store.db"
    Store.open(path).close()
    path.chmod(0o444)
    open_folder.chmod(0o777)
    answer = in_child_without_rights(lambda: Store.open(path))
    open_folder.chmod(0o755)
    assert answer.startswith("StoreError")
    assert f"{path} is read-only" in answer
    assert "write permission" in answer


def test_a_read_only_folder_is_refused(open_folder: Path) -> None:
    open_folder.chmod(0o555)
    for path in (open_folder / "store.db", open_folder / "deeper" / "store.db"):
        answer = in_child_without_rights(lambda path=path: Store.open(path))
        assert answer.startswith("StoreError")
        assert str(open_folder) in answer
        assert "another path" in answer


def test_a_file_locked_for_too_long_says_so_and_recovers(path: Path) -> None:
    with Store.open(path, busy_seconds=0.1) as store, closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreError, match=r"kept it locked.*which process"):
            store.create_conversation("ada")
        assert store.conversations() == []  # readers go on
        other.execute("ROLLBACK")
        assert store.create_conversation("ada")


@pytest.fixture
def small_disk() -> Iterator[None]:
    """SQLite's own limit on the file's size: what fails is what fails on a full disk."""

    def limit(connection: Any, record: Any) -> None:
        connection.execute("PRAGMA max_page_count = 120")

    event.listen(Engine, "connect", limit)
    yield
    event.remove(Engine, "connect", limit)


@pytest.mark.usefixtures("small_disk")
def test_a_full_disk_says_so_and_keeps_what_was_acknowledged(path: Path) -> None:
    kept: list[str] = []
    with Store.open(path) as store:
        with pytest.raises(StoreError, match=r"disk is full.*safe"):
            kept.extend(store.create_conversation("ada", "x" * 4000) for _ in range(1000))
        assert {c.id for c in store.conversations(limit=1000)} == set(kept)
    assert kept


@pytest.mark.parametrize("url", ["sqlite://", ":memory:", "sqlite:///:memory:"])
def test_a_store_in_memory_is_refused(url: str) -> None:
    with pytest.raises(StoreError, match="memory"):
        Store.open(url)


def test_a_folder_or_an_unknown_database_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="is a folder"):
        Store.open(tmp_path)
    with pytest.raises(StoreError, match="driver"):
        Store.open("nosuchdatabase://host/name")


def test_a_url_names_a_file_too(path: Path) -> None:
    with Store.open(f"sqlite:///{path}") as store:
        conversation = store.create_conversation("ada")
    with Store.open(path) as store:
        assert store.conversation(conversation).owner == "ada"
