"""The command line, as a person and a script use it."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
from typer.testing import CliRunner

from app.cli import app
from app.keys import check_reach
from app.owners import owner_of
from app.settings import Settings, SettingsError, load
from feedback_store import Scope, Store
from serving.versions import install_shipped
from tests.databases import PASSWORD, Places
from tests.test_versions import publish

run = CliRunner()


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("WHETSTONE_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


@pytest.fixture
def store(home: Path) -> Store:
    opened = Store.open(home / "whetstone.db")
    install_shipped(opened, home)
    publish(opened, home, "v1")
    opened.add_version("v2", "v1", "", {}, "refused")
    opened.add_task([{"role": "user", "content": "What is 2 + 2?"}], "numeric", "4", "numeric", "person")
    return opened


def test_versions_are_listed_and_chosen(store: Store) -> None:
    listed = json.loads(run.invoke(app, ["versions", "--json"]).output)
    assert listed["current"] == "v0"
    assert [version["id"] for version in listed["versions"]] == ["v0", "v1", "v2"]
    assert run.invoke(app, ["versions", "use", "v1"]).exit_code == 0
    assert store.current_version() == "v1"
    assert "● v1" in " ".join(run.invoke(app, ["versions"]).output.split())


def test_a_version_is_tried_promoted_and_taken_back(store: Store) -> None:
    def versions(*command: str) -> str:
        result = run.invoke(app, ["versions", *command])
        assert result.exit_code == 0, result.output
        return " ".join(result.output.split())

    assert "tried on 12.5% of the owners" in versions("canary", "v1", "--share", "0.125")
    assert "12.5% v1 0" in versions()
    store.begin_turn(store.create_conversation("ada"), [{"role": "user", "content": "?"}], "v1", [1], stays=True)
    listed = json.loads(versions("--json"))
    assert listed["canary"] == {"version": "v1", "share": 0.125}
    assert listed["conversations"] == {"v1": 1}
    versions("promote", "v1")
    assert (store.current_version(), store.canary()) == ("v1", None)
    assert "1 conversation moved" in versions("use", "v0", "--move-conversations")
    assert store.current_version() == "v0"
    versions("canary", "v1", "--share", "1")
    assert "isn't on trial" in versions("canary", "v1", "--share", "0")
    assert store.canary() is None
    for wrong in (["canary", "v0", "--share", "0.1"], ["canary", "v1", "--share", "2"], ["promote", "v2"]):
        assert run.invoke(app, ["versions", *wrong]).exit_code != 0


@pytest.mark.parametrize(("version", "why"), [("v9", "no version"), ("v2", "refused")])
def test_a_version_that_cant_serve_is_refused(store: Store, version: str, why: str) -> None:
    result = run.invoke(app, ["versions", "use", version])
    assert result.exit_code == 1
    assert why in result.output
    assert store.current_version() == "v0"


@pytest.mark.parametrize("command", [["use"], ["promote"], ["canary", "--share", "0.5"]])
def test_a_version_whose_files_are_altered_is_refused(store: Store, home: Path, command: list[str]) -> None:
    (home / "versions" / "v1" / "adapter_model.safetensors").write_bytes(b"rot")
    result = run.invoke(app, ["versions", *command, "v1"])
    assert result.exit_code == 1
    assert "was altered" in " ".join(result.output.split())
    assert (store.current_version(), store.canary()) == ("v0", None)


def test_queue_runs_and_stats(store: Store) -> None:
    queue = json.loads(run.invoke(app, ["queue", "--json"]).output)
    assert queue["stats"]["pending"] == 1
    assert queue["pending"][0]["gold"] == "4"
    assert "What is 2 + 2?" in run.invoke(app, ["queue"]).output
    assert json.loads(run.invoke(app, ["runs", "--json"]).output) == []
    assert json.loads(run.invoke(app, ["data", "stats", "--json"]).output)["current_version"] == "v0"


def test_doctor_names_every_part_and_the_way_out() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = run.invoke(app, ["doctor", "--json"], env={"WHETSTONE_API_PORT": str(port)})
    findings = {finding["name"]: finding for finding in json.loads(result.output)}
    assert {
        "Python",
        "torch",
        "sandbox",
        "search index",
        "model",
        "store",
        "ports",
        "connections",
        "web search",
    } <= set(findings)
    assert findings["ports"]["state"] == "warning"
    assert "WHETSTONE_API_PORT" in findings["ports"]["said"]
    assert all(finding["mend"] for finding in findings.values() if finding["state"] != "ok")


def test_up_says_which_port_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, socket.create_server(("127.0.0.1", 0)) as other:
        port, free = taken.getsockname()[1], other.getsockname()[1]
        other.close()
        result = run.invoke(app, ["up"], env={"WHETSTONE_WEB_PORT": str(port), "WHETSTONE_API_PORT": str(free)})
    assert result.exit_code == 1
    assert f"127.0.0.1:{port} can't be used" in " ".join(result.output.split())


def test_a_damaged_store_is_one_line(home: Path) -> None:
    home.mkdir()
    (home / "whetstone.db").write_text("not a database, " * 100)
    result = run.invoke(app, ["queue"])
    assert result.exit_code == 1
    assert "not an SQLite database" in " ".join(result.output.split())


def test_a_store_on_a_server_is_named_without_its_password(place: str, places: Places) -> None:
    if places.kind == "sqlite":
        pytest.skip("a file has no password")
    for url, state in ((place, "ok"), (place.replace("/test_", "/gone_"), "failed")):
        result = run.invoke(app, ["doctor", "--json"], env={"WHETSTONE_STORE_URL": url})
        (found,) = [finding for finding in json.loads(result.output) if finding["name"] == "store"]
        assert (found["state"], PASSWORD in result.output) == (state, False)
        assert "whetstone:***@" in found["said"]
        result = run.invoke(app, ["queue"], env={"WHETSTONE_STORE_URL": url})
        assert (result.exit_code == 0, PASSWORD in result.output) == (state == "ok", False)


def test_a_secret_that_cant_be_used_isnt_repeated() -> None:
    with pytest.raises(SettingsError) as caught:
        load(store_url=["s3cret"], engine_admin_key=["s3cret"])
    assert "store_url" in str(caught.value)
    assert "s3cret" not in str(caught.value)


def test_an_empty_question_is_refused() -> None:
    assert run.invoke(app, ["ask", "  "]).exit_code == 1


def test_an_open_host_needs_keys(store: Store) -> None:
    with pytest.raises(ValueError, match="WHETSTONE_API_KEYS"):
        check_reach(store, load(host="0.0.0.0"))
    with pytest.raises(ValueError, match="cors_origins"):
        check_reach(store, load(cors_origins="*"))
    keyed = load(host="0.0.0.0", api_keys="one, two")
    assert [key.get_secret_value() for key in keyed.api_keys] == ["one", "two"]
    check_reach(store, keyed)
    made = json.loads(run.invoke(app, ["keys", "add", "laptop", "--json"]).output)
    assert made["scopes"] == ["chat", "feedback"]
    check_reach(store, load(host="0.0.0.0", cors_origins="*", key_tools={made["owner"]: ["code"]}))
    with pytest.raises(ValueError, match="key_tools"):
        check_reach(store, load(key_tools={"key-0123456789abcdef": ["code"]}))


def test_a_command_starts_without_the_store_s_library() -> None:
    heavy = "import sys, app.cli; print([name for name in ('sqlalchemy', 'torch', 'gradio') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_the_help_names_every_scope() -> None:
    told = " ".join(run.invoke(app, ["keys", "add", "--help"], env={"COLUMNS": "200"}).output.split())
    assert all(scope in told for scope in get_args(Scope))


def test_keys_are_made_listed_and_revoked(store: Store) -> None:
    key = run.invoke(app, ["keys", "add", "lap top", "--scope", "chat", "--days", "7", "--per-minute", "5"]).stdout
    again = run.invoke(app, ["keys", "add", "lap top"])
    assert again.exit_code == 1
    assert "revoke it first" in " ".join(again.output.split())
    bad = run.invoke(app, ["keys", "add", "x", "--scope", "root"])
    assert bad.exit_code == 1
    assert "'root' is none of chat, feedback, admin" in " ".join(bad.output.split())
    listed = run.invoke(app, ["keys", "list", "--json"]).output
    (shown,) = json.loads(listed)
    assert (shown["name"], shown["scopes"], shown["requests_per_minute"]) == ("lap top", ["chat"], 5)
    assert shown["state"] == "in use"
    assert shown["owner"] == owner_of(key.strip().encode()), "the name that conversations of the key have"
    assert key.strip() not in listed
    assert key.strip().encode() not in b"".join(path.read_bytes() for path in Path(store.where).parent.glob("*.db*"))
    assert run.invoke(app, ["keys", "revoke", "lap top"]).exit_code == 0
    assert run.invoke(app, ["keys", "revoke", "lap top"]).exit_code == 1
    assert json.loads(run.invoke(app, ["keys", "list", "--json"]).output)[0]["state"] == "revoked"
    assert run.invoke(app, ["keys", "add", "lap top"]).exit_code == 0, "the name is free again"
    assert "1 revoked key removed" in run.invoke(app, ["keys", "forget", "lap top"]).output


def test_variables_win_over_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "whetstone.toml").write_text('slots = 2\ncontext = 2048\nsearch_backends = ["local"]\n')
    monkeypatch.setenv("WHETSTONE_CONTEXT", "1024")
    found = load()
    assert (found.slots, found.context, found.search_backends) == (2, 1024, ["local"])


@pytest.mark.parametrize(
    ("knobs", "says"),
    [
        ({"api_port": 7860}, "both 7860"),
        ({"context": 512, "max_tokens": 500}, "no room for a prompt"),
        ({"search_backends": "google"}, "search_backends"),
        ({"cors_origins": "https://a.example/app"}, "'https://a.example/app' is no origin"),
        ({"temprature": 1}, "temprature: there is no such setting, did you mean temperature"),
        ({"api_keys": "one,two", "key_tools": {"key-0": ["code"]}}, "'key-0', which is no key's owner.*key-7692c3ad"),
        ({"api_keys": "one,two", "key_tools": {"one": ["code"]}}, "an API key itself, which is no key's owner"),
    ],
)
def test_a_wrong_knob_is_named(knobs: dict[str, object], says: str) -> None:
    with pytest.raises(SettingsError, match=says):
        load(**knobs)


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "whetstone.toml").write_text("slots = = 2")
    with pytest.raises(SettingsError, match=r"whetstone\.toml"):
        load()
    assert Settings.model_fields["slots"].default == 4


def test_a_secret_isnt_printed() -> None:
    with pytest.raises(SettingsError) as refused:
        load(api_keys=[["s3cret"]])
    assert "s3cret" not in str(refused.value)


def test_the_review_list_the_quarantine_and_the_audit(store: Store) -> None:
    def queue(*command: str) -> str:
        result = run.invoke(app, ["queue", *command])
        assert result.exit_code == 0, result.output
        return " ".join(result.output.split())

    ask = [{"role": "user", "content": "How high?"}]
    store.add_task(ask, "numeric", "1", "numeric", "person", "key-a")
    store.add_task(ask, "numeric", "2", "numeric", "person", "key-b")
    (review,) = json.loads(queue("review", "--json"))
    assert "1 (0.5); 2 (0.5)" in queue("review")
    assert "key-a 0.5" in queue("review", "show", review["id"])
    assert "pending" in queue("review", "accept", review["id"], "2", "--reason", "measured")
    assert json.loads(queue("--json"))["stats"]["rejected"] == 1
    assert "rejected" in queue("review", "reject", review["id"])
    assert "review" in queue("review", "withdraw", review["id"])
    assert "wait for review: 0" in queue("quarantine", "add", "key-a")
    assert "key-a in" in queue("quarantine")
    assert "count again" in queue("quarantine", "lift", "key-a")
    actions = [entry["action"] for entry in json.loads(queue("audit", "--json"))]
    assert actions == [
        "quarantine.lift", "quarantine", "review.withdraw", "review.reject", "review.accept", "version.use"
    ]  # fmt: skip
    assert "reason measured" in queue("audit", "--action", "review.accept")
    assert "No task is dead" in queue("dead")
    for wrong in (
        ["review", "show", "0"],
        ["review", "accept", review["id"], "3"],
        ["requeue", review["golds"][0]["task_ids"][0]],
    ):
        assert run.invoke(app, ["queue", *wrong]).exit_code == 1
