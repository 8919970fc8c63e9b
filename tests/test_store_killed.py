"""A process that is killed in the middle of a write leaves the store as it was; the write can then be done again."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import event, select

from feedback_store import Guards, Store
from feedback_store.schema import metadata

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="it forks")
ASK = [{"role": "user", "content": "How high?"}]


def prepared(path: Path) -> dict[str, str]:
    """A store in which every write below has something to do; the ids of it."""
    with Store.open(path) as store:
        turn = store.begin_turn(store.create_conversation("eve"), ASK, "v0", [1])
        dead, _ = store.add_task([{"role": "user", "content": "Too hard?"}], "exact", "1", "exact", "person", "ada")
        for _ in range(5):
            failing = store.start_run("r", {})
            store.claim(failing, 1)
            store.finish_run(failing, "failed", {})
        store.add_task(ASK, "exact", "1", "exact", "person", "ada")
        for n in range(3):
            store.add_task([{"role": "user", "content": f"{n}?"}], "exact", "1", "exact", "person", "eve")
        argued = [{"role": "user", "content": "Contested?"}]
        contested, _ = store.add_task(argued, "exact", "1", "exact", "person", "ada")
        store.add_task(argued, "exact", "2", "exact", "person", "bob")
        run = store.start_run("r", {})
        held = [task.id for task in store.claim(run, 2)]
        return {"turn": turn, "dead": dead, "contested": contested, "run": run, "held": held[0]}


Write = Callable[[Store, dict[str, str]], object]
WRITES: dict[str, Write] = {
    "outcome": lambda store, ids: store.add_outcome(ids["turn"], "person", 0.0, "exact", "2", owner="eve"),
    "claim": lambda store, ids: store.claim(ids["run"], 9),
    "guarded claim": lambda store, ids: store.claim_batch(ids["run"], 9, Guards(1.0, fold=False)),
    "renew": lambda store, ids: store.renew(ids["run"], 9999),
    "complete": lambda store, ids: store.complete(ids["run"], [ids["held"]]),
    "release": lambda store, ids: store.release(ids["run"], failed=True),
    "finish": lambda store, ids: store.finish_run(ids["run"], "failed", {}),
    "decide": lambda store, ids: store.decide_review(ids["contested"], "1", "root"),
    "requeue": lambda store, ids: store.requeue([ids["dead"]], "root"),
    "quarantine": lambda store, ids: store.quarantine("eve", "root", "lies"),
}


def dump(path: Path) -> dict[str, list[tuple[object, ...]]]:
    with Store.open(path) as store, store._read() as connection:
        return {
            table.name: [tuple(row) for row in connection.execute(select(table))] for table in metadata.sorted_tables
        }


def killed(path: Path, write: Write, ids: dict[str, str], moment: str) -> None:
    """Does the write in a child that kills itself: at its second statement, or when all is done but the commit."""
    child = os.fork()
    if child == 0:
        try:
            store = Store.open(path)
            seen = 0

            def die(*_: object) -> None:
                nonlocal seen
                seen += 1
                if seen == 2 or moment == "commit":
                    os.kill(os.getpid(), signal.SIGKILL)

            name = "commit" if moment == "commit" else "before_cursor_execute"
            event.listen(store._engine, name, die)
            write(store, ids)
        finally:
            os._exit(3)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "the write ended before it was killed"
    assert os.WTERMSIG(status) == signal.SIGKILL


@pytest.mark.parametrize("name", WRITES)
def test_a_write_is_whole_or_not_at_all(tmp_path: Path, name: str) -> None:
    path = tmp_path / "s.db"
    ids = prepared(path)
    before = dump(path)
    for moment in ("statement", "commit"):
        killed(path, WRITES[name], ids, moment)
        assert dump(path) == before
    with Store.open(path) as store:
        WRITES[name](store, ids)
    assert dump(path) != before
