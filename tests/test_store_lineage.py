"""Runs and versions: what trained on what, what serves, and why."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from feedback_store import InvalidRecord, NotFound, Store
from feedback_store.lineage import Trace


@pytest.fixture
def store(place: str) -> Iterator[Store]:
    with Store.open(place) as opened:
        yield opened


def test_a_run_keeps_a_journal(store: Store) -> None:
    run_id = store.start_run("embedded-cpu", {"seed": 7})
    store.set_stage(run_id, "claim", {"tasks": 32})
    store.set_stage(run_id, "train", {"step": 1})
    store.set_stage(run_id, "train", {"step": 2})
    assert store.run(run_id).alive
    store.finish_run(run_id, "promoted", {"p_value": 0.01})
    run = store.run(run_id)
    assert (run.recipe, run.status, run.stage) == ("embedded-cpu", "promoted", "train")
    assert (run.detail, run.report) == ({"seed": 7}, {"p_value": 0.01})
    assert [(s.stage, s.detail) for s in run.stages] == [
        ("claim", {"tasks": 32}),
        ("train", {"step": 1}),
        ("train", {"step": 2}),
    ]
    assert run.finished_at is not None
    assert run.finished_at >= run.stages[-1].at >= run.started_at
    other = store.start_run("embedded-cpu", {})
    assert [r.id for r in store.runs()] == [other, run_id]
    assert [r.id for r in store.runs(limit=1)] == [other]


def test_a_finished_run_stays_finished(store: Store) -> None:
    run_id = store.start_run("r", {})
    with pytest.raises(InvalidRecord, match="'won'"):
        store.finish_run(run_id, "won", {})  # type: ignore[arg-type]
    store.finish_run(run_id, "refused", {})
    with pytest.raises(InvalidRecord, match="refused"):
        store.set_stage(run_id, "train", {})
    with pytest.raises(InvalidRecord, match="refused"):
        store.finish_run(run_id, "promoted", {})
    for call in (store.run, lambda i: store.set_stage(i, "x", {}), lambda i: store.finish_run(i, "ended", {})):
        with pytest.raises(NotFound, match="run_x"):
            call("run_x")


def test_a_version_knows_the_conversations_that_made_it(store: Store) -> None:
    asked = [store.create_conversation("ada") for _ in range(3)]
    for conversation, question in zip(asked, ["same", "same", "other"], strict=True):
        turn_id = store.begin_turn(conversation, [{"role": "user", "content": question}], "v0", [])
        store.add_outcome(turn_id, "client", 1.0, "math", "1")
    generated, _ = store.add_task([{"role": "user", "content": "made up"}], "math", "1", "math", "generated")
    run_id = store.start_run("r", {})
    same, other, made_up = store.claim(run_id, 3)
    store.complete(run_id, [same.id, made_up.id])
    store.release(run_id)
    store.add_version("v0", None, "v0", {}, "published")
    store.add_version("v1", "v0", "v1", {"created": "today"}, "candidate", run_id=run_id)
    store.add_version("v1b", "v0", "v1b", {"run_id": run_id}, "candidate")

    lineage = store.lineage("v1")
    assert (lineage["version"], lineage["parent"], lineage["run"]) == ("v1", "v0", run_id)
    assert lineage["task_ids"] == sorted([same.id, other.id, generated])
    assert lineage["conversation_ids"] == asked  # two asked the same; its task was made once
    assert {t.task_id: t.state for t in store.run_tasks(run_id)} == {
        same.id: "completed",
        other.id: "released",
        made_up.id: "completed",
    }
    assert store.lineage("v1b")["task_ids"] == lineage["task_ids"]
    assert store.lineage("v0") == {
        "version": "v0",
        "parent": None,
        "run": None,
        "task_ids": [],
        "conversation_ids": [],
    }


def test_what_a_version_was_trained_on_has_one_definition(store: Store) -> None:
    """A refused version's tasks went back to the queue, and it was trained on them all the same; not on what its run
    set aside."""
    for n in range(3):
        store.add_task([{"role": "user", "content": f"Task {n}"}], "math", str(n), "math", "client")
    run_id = store.start_run("r", {})
    used, renewed, aside = (task.id for task in store.claim(run_id, 3))
    store.set_stage(run_id, "claim", {"set_aside": {"too long": [aside]}})
    store.complete(run_id, [used])
    store.add_version("v0", None, "v0", {}, "refused", run_id=run_id)
    store.finish_run(run_id, "refused", {})
    assert store.lineage("v0")["task_ids"] == sorted([used, renewed])
    (made_by,) = store.trace("v0").came_from
    assert [task.id for task in made_by.came_from] == store.lineage("v0")["task_ids"]


def test_a_long_line_of_versions_is_cut(store: Store) -> None:
    for n in range(400):
        store.add_version(f"v{n}", f"v{n - 1}" if n else None, f"v{n}", {}, "candidate")

    def line(id: str, way: str, limit: int) -> list[Trace]:
        found = [store.trace(id, limit)]
        while below := getattr(found[-1], way):
            found += below
        return found

    up, down = line("v399", "came_from", 20), line("v0", "led_to", 20)
    assert [one.id for one in up] == [f"v{n}" for n in range(399, 378, -1)]
    assert [one.id for one in down] == [f"v{n}" for n in range(21)]
    for found in (up, down, line("v399", "came_from", 10_000), line("v0", "led_to", 10_000)):
        assert all(one.note == "candidate" for one in found)
        assert [one.more for one in found] == [0] * (len(found) - 1) + [1]
    assert [one.more for one in line("v9", "came_from", 20)] == [0] * 10


def test_only_published_versions_serve_and_each_change_is_kept(store: Store) -> None:
    assert store.current_version() is None
    store.add_version("v0", None, "versions/v0", {"base": "SmolLM2"}, "published")
    store.add_version("v1", "v0", "versions/v1", {}, "candidate")
    store.set_current("v0", "ships with the package")
    with pytest.raises(InvalidRecord, match="candidate"):
        store.set_current("v1", "better")
    store.set_version_status("v1", "published")
    store.set_current("v1", "better")
    store.set_current("v1", "said twice")
    with pytest.raises(InvalidRecord, match="in service"):
        store.set_version_status("v1", "refused")
    store.set_current("v0", "rolled back: more tool errors")
    store.set_version_status("v1", "refused")
    assert store.current_version() == "v0"
    assert [(c.version_id, c.previous, c.reason) for c in store.version_changes()] == [
        ("v0", "v1", "rolled back: more tool errors"),
        ("v1", "v0", "better"),
        ("v0", None, "ships with the package"),
    ]
    assert [(v.id, v.parent, v.status) for v in store.versions()] == [
        ("v0", None, "published"),
        ("v1", "v0", "refused"),
    ]
    assert (store.version("v0").path, store.version("v0").manifest) == ("versions/v0", {"base": "SmolLM2"})


def test_versions_are_immutable_and_have_known_parents(store: Store) -> None:
    store.add_version("v0", None, "v0", {}, "published")
    with pytest.raises(InvalidRecord, match="already"):
        store.add_version("v0", None, "elsewhere", {}, "published")
    with pytest.raises(InvalidRecord, match="status"):
        store.add_version("v1", "v0", "v1", {}, "shiny")  # type: ignore[arg-type]
    with pytest.raises(NotFound, match="v7"):
        store.add_version("v8", "v7", "v8", {}, "candidate")
    with pytest.raises(NotFound, match="run_x"):
        store.add_version("v8", "v0", "v8", {}, "candidate", run_id="run_x")
    for call in (
        lambda: store.version("v9"),
        lambda: store.set_current("v9", ""),
        lambda: store.set_version_status("v9", "refused"),
        lambda: store.lineage("v9"),
    ):
        with pytest.raises(NotFound, match="v9"):
            call()
    assert store.version("v0").path == "v0"
