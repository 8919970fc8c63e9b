"""Evaluation: what is measured adds up by hand, two versions are compared in pairs, and the page stands by itself."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from app.cli import app
from online_rl.eval_page import page
from online_rl.evaluation import Recorded
from online_rl.gate import GateConfig, ItemResult, mcnemar, wilson
from online_rl.measures import Item, Sample, bare_agent, bootstrap, differences, measure, slices
from online_rl.tasks.base import Task, ask
from serving.agent import Agent
from serving.dialects.tapo import TapoDialect
from serving.engines.base import Sampling
from serving.model import BaseModel
from tests.fakes import ScriptedEngine
from tests.test_replay import World

run = CliRunner()
TASKS = [ask(f"What is thing {n}?", "numeric", str(n), "even" if n % 2 == 0 else "odd") for n in range(8)]


def sample(task: Task, correct: bool, calls: int = 0, seconds: float = 1.0, same: bool | None = None) -> Sample:
    result = ItemResult(task.id, task.kind, correct, tool_calls=calls, tool_errors=min(calls, 1), own_tokens=10)
    return Sample(result, task.gold if correct else "?", seconds, same)


def items(*rights: str) -> list[Item]:
    """One item a word, one answer a letter: r is right, w is wrong."""
    return [
        Item(task, [sample(task, letter == "r") for letter in word])
        for task, word in zip(TASKS[: len(rights)], rights, strict=True)
    ]


def test_a_slice_adds_up_by_hand():
    t = TASKS[0]
    four = [
        Item(t, [sample(t, True, calls=2, seconds=4.0, same=True)]),
        Item(t, [sample(t, True, calls=1, seconds=1.0, same=False)]),
        Item(t, [sample(t, False, calls=3, seconds=2.0, same=False)]),
        Item(t, [sample(t, True, seconds=3.0)]),
    ]
    (row,) = slices(four)
    assert (row.n, row.k, row.accuracy) == (4, 1, 0.75)
    assert row.interval == wilson(3, 4, 0.95)
    assert (row.calls_per_answer, row.calls_per_right) == (1.5, 2.0)
    assert row.useless_calls == pytest.approx(2 / 6)
    assert row.error_rate == 3 / 6
    assert (row.latency_p50, row.own_tokens) == (2.5, 10)
    nothing = slices([Item(t, [sample(t, False)])])[0]
    assert (nothing.calls_per_right, nothing.useless_calls) == (None, None)


def test_kinds_are_told_apart_and_overall_comes_first():
    rows = slices(items("r", "w", "r", "w", "r", "w"))
    assert [(row.kind, row.n, row.accuracy) for row in rows] == [("overall", 6, 0.5), ("even", 3, 1.0), ("odd", 3, 0.0)]


def test_answers_to_one_item_are_resampled_together():
    """Four alike answers an item tell no more than one: the interval must not shrink."""
    clustered = slices(items("rrrr", "wwww", "rrrr", "wwww", "rrrr", "wwww"))[0]
    single = bootstrap([1.0, 0.0] * 3, GateConfig())
    assert clustered.accuracy == 0.5
    assert clustered.interval == single
    assert clustered.interval[1] - clustered.interval[0] > 0.5
    assert bootstrap([0.5] * 6, GateConfig()) == (0.5, 0.5)


def test_versions_are_compared_in_pairs():
    before, after = items("w", "w", "w", "w", "w", "r"), items("r", "r", "r", "r", "w", "w")
    row = differences(before, after)[0]
    assert (row.before, row.after) == (1 / 6, 4 / 6)
    assert row.difference == pytest.approx(0.5)
    assert row.p == mcnemar(4, 1)
    assert row.interval[0] < 0.5 < row.interval[1]
    many = differences(items("rw", "ww", "rr"), items("rr", "rw", "rr"))[0]
    assert many.p is None
    assert many.difference == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="different items"):
        differences(before, after[:3])


def policy(context: str) -> str:
    """With tools it searches first; without it knows the even ones anyway."""
    tail = context[context.rfind("<|im_start|>user") :]
    number = int(re.findall(r"thing (\d+)", tail)[0])
    offered = "<search>" in context[: context.rfind("<|im_start|>user")]
    if offered and "<response>" not in tail and number < 6:
        return f"<think>Look.</think><search>thing {number}</search>"
    known = offered or number % 2 == 0
    return f"<think>So.</think><answer>{number if known else 99}</answer>"


async def test_a_rollout_with_tools_off_finds_the_useless_calls(base: BaseModel):
    engine, dialect, world = ScriptedEngine(base.tokenizer, policy), TapoDialect(base.tokenizer), World()
    agent = Agent(engine, dialect, world.toolbox())
    done: list[tuple[int, int]] = []
    measured = await measure(
        TASKS, agent, "v0", Sampling(0.7, seed=1), 2, Recorded(agent.run_tool),
        bare_agent(engine, dialect, agent.limits), on_item=lambda n, of: done.append((n, of)),
    )  # fmt: skip
    rows = {row.kind: row for row in slices(measured)}
    assert rows["overall"].accuracy == 1.0
    assert rows["overall"].calls_per_answer == 6 / 8
    assert rows["overall"].useless_calls == 0.5
    assert (rows["even"].useless_calls, rows["odd"].useless_calls) == (1.0, 0.0)
    assert [item.without is not None for item in measured] == [True] * 6 + [False] * 2
    assert max(done) == (16, 16)
    assert len(world.asked) == 6  # the second answer saw the first one's results
    seeds = {request.sampling.seed or 0 for request in engine.requests}
    assert {seed > 1_000_003 for seed in seeds} == {False, True}  # each answer to an item has seeds of its own


def test_the_page_stands_by_itself_and_escapes_what_it_shows():
    hostile = ask("<script>alert(1)</script>", "numeric", "1", "even")
    before = [Item(hostile, [sample(hostile, False)]), *items("r", "w")]
    after = [Item(hostile, [sample(hostile, True)]), *items("r", "r")]
    html = page("A & B", {"sets": "x", "k": 1}, {"v0": before, "v1": after}, differences(before, after))
    assert "<script>" not in html
    assert "&lt;script&gt;" in html
    assert html.count("data:image/png;base64,") == 3
    assert not re.search(r"(?:src|href)=[\"']?(?:https?:)?//", html)
    assert "v1 against v0" in html
    assert "p (McNemar)" in html


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (["v0", "v0"], "two different ones"),
        (["v0", "--greedy", "-k", "4"], "at temperature 0 all answers to a task are alike"),
        (["v0", "--set", "gsm9k"], "unknown set 'gsm9k'"),
        (["v0", "--set", "gsm8k", "--set", "nq", "--file", "x.jsonl"], "--file is one set's"),
        (["v0", "--file", "gone.jsonl"], "gone.jsonl: cannot be read"),
    ],
)
def test_what_cant_be_measured_is_told_before_a_model_is_loaded(tmp_path, monkeypatch, command, says):
    monkeypatch.setenv("WHETSTONE_HOME", str(tmp_path / "home"))
    result = run.invoke(app, ["eval", *command])
    assert result.exit_code == 1
    assert says in " ".join(result.output.split())
    assert not (tmp_path / "home" / "models").exists()


def test_the_command_measures_two_versions_on_a_file(tmp_path, monkeypatch, base: BaseModel):
    """The real command around a scripted engine: table, JSON and page of one evaluation."""
    from contextlib import asynccontextmanager

    from feedback_store import Store
    from serving.versions import install_shipped
    from tests.test_versions import publish

    home = tmp_path / "home"
    monkeypatch.setenv("WHETSTONE_HOME", str(home))
    with Store.open(home / "whetstone.db") as store:
        install_shipped(store, home)
        publish(store, home, "v1")

    class Two(ScriptedEngine):
        """v1 knows them all; v0 the even ones."""

        async def generate(self, request):
            self.script = (
                policy if request.version.endswith("v1") else lambda context: policy(context).replace("1</", "7</")
            )
            async for chunk in super().generate(request):
                yield chunk

    @asynccontextmanager
    async def scripted(slots: int, context: int):
        engine = Two(base.tokenizer, policy)
        engine._loaded.clear()
        yield engine, base

    monkeypatch.setattr("app.engines.opener", lambda *_: scripted)
    mine = tmp_path / "mine.jsonl"
    mine.write_text("".join(json.dumps({"question": t.question, "answer": t.gold, "verifier": "numeric"}) + "\n"
                            for t in TASKS))  # fmt: skip
    html = tmp_path / "page.html"
    result = run.invoke(app, ["eval", "v0", "v1", "--file", str(mine), "--html", str(html), "--json"])
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    accuracy = {each["version"]: each["slices"][0]["accuracy"] for each in told["results"]}
    assert accuracy == {"v0": 7 / 8, "v1": 1.0}
    assert told["comparison"][0]["difference"] == pytest.approx(1 / 8)
    assert len(told["results"][0]["items"]) == 8
    assert html.read_text().startswith("<!doctype html>")
    assert Path(html).stat().st_size > 30_000
