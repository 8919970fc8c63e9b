"""`whetstone data` and `whetstone conversations`, as a person and a script use them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from app.cli import app
from app.commands import console
from feedback_store import NotFound, Store
from serving.versions import install_shipped
from tests.test_store_erasure import MINE, SECRET, learn, talk
from tests.test_versions import publish

run = CliRunner()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("WHETSTONE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


@pytest.fixture
def store(home: Path) -> Iterator[Store]:
    with Store.open(home / "whetstone.db") as opened:
        install_shipped(opened, home)
        publish(opened, home, "v1")
        yield opened


def told(*command: str, code: int = 0, given: str = "") -> str:
    result = run.invoke(app, list(command), input=given)
    assert result.exit_code == code, result.output
    return " ".join(result.output.split())


def parsed(*command: str) -> object:
    result = run.invoke(app, [*command, "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_lineage_is_a_tree_both_ways(store: Store) -> None:
    conversation = talk(store, "ada", MINE)
    (turn,) = store.turns(conversation)
    made_by = learn(store, "v2", "v1")
    (task,) = store.tasks()
    tree = told("data", "lineage", conversation)
    assert tree.index(task.id) < tree.index(made_by) < tree.index("version v2"), "the task, its run, its version"
    up = parsed("data", "lineage", "v2")
    assert isinstance(up, dict)
    assert [one["id"] for one in up["came_from"]] == [made_by, "v1"]
    assert up["came_from"][0]["came_from"][0]["came_from"][0]["id"] == conversation
    assert "v1" in told("data", "lineage", turn.id)
    for id in (task.id, made_by, "ada"):
        assert "v2" in told("data", "lineage", id)
    assert "no conversation" in told("data", "lineage", "nothing", code=1)


def test_the_lineage_of_many_versions_is_printed(store: Store) -> None:
    for n in range(2, 302):
        store.add_version(f"v{n}", f"v{n - 1}", f"v{n}", {}, "candidate")
    for id in ("v0", "v301"):
        assert f"version {id}" in told("data", "lineage", id, "--limit", "1000")
        assert isinstance(parsed("data", "lineage", id, "--limit", "1000"), dict)


def test_an_owner_is_forgotten_after_a_question(store: Store, home: Path) -> None:
    conversation = talk(store, "ada", MINE)
    made_by = learn(store, "v2", "v1")
    store.set_current("v2", "newest")
    (home / "whetstone.db.revision-0001.20260101T000000000000.bak").write_text("old")
    assert "1 conversations, 1 turns" in told("data", "forget", "ada", "--dry-run")
    assert "Aborted" in told("data", "forget", "ada", code=1, given="n\n")
    assert store.conversation(conversation).turns == 1
    said = told("data", "forget", "ada", given="y\n")
    assert "Tainted, since trained on it: v2" in said
    assert f"Runs to be repeated without it: {made_by}" in said
    assert "versions use v1" in said
    assert "whetstone.db.revision-0001" in said, "what isn't covered is named"
    assert SECRET.encode() not in b"".join(path.read_bytes() for path in home.glob("whetstone.db*"))
    with pytest.raises(NotFound):
        store.conversation(conversation)
    assert "published, tainted" in told("versions")
    again = parsed("data", "forget", "ada", "--yes")
    assert isinstance(again, dict)
    assert again["erased"]["already"] == 1
    assert "no owner 'nobody'" in told("data", "forget", "nobody", "--yes", code=1)


def test_a_key_s_name_means_its_owner(store: Store) -> None:
    key, _ = store.add_key("laptop", ["chat"])
    talk(store, key.owner, MINE)
    assert "1 conversations" in told("data", "forget", "laptop", "--yes")


def test_a_name_means_the_owners_of_all_its_keys(store: Store) -> None:
    owners = []
    for n in range(3):
        key, _ = store.add_key("alice", ["chat"])
        owners.append(key.owner)
        if n < 2:  # nothing was said with the newest
            talk(store, key.owner, [{"role": "user", "content": f"What is {n} + 1?"}])
        if n < 2:
            store.revoke_key("alice")
    told("data", "consent", "alice", "--service-only")
    assert [store.consent(owner).training for owner in owners] == [False] * 3
    assert "2 conversations, 2 turns" in told("data", "forget", "alice", "--dry-run")
    assert store.conversations(owners[0])
    asked = told("data", "forget", "alice", given="y\n")
    assert all(owner in asked for owner in owners)
    assert "Erased: 2 conversations" in asked
    assert not store.conversations(owners[0])
    assert not store.conversations(owners[1])


def test_what_looks_like_markup_changes_nothing_but_what_it_names(store: Store) -> None:
    assert "The key of x[/]" in told("keys", "add", "x[/]")
    assert "The key of x[/]" in told("keys", "revoke", "x[/]")
    assert "[/x]: service only" in told("data", "consent", "[/x]", "--service-only")
    assert "[/] is in quarantine" in told("queue", "quarantine", "add", "[/]")
    assert "The golds of [/] count" in told("queue", "quarantine", "lift", "[/]")
    talk(store, "[/y]", MINE)
    assert "Owner [/y]: 1 conversations" in told("data", "forget", "[/y]", given="y\n")


def test_an_age_before_the_first_year_is_refused() -> None:
    assert "smaller number" in told("data", "prune", "--older-than", "99999y", code=2)


def test_a_user_s_text_does_not_steer_the_terminal(store: Store) -> None:
    evil = "\x1b]0;owned\x07\x1b[2J\x9b31m\x7fred\r"
    conversation = talk(store, "ada", [{"role": "user", "content": evil}], "4", evil)
    other = store.begin_turn(store.create_conversation("bob"), [{"role": "user", "content": evil}], "v1", [])
    store.finish_turn(other, evil, "done")
    store.add_outcome(other, "client", 1.0, "exact", "5", evil, "bob")
    for command in (
        ["conversations"],
        ["conversations", "show", conversation],
        ["conversations", "show", conversation, "--json"],
        ["conversations", "--search", "owned"],
        ["queue"],
        ["queue", "review"],
        ["queue", "review", "show", store.reviews(1)[0].id],
        ["data", "lineage", conversation],
    ):
        said = run.invoke(app, command)
        assert said.exit_code == 0, said.output
        assert not [mark for mark in said.output if mark != "\n" and (mark < " " or "\x7f" <= mark <= "\x9f")], command


def test_an_id_is_whole_on_a_narrow_terminal(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(console, "out", Console())
    conversation = talk(store, "key-0123456789abcdef", [{"role": "user", "content": "why " * 50}])
    told("conversations", "show", next(word for word in told("conversations").split() if word.startswith("conv_")))
    assert conversation in told("conversations")
    assert store.tasks()[0].id in told("queue")


def test_a_dead_disk_is_told_and_the_command_can_be_repeated(
    store: Store, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    conversation = talk(store, "ada", MINE)
    (home / "files").mkdir()
    (home / "files" / conversation).write_text("in the way")
    assert "repeat" in told("data", "forget", conversation, "--yes", code=1)
    (home / "files" / conversation).unlink()
    assert "1 conversations' files" in told("data", "forget", conversation, "--yes")


def test_old_conversations_are_pruned(store: Store) -> None:
    talk(store, "ada", MINE)
    assert "0 conversations" in told("data", "prune", "--older-than", "90d", "--yes")
    assert "no age" in told("data", "prune", "--older-than", "soon", code=2)
    assert len(store.conversations()) == 1


def test_consent_is_shown_and_withdrawn(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    talk(store, "ada", MINE)
    assert "service and training, by default" in told("data", "consent", "ada")
    assert "1 waiting tasks were withdrawn" in told("data", "consent", "ada", "--service-only")
    assert store.queue_stats()["pending"] == 0
    assert "ada service only" in told("data", "consent")
    assert "service and training" in told("data", "consent", "ada", "--training")
    monkeypatch.setenv("WHETSTONE_TRAINING_CONSENT", "service")
    assert "service only, by default" in told("data", "consent", "bob")


def test_conversations_are_found_and_shown(store: Store) -> None:
    right = talk(store, "ada", MINE)
    other = talk(store, "bob", [{"role": "user", "content": "Tell me [bold]anything[/]"}], "4", "tea")
    unjudged = store.create_conversation("ada", "empty")

    def ids(*filters: str) -> list[str]:
        found = parsed("conversations", *filters)
        assert isinstance(found, list)
        return [one["id"] for one in found]

    assert set(ids()) == {right, other, unjudged}
    assert ids("--owner", "ada", "--outcome", "right") == [right]
    assert ids("--outcome", "wrong") == []
    assert ids("--tool", "code") == []
    assert set(ids("--tool", "search", "--version", "v1", "--since", "2020-01-01")) == {right, other}
    assert ids("--search", "xylophone code") == [right]
    assert ids("--search", "xylophone", "--owner", "bob") == []
    assert "My code word" in told("conversations", "--search", "xylophone")
    assert "'good' is none of right, wrong, none" in told("conversations", "--outcome", "good", code=1)
    assert "no word" in told("conversations", "--search", "***", code=1)
    shown = told("conversations", "show", other)
    assert "Tell me [bold]anything[/]" in shown
    assert "found tea" in shown
    assert "verdict of a client: 1.0 exact, right: 4 because of 4" in shown
    whole = parsed("conversations", "show", other, "--tokens")
    assert isinstance(whole, dict)
    assert whole["turns"][0]["steps"][0]["token_ids"] == [7]
    assert "token_ids" not in json.dumps(parsed("conversations", "show", other))


def test_stats_count_by_version_day_and_verifier(store: Store) -> None:
    talk(store, "ada", MINE)
    found = parsed("data", "stats")
    assert isinstance(found, dict)
    assert found["turns_by_version"] == {"v1": 1}
    assert list(found["turns_by_day"].values()) == [1]
    assert found["outcomes_by_verifier"] == {"exact": {"count": 1, "mean_score": 1.0}}
    assert found["bytes"] > 10_000
    assert "turns of v1" in told("data", "stats")
