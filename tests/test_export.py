"""Exports: readable by `datasets` and TRL, of whom consents, whole or not at all, in constant memory."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event
from typer.testing import CliRunner

from app.cli import app
from app.export import ExportFailed, export
from app.redaction import redactor
from feedback_store import Store
from feedback_store.selection import Selection

run = CliRunner()
FORMATS = ("openai", "trl-sft", "trl-grpo", "trl-preference", "raw")


def answer(store: Store, owner: str, question: str, said: str, score: float | None = None, gold: str = "4") -> str:
    conversation = store.create_conversation(owner)
    messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": question}]
    turn = store.begin_turn(conversation, messages, "v1", [1])
    store.finish_turn(turn, said, "done")
    if score is not None:
        store.add_outcome(turn, "client", score, "exact", gold, "", owner)
    return turn


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    monkeypatch.setenv("WHETSTONE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")
    with Store.open(tmp_path / "home" / "whetstone.db") as opened:
        answer(opened, "ada", "What is 2 + 2?", "4", 1.0)
        answer(opened, "ada", "What is 2 + 2?", "5", 0.0)
        answer(opened, "bob", "Who is it? Mail bob@example.com.", "I wrote to bob@example.com.")
        answer(opened, "eve", "What is 3 + 3?", "6", 1.0, "6")
        opened.set_consent("eve", False)
        yield opened


def exported(store: Store, path: Path, format: Any, **options: Any) -> list[dict[str, Any]]:
    export(store, path, format, options.pop("selection", Selection(consenting=True)), **options)
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_openai_s_format_ends_with_the_answer(store: Store, tmp_path: Path) -> None:
    rows = exported(store, tmp_path / "a.jsonl", "openai", selection=Selection(outcome="right", consenting=True))
    said = [("system", "Be short."), ("user", "What is 2 + 2?"), ("assistant", "4")]
    assert [[(m["role"], m["content"]) for m in row["messages"]] for row in rows] == [said]


def test_who_does_not_consent_is_left_out_of_what_is_for_training(store: Store, tmp_path: Path) -> None:
    for format in FORMATS:
        assert "3 + 3" not in json.dumps(exported(store, tmp_path / f"{format}.jsonl", format))
    whole = exported(store, tmp_path / "all.jsonl", "raw", selection=Selection())
    assert {row["owner"] for row in whole} == {"ada", "bob", "eve"}
    refused = run.invoke(app, ["data", "export", str(tmp_path / "x.jsonl"), "--include-service-only"])
    assert refused.exit_code == 1


def test_prompts_come_with_verifier_and_gold_and_pairs_are_of_one_task(store: Store, tmp_path: Path) -> None:
    (prompt,) = exported(store, tmp_path / "p.jsonl", "trl-grpo")
    assert (prompt["verifier"], prompt["gold"]) == ("exact", "4")
    (pair,) = exported(store, tmp_path / "q.jsonl", "trl-preference")
    assert (pair["chosen"][0]["content"], pair["rejected"][0]["content"]) == ("4", "5")
    assert pair["prompt"] == prompt["prompt"]


def test_golds_that_arent_to_be_trained_on_are_counted_and_left_out(store: Store, tmp_path: Path) -> None:
    answer(store, "bob", "Is it so?", "no", 0.0, "yes")
    answer(store, "ann", "Is it so?", "yes", 0.0, "no")
    for name in ("ann", "bob", "cid"):
        answer(store, name, "How many?", "3", 1.0, "3")
    answer(store, "dan", "How many?", "4", 1.0, "4")
    turn = answer(store, "ada", "Who leads?", "me")
    ends = datetime.now(UTC) + timedelta(days=1)
    store.add_outcome(turn, "client", 0.0, "exact", "Ann", owner="ada", expires_at=ends)
    store._now = lambda: ends
    for format in ("trl-grpo", "trl-preference"):
        done = export(store, tmp_path / f"{format}.jsonl", format, Selection(consenting=True))
        held = {reason: n for reason, n in done.left_out.items() if "gold" in reason}
        assert held == {"its gold waits for review": 2, "its gold was rejected": 1, "its gold has expired": 1}
        said = (tmp_path / f"{format}.jsonl").read_text()
        assert "2 + 2" in said
        assert "Is it so" not in said
        assert '"gold": "4"' not in said.replace("2 + 2", "").split("How many", 1)[-1]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_datasets_reads_every_format(store: Store, tmp_path: Path, format: Any, ending: str) -> None:
    from datasets import load_dataset

    file = tmp_path / f"{format}.{ending}"
    done = export(store, file, format, Selection(consenting=True), tokens=True)
    kind = "json" if ending == "jsonl" else "parquet"
    read = load_dataset(kind, data_files=str(file), split="train", cache_dir=str(tmp_path / "cache"))
    assert len(read) == done.rows > 0


def test_trl_takes_its_formats(store: Store, tmp_path: Path) -> None:
    from trl.data_utils import is_conversational

    for format in ("openai", "trl-sft", "trl-grpo", "trl-preference"):
        (row, *_) = exported(store, tmp_path / f"{format}.jsonl", format)
        assert is_conversational(row), format
        assert row.keys() <= {"messages", "prompt", "completion", "chosen", "rejected", "verifier", "gold", "task_id"}


def test_redaction_reaches_every_text(store: Store, tmp_path: Path) -> None:
    rows = exported(store, tmp_path / "r.jsonl", "trl-sft", redact=redactor())
    assert "bob@example.com" not in json.dumps(rows)
    assert "I wrote to [EMAIL]." in json.dumps(rows)
    with pytest.raises(ExportFailed, match="as it is"):
        export(store, tmp_path / "raw.jsonl", "raw", Selection(), redact=redactor())


def test_a_file_that_is_there_stays_without_force(store: Store, tmp_path: Path) -> None:
    file = tmp_path / "out" / "openai.jsonl"
    for command, code in (([], 0), ([], 1), (["--force"], 0)):
        result = run.invoke(app, ["data", "export", str(tmp_path / "out"), *command])
        assert result.exit_code == code, result.output
    assert len(file.read_text().splitlines()) == 3
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    said = run.invoke(app, ["data", "export", str(tmp_path / "out"), "--format", "csv"])
    assert "no format" in said.output
    assert run.invoke(app, ["data", "export", str(tmp_path / "out"), "--parquet", "--json"]).exit_code == 0
    assert (tmp_path / "out" / "openai.parquet").exists()


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_without_rows_no_file_is_made(store: Store, tmp_path: Path, ending: str) -> None:
    file = tmp_path / "out" / f"a.{ending}"
    command = ["data", "export", str(file), "--format", "trl-preference", "--owner", "bob"]
    said = run.invoke(app, command)
    assert said.exit_code == 0, said.output
    assert "0 rows: no file was written." in said.output
    assert list(file.parent.iterdir()) == []
    file.write_text("old")
    assert run.invoke(app, [*command, "--force"]).exit_code == 0
    assert file.read_text() == "old"


def test_a_file_of_another_kind_is_no_folder(store: Store, tmp_path: Path) -> None:
    said = run.invoke(app, ["data", "export", str(tmp_path / "y.csv")])
    assert said.exit_code == 1
    assert "must end in .jsonl or .parquet" in " ".join(said.output.split())
    assert not (tmp_path / "y.csv").exists()
    (tmp_path / "old.csv").mkdir()
    assert run.invoke(app, ["data", "export", str(tmp_path / "old.csv")]).exit_code == 0
    assert (tmp_path / "old.csv" / "openai.jsonl").exists()


def test_a_failure_midway_leaves_the_old_file(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text("old")

    def stop(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(store, file, "openai", Selection(), force=True, progress=stop)
    assert file.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["a.jsonl"]


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_a_full_disk_is_one_line_and_no_file(store: Store, tmp_path: Path, ending: str) -> None:
    noise = random.Random(0)
    for _ in range(30):
        answer(store, "ada", "Noise?", noise.randbytes(20_000).hex())
    code = (
        "import resource, sys; from app.cli import app\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))\n"
        "sys.argv[0] = 'whetstone'; app()"
    )
    command = [sys.executable, "-c", code, "data", "export", str(tmp_path / f"big.{ending}")]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=_environment())
    assert result.returncode == 1, result.stderr
    assert "can't be written" in " ".join(result.stderr.split())
    assert list(tmp_path.glob("*big*")) == []


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}


def test_memory_does_not_grow_with_the_record(store: Store, tmp_path: Path) -> None:
    def peak(file: Path) -> int:
        tracemalloc.start()
        export(store, file, "openai", Selection())
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    def more(n: int) -> None:
        columns = (
            "id, conversation_id, request_id, messages, prompt_ids, version, status, answer, error, host, pid, "
            "process_started, created_at, finished_at"
        )
        with store._write() as connection:
            connection.exec_driver_sql(
                f"INSERT INTO turns ({columns}) "
                f"WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c WHERE n < {n}) "
                "SELECT 'turn_' || hex(randomblob(8)), conversation_id, request_id, messages, prompt_ids, version, "
                "status, hex(randomblob(2000)), error, host, pid, process_started, created_at, finished_at "
                "FROM c, (SELECT * FROM turns LIMIT 1)"
            )

    more(600)
    small = peak(tmp_path / "small.jsonl")
    more(5000)
    large = peak(tmp_path / "large.jsonl")
    assert (tmp_path / "large.jsonl").stat().st_size > 20_000_000
    assert large < 2 * small, (small, large)


def test_a_page_of_tasks_costs_what_it_holds(store: Store) -> None:
    steps = [0]

    def count() -> int:
        steps[0] += 1
        return 0

    def a_page() -> int:
        store.close()
        with Store.open(store.where) as opened:
            event.listen(opened._engine, "checkout", lambda raw, *_: raw.set_progress_handler(count, 100))
            steps[0] = 0
            (first, *_) = next(opened.practised(Selection(), page=20))
            assert first.task.gold == "4"
        return steps[0]

    def more(n: int) -> None:
        names = "messages, verifier, gold, kind, source, owner, state, attempts, created_at, updated_at"
        numbers = f"WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c WHERE n < {n}) "
        with Store.open(store.where) as opened, opened._write() as connection:
            begun = connection.exec_driver_sql("SELECT count(*) FROM tasks").scalar_one()
            connection.exec_driver_sql(
                f"INSERT INTO tasks (id, content_hash, {names}) {numbers}"
                f"SELECT 'task_x' || (n + {begun}), n + {begun}, {names} FROM c, (SELECT * FROM tasks LIMIT 1)"
            )
            connection.exec_driver_sql(
                "INSERT INTO task_origins (task_id, turn_id, source, owner, at) SELECT t.id, o.turn_id, o.source, "
                "o.owner, o.at FROM tasks t, (SELECT * FROM task_origins LIMIT 1) o WHERE t.id LIKE 'task_x%'"
            )

    more(200)
    small = a_page()
    more(3000)
    assert a_page() < 2 * small
