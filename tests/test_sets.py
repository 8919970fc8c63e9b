"""Published layouts become tasks; sets are built without doubles and without what evaluation asks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from typer.testing import CliRunner

from app.cli import app
from online_rl import verifiers
from online_rl.tasks import files, jsonl
from online_rl.tasks.base import Task, ask
from online_rl.tasks.build import MAKEUP, build, card, save
from online_rl.tasks.files import HubUnavailable
from online_rl.tasks.generated import generate
from online_rl.tasks.jsonl import TaskFileError
from online_rl.tasks.overlap import Overlap, words
from online_rl.tasks.sets import EVALUATION, GENERATED, SETS, UnknownSet, load_set
from tests.test_tasks import DATA, FULL_GSM8K

run = CliRunner()

# One row each in the fields of the published files; the content is made up.
VERL = "Solve the following math problem step by step. The last line of your response should be Answer: $Answer.\n\n"
LAYOUTS: list[tuple[str, dict[str, Any], tuple[str, str, str]]] = [
    ("nq", {"id": "t_0", "question": "who dug the blue canal", "golden_answers": ["Ada", "Ada B"], "metadata": {}},
     ("who dug the blue canal?", "em", '["Ada", "Ada B"]')),
    ("nq", {"question": "who dug the blue canal", "answer": ["Ada"]}, ("who dug the blue canal?", "em", '["Ada"]')),
    ("triviaqa", {"question": "Which bird is it?", "question_id": "q1", "answer": {
        "value": "Heron", "aliases": ["Heron", "Grey heron"], "normalized_aliases": ["heron"]}},
     ("Which bird is it?", "em", '["Heron", "Grey heron"]')),
    ("hotpotqa", {"_id": "5a", "question": "Are both rivers long?", "answer": "yes", "type": "comparison",
                  "level": "hard", "supporting_facts": [["A", 0]], "context": [["A", ["x"]]]},
     ("Are both rivers long?", "em", '["yes"]')),
    ("2wiki", {"_id": "13", "type": "compositional", "question": "Who is the mother of Ida's director?",
               "answer": "Ema", "evidences": [["a", "b", "c"]], "supporting_facts": [], "context": []},
     ("Who is the mother of Ida's director?", "em", '["Ema"]')),
    ("musique", {"id": "2hop__1", "paragraphs": [], "question": "Where did its founder die?", "answer": "Graz",
                 "answer_aliases": ["City of Graz"], "answerable": True, "question_decomposition": []},
     ("Where did its founder die?", "em", '["Graz", "City of Graz"]')),
    ("bamboogle", {"Question": "When did the first who crossed it die?", "Answer": "1901"},
     ("When did the first who crossed it die?", "em", '["1901"]')),
    ("math500", {"problem": "What is half of $\\frac{2}{3}$?", "solution": "…", "answer": "\\frac{1}{3}",
                 "subject": "Algebra", "level": 1, "unique_id": "test/1"},
     ("What is half of $\\frac{2}{3}$?", "math", "\\frac{1}{3}")),
    ("aime24", {"ID": "2024-I-1", "Problem": "Find the number.", "Solution": "…", "Answer": 204},
     ("Find the number.", "numeric", "204")),
    ("aime25", {"problem": "Find another.", "answer": "70", "id": "0"}, ("Find another.", "numeric", "70")),
    ("aime25", {"question": "Find a third.", "answer": "588"}, ("Find a third.", "numeric", "588")),
    ("dapo-math", {"data_source": "math_dapo", "prompt": [{"role": "user", "content": VERL + "Find $x$ in $2x=68$."
                   '\n\nRemember to put your answer on its own line after "Answer:".'}], "ability": "MATH",
                   "reward_model": {"ground_truth": "34", "style": "rule-lighteval/MATH_v2"}, "extra_info": {}},
     ("Find $x$ in $2x=68$.", "numeric", "34")),
    ("dapo-math", {"prompt": "Find $y$.", "target": "9"}, ("Find $y$.", "numeric", "9")),
    ("deepmath", {"question": "Evaluate the limit.", "final_answer": "\\dfrac{\\pi}{4}", "difficulty": 5.0,
                  "topic": "Calculus", "r1_solution_1": "…"}, ("Evaluate the limit.", "math", "\\dfrac{\\pi}{4}")),
    ("tapo-easy-test", {"question": "How dense is it?", "data_source": "complex", "ability": "mixed",
                        "reward_model": {"style": "rule", "ground_truth": {"target": "8104.4"}}},
     ("How dense is it?", "approximate", "8104.4")),
    ("tapo-easy-hub", {"question": "Who?", "data_source": "nq", "ability": "fact-reasoning",
                       "reward_model": {"style": "rule", "ground_truth": {"target": ["Ada", "Eva"]}}},
     ("Who?", "em", '["Ada", "Eva"]')),
]  # fmt: skip


@pytest.mark.parametrize(("name", "row", "task"), LAYOUTS, ids=lambda value: value if isinstance(value, str) else "")
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_a_published_layout_becomes_a_task(tmp_path, name, row, task, suffix):
    file = tmp_path / f"{name}{suffix}"
    if suffix == ".parquet":
        row = {key: value for key, value in row.items() if value not in ({}, [])}  # Parquet has no type for these
        row = {
            key: str(value) if key in ("supporting_facts", "context", "evidences") else value
            for key, value in row.items()
        }
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), file)
    else:
        file.write_text(json.dumps([row] if suffix == ".json" else row), encoding="utf-8")
    (found,) = load_set(name, folder=tmp_path)
    assert (found.question, found.verifier, found.gold) == task
    golds = json.loads(found.gold) if found.verifier == "em" else [found.gold]
    assert all(verifiers.get(found.verifier).score(found.gold, gold).right for gold in golds)


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("nq", {"question": "who"}, "line 1: 'answer' is missing or empty: there is no gold"),
        ("nq", {"question": "who", "answer": [" "]}, "line 1: 'answer' is missing or empty: there is no gold"),
        ("math500", {"problem": "?", "answer": None}, "line 1: 'final_answer' is missing or empty: there is no gold"),
        ("gsm8k", {"question": "2 + 2?", "answer": "four"}, "line 1: 'answer' does not end in '#### ' and a number"),
        ("dapo-math", {"prompt": []}, "line 1: 'prompt' is missing or empty"),
        ("tapo-easy-test", {"question": "?", "data_source": "chess", "reward_model": {"ground_truth": "1"}},
         "line 1: 'data_source' is 'chess', and no rule for that is known"),
        ("tapo-easy-test", {"question": "?", "data_source": "nq"}, "line 1: 'reward_model' has no ground_truth"),
    ],
)  # fmt: skip
def test_a_row_without_a_gold_is_named(tmp_path, name, row, message):
    (tmp_path / f"{name}.jsonl").write_text(json.dumps(row))
    with pytest.raises(TaskFileError, match=message):
        load_set(name, folder=tmp_path)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("gsm8k.jsonl", b'{"question": "1?", "answer": "#### 1"}\n{broken', "gsm8k.jsonl, line 2: is not JSON"),
        ("gsm8k.json", b"[1]", "gsm8k.json, line 1: is a JSON int"),
        ("gsm8k.json", b'{"x": 1}', "is no JSON list"),
        ("gsm8k.parquet", b"PAR1nonsense", "is not Parquet"),
        ("gsm8k.csv", b"a,b", "has the ending '.csv': use one of .jsonl, .json, .parquet"),
    ],
)
def test_a_broken_file_is_named(tmp_path, file, content, message):
    (tmp_path / file).write_bytes(content)
    with pytest.raises(TaskFileError, match=message):
        load_set("gsm8k", file=tmp_path / file)


def test_a_part_of_a_set_is_the_same_for_the_same_seed(tmp_path):
    (tmp_path / "gsm8k.jsonl").write_bytes((DATA / "gsm8k_sample.jsonl").read_bytes())
    some = load_set("gsm8k", 10, 1, folder=tmp_path)
    assert some == load_set("gsm8k", 10, 1, folder=tmp_path)
    assert some != load_set("gsm8k", 10, 2, folder=tmp_path)
    with pytest.raises(ValueError, match=r"gsm8k has 60 tasks .*, 61 were asked for"):
        load_set("gsm8k", 61, folder=tmp_path)
    assert {task.kind for task in load_set("generated", 3)} == set(GENERATED) - {"generated"}
    with pytest.raises(UnknownSet, match="unknown set 'gsm9k': choose one of gsm8k, math500"):
        load_set("gsm9k")


@pytest.mark.skipif(not (FULL_GSM8K / "train.jsonl").is_file(), reason="GSM8K's whole files aren't here")
def test_the_whole_of_gsm8k_loads_and_its_test_half_is_kept_out():
    train, test = (load_set(name, file=FULL_GSM8K / f"{half}.jsonl") for name, half in
                   (("gsm8k-train", "train"), ("gsm8k", "test")))  # fmt: skip
    assert (len(train), len(test)) == (7_473, 1_319)
    built = build("mine", {"gsm8k-train": 7_000}, lambda _: [*train, *test[:50]], {"gsm8k": test})
    dropped = built.parts[0].dropped["in the evaluation set gsm8k"]
    assert 50 <= dropped < 80
    assert not {task.question for task in test} & {task.question for task in built.tasks}


def test_what_is_out_of_reach_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(files, "_reachable", lambda: False)
    with pytest.raises(HubUnavailable, match=r"math500 is on .*\(HuggingFaceH4/MATH-500\).*out of reach"):
        load_set("math500", folder=tmp_path)
    monkeypatch.setenv("WHETSTONE_HOME", str(tmp_path))
    result = run.invoke(app, ["tasks", "build", "tapo-easy"])
    assert result.exit_code == 1
    assert "tapo-easy-hub is on the Hugging Face hub (Goer17/TAPO)" in " ".join(result.output.split())
    assert "--skip-missing" in result.output


# -- overlap


LONG = "A farmer sells twelve crates of pears each week and keeps three of them for his own large family at home"


@pytest.mark.parametrize(
    ("question", "hit"),
    [
        (LONG, "long"),
        (f"Before that: {LONG.upper()}!", "long"),
        (LONG.replace("keeps", "gives"), None),  # no 13 words in a row are left
        ("Who painted the old mill?", "short"),
        ("Tell me: who painted the old mill, please", "short"),
        ("Who painted the new mill?", None),
        ("Why?", "tiny"),
        ("Why is it so?", None),
        ("What is 12 + 30?", "sum"),
        ("What is 12 - 30?", None),
        ("What is 12 + 31?", None),
        ("Add 1,000 to the 25 crates", "thousand"),
    ],
)
def test_overlap_is_of_words_and_numbers_in_a_row(question, hit):
    overlap = Overlap()
    for name, said in (("long", LONG), ("short", "who painted the old mill"), ("tiny", "why"),
                       ("sum", "what is 12 + 30"), ("thousand", "add 1000 to the 25 crates")):  # fmt: skip
        overlap.add(name, [said])
    assert overlap.of(question) == hit


def test_words_keep_numbers_and_signs():
    assert words("What's 1,234.5 × 2 - 7?") == ("what", "s", "1234.5", "2", "-", "7")  # noqa: RUF001


# -- building


def test_a_set_is_built_clean_and_the_same_twice(tmp_path):
    def read(_: str) -> list[Task]:
        return [
            *(
                ask(f"How many legs have {n} spiders with {n} friends?", "numeric", str(16 * n), "x")
                for n in range(2, 30)
            ),
            ask("Which town is it?", "exact", "Graz", "x"),
            ask("which town is it", "exact", "Linz", "x"),  # the same question, another gold
            ask("Who painted the old mill?", "exact", "Ida", "x"),  # evaluated
            ask("What is no number?", "numeric", "many", "x"),
            ask("HOW many legs have 2 spiders, with 2 friends", "numeric", "32", "x"),
        ]

    evaluation = {"mine": [ask("who painted the old mill", "exact", "Ida", "y")]}
    makeup = {"gsm8k-train": 20, "calculator": 30, "complex": 10}
    built = build("tapo-easy", makeup, read, evaluation, 3)
    (part, calculator, mixed) = built.parts
    assert (len(part.kept), len(calculator.kept), len(mixed.kept)) == (20, 30, 10)
    assert part.read == 33
    assert sum(part.dropped.values()) == 13
    assert part.dropped["another row has another gold for this question"] == 2
    assert part.dropped["in the evaluation set mine"] == 1
    path = tmp_path / "set.jsonl"
    told = save(built, path).read_text()
    assert jsonl.load(path) == built.tasks == build("tapo-easy", makeup, read, evaluation, 3).tasks
    assert built.tasks != build("tapo-easy", makeup, read, evaluation, 4).tasks
    assert "| gsm8k-train | GSM8K, train (openai/gsm8k, train) | MIT | 33 | 20 | 20 |" in told
    assert "| gsm8k-train | in the evaluation set mine | 1 |" in told
    assert "| mine | 1 |" in told
    heldout = {task.meta["key"] for kind in ("arithmetic", "digits") for task in generate(kind, 50, 3, "heldout")}
    assert not heldout & {task.meta["key"] for task in calculator.kept}
    assert "Not at hand" not in told
    assert "- nq: on the hub" in card(build("x", {"complex": 2}, read, {}, missing={"nq": "on the hub"}))


def test_a_gold_that_cant_be_judged_is_left_out():
    bad = [ask("What is no number?", "numeric", "many", "x"), ask("What is 1?", "numeric", "1", "x")]
    built = build("x", {"gsm8k-train": 5}, lambda _: bad, {})
    assert [task.gold for task in built.tasks] == ["1"]
    assert built.parts[0].dropped == {"a gold that the verifier numeric can't judge": 1}


def test_the_make_up_is_the_paper_s_in_size_and_sources():
    assert {name: sum(parts.values()) for name, parts in MAKEUP.items()} == {"tapo-easy": 60_000, "tapo-hard": 18_000}
    for parts in MAKEUP.values():
        assert all(SETS[part].use == "training" for part in parts if part in SETS)


def test_the_commands_list_show_and_build(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_reachable", lambda: False)
    monkeypatch.setenv("WHETSTONE_HOME", str(tmp_path))
    (tmp_path / "data").mkdir()
    rows = (DATA / "gsm8k_sample.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "data" / "gsm8k.jsonl").write_text("".join(rows[:20]), encoding="utf-8")
    train = tmp_path / "train.jsonl"
    train.write_text("".join(rows[10:]), encoding="utf-8")
    listed = {row["name"]: row["at_hand"] for row in json.loads(run.invoke(app, ["tasks", "list", "--json"]).output)}
    assert set(listed) == {*GENERATED, *SETS}
    assert (listed["gsm8k"], listed["math500"], listed["two_hop"]) == (True, False, True)
    shown = json.loads(run.invoke(app, ["tasks", "show", "gsm8k", "-n", "3", "--json"]).output)
    assert len(shown) == 3
    command = ["tasks", "build", "tapo-easy", "--from", "sources", "--size", "120", "--skip-missing", "--json"]
    told = json.loads(run.invoke(app, [*command, "--source", f"gsm8k-train={train}"]).output)
    assert set(told["missing"]) == {"nq-train", *EVALUATION} - {"gsm8k"}
    kept = {part["part"]: part["kept"] for part in told["parts"]}
    assert kept == {"gsm8k-train": 14, "calculator": 26, "complex": 16}
    questions = {task.question for task in jsonl.load(Path(told["file"]))}
    assert not questions & {json.loads(row)["question"] for row in rows[:20]}
    for wrong, says in ((["tasks", "build", "tapo"], "unknown set 'tapo': choose one of tapo-easy, tapo-hard"),
                        ([*command, "--source", "gsm9k=x"], "write it as SET=FILE"),
                        ([*command, "--source", "gsm8k=gone.jsonl"], "gone.jsonl is no file"),
                        (["tasks", "show", "gsm9k"], "unknown set 'gsm9k'")):  # fmt: skip
        result = run.invoke(app, wrong)
        assert result.exit_code == 1
        assert says in " ".join(result.output.split())
