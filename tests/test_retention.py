"""Retention: a running server erases what has rested too long, and finishes what a crash left."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

from app.retention import tidy, tidying
from app.settings import Settings
from feedback_store import Store
from tests.fakes import until
from tests.test_store_erasure import MINE, OURS, talk
from tools.workspace import Workspaces


async def test_old_conversations_go_while_the_server_runs(tmp_path: Path) -> None:
    now = datetime.now(UTC) - timedelta(days=100)
    with Store.open(tmp_path / "whetstone.db", now=lambda: now) as store:
        store.add_version("v1", None, "v1", {}, "published")
        old = talk(store, "ada", MINE)
        Workspaces(tmp_path / "files").write(old, "a.txt", b"mine")
        now = datetime.now(UTC)
        new = talk(store, "ada", OURS, "4")
        assert tidy(store, Settings(home=tmp_path)) == 0, "off by default"
        settings = Settings(home=tmp_path, retention_days=30)
        async with tidying(store, settings, every_s=0.05):
            await until(lambda: not store.unswept().conversations and len(store.conversations()) == 1)
            now = datetime.now(UTC) - timedelta(days=100)
            later = talk(store, "ada", OURS, "4")
            now = datetime.now(UTC)
            await until(lambda: later not in [c.id for c in store.conversations()])
        assert [c.id for c in store.conversations()] == [new]
        assert not (tmp_path / "files" / old).exists()


async def test_a_failure_is_tried_again(tmp_path: Path, caplog: object) -> None:
    with Store.open(tmp_path / "whetstone.db") as store:
        conversation = talk(store, "ada", MINE)
        store.erase(conversation=conversation)  # the process died before the files
        files = tmp_path / "files"
        files.mkdir()
        (files / conversation).write_text("in the way")
        async with tidying(store, Settings(home=tmp_path), every_s=0.05):
            await until(lambda: "isn't finished" in caplog.text)  # type: ignore[attr-defined]
            (files / conversation).unlink()
            await until(lambda: not store.unswept().conversations)
