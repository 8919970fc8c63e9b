"""Generated tasks are right, varied and split cleanly; task files are read or refused with a clear error."""

import json
import random
from pathlib import Path

import pytest

from online_rl import verifiers
from online_rl.tasks import jsonl
from online_rl.tasks.arithmetic import LEVELS, arithmetic
from online_rl.tasks.base import Task
from online_rl.tasks.expression import decimal_text, exact
from online_rl.tasks.generated import KINDS, generate, split_of
from online_rl.tasks.gsm8k import gsm8k
from online_rl.tasks.lookup import PHRASINGS, askable
from online_rl.tasks.plain import prompts
from tools.search.corpus import documents

DATA = Path(__file__).parent / "data"
FULL_GSM8K = Path(__file__).parents[1].parent / "shared" / "data" / "gsm8k"
SIZES = {"arithmetic": (600, 300), "lookup": (600, 300), "mixed": (400, 200), "plain": (130, 25)} | dict.fromkeys(
    ("digits", "units", "dates", "two_hop", "mental"), (300, 90)
)


def gsm8k_tasks() -> list[Task]:
    """GSM8K's test set where it is at hand, else the sample in this folder."""
    if (FULL_GSM8K / "test.jsonl").is_file():
        return gsm8k(FULL_GSM8K, "test")
    rows = [json.loads(line) for line in (DATA / "gsm8k_sample.jsonl").read_text(encoding="utf-8").splitlines()]
    golds = [row["answer"].rsplit("#### ", 1)[1].replace(",", "") for row in rows]
    return [
        Task(({"role": "user", "content": row["question"]},), "numeric", gold, "gsm8k")
        for row, gold in zip(rows, golds, strict=True)
    ]


# -- generated tasks


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_gives_the_same_tasks_and_another_seed_others(kind):
    n = SIZES[kind][1]
    assert generate(kind, n, 1, "train") == generate(kind, n, 1, "train")
    assert generate(kind, n, 1, "train") != generate(kind, n, 2, "train")


@pytest.mark.parametrize("kind", KINDS)
def test_no_prompt_or_content_is_in_both_splits(kind):
    train, heldout = generate(kind, SIZES[kind][0], 3, "train"), generate(kind, SIZES[kind][1], 3, "heldout")
    for tasks, split, size in ((train, "train", SIZES[kind][0]), (heldout, "heldout", SIZES[kind][1])):
        assert len(tasks) == size
        assert len({task.question for task in tasks}) == size
        assert len({task.id for task in tasks}) == size
        assert {task.kind for task in tasks} == {kind}
        assert {split_of(task) for task in tasks} == {split}
    keys = [{key for task in tasks for key in task.meta["key"].split("|")} for tasks in (train, heldout)]
    assert not keys[0] & keys[1]
    assert not {task.question for task in train} & {task.question for task in heldout}


def test_swapped_operands_are_the_same_content():
    found = {}
    rng = random.Random(0)
    while len(found) < 3:
        task = arithmetic(rng, 1)
        found[task.question] = task.meta["key"]
    for question, key in found.items():
        numbers = key.removeprefix("numbers:").split(",")
        assert numbers == sorted(numbers)
        assert all(number in question.replace(",", "") for number in numbers)


@pytest.mark.parametrize("level", LEVELS)
def test_python_computes_the_gold_of_every_template(level):
    tasks = generate("arithmetic", 500, 7, "train", level=level)
    assert {task.meta["level"] for task in tasks} == {str(level)}
    for task in tasks:
        value = eval(task.meta["expression"], {"__builtins__": {"round": round}})
        assert verifiers.get("numeric").score(task.gold, repr(value)).right, (task.question, task.gold, value)
        assert "{" not in task.question
    assert all(float(task.gold) > 0 for task in tasks)


def test_there_are_many_phrasings():
    assert sum(len(templates) for templates in LEVELS.values()) >= 50
    assert all(len(set(phrasings)) >= 4 for phrasings in PHRASINGS.values())
    assert len({question.lower() for question, _ in prompts()}) >= 150


def test_exact_arithmetic_has_no_rounding_and_knows_only_numbers():
    assert exact("0.1 + 0.2") * 10 == 3
    assert exact("(7 - 2) // 2 + 10 % 4 - -1") == 5
    assert decimal_text(exact("2 / 3"), 2) == "0.67"
    assert decimal_text(exact("-1 / 20"), 2) == "-0.05"
    assert decimal_text(exact("5"), 0) == "5"
    with pytest.raises(ValueError, match=r"open\('x'\)"):
        exact("1 + open('x')")


def test_lookup_golds_stand_in_the_corpus():
    texts = {document.id: document.text for document in documents()}
    for task in generate("lookup", 500, 11, "train"):
        (fact,) = json.loads(task.meta["facts"])
        assert fact["value"] == task.gold
        assert task.gold in texts[fact["document_id"]]
        assert fact["subject"].removeprefix("The ").lower() in task.question.lower()
        numeric = task.gold.replace(".", "").isdigit()
        assert task.verifier == ("numeric" if numeric else "exact")


def test_ambiguous_facts_are_not_asked():
    subjects = {fact.subject for pool in askable().values() for fact in pool}
    assert not {"Singapore", "Jamaica", "Djibouti"} & subjects  # a country and a city
    assert "Kazakhstan" not in {fact.subject for fact in askable()["country", "capital"]}
    assert "Luxembourg" not in {fact.subject for fact in askable()["country", "capital"]}  # the question says it


def test_mixed_golds_follow_from_their_facts():
    for task in generate("mixed", 300, 13, "train"):
        facts = json.loads(task.meta["facts"])
        assert all(fact["value"] in task.meta["expression"] for fact in facts)
        value = eval(task.meta["expression"], {"__builtins__": {"round": round}})
        assert verifiers.get("numeric").score(task.gold, repr(value)).right, task.question


def test_every_generated_task_can_be_answered_right():
    for kind in KINDS:
        for task in generate(kind, SIZES[kind][1], 17, "train"):
            answer = task.meta.get("reply", task.gold)
            assert verifiers.get(task.verifier).score(task.gold, answer).right, (task.question, answer)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="unknown task kind 'sums': choose one of arithmetic, lookup, mixed, plain, d"):
        generate("sums", 1, 0, "train")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown split 'test'"):
        generate("plain", 1, 0, "test")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown level 4 of 'arithmetic' tasks, whose levels are: 1, 2, 3"):
        generate("arithmetic", 1, 0, "train", level=4)
    with pytest.raises(ValueError, match="unknown level 1 of 'plain' tasks, whose levels are: none"):
        generate("plain", 1, 0, "train", level=1)
    with pytest.raises(ValueError, match="distinct 'plain' tasks in split 'heldout', 5000 were asked for"):
        generate("plain", 5000, 0, "heldout")


# -- GSM8K


def test_gsm8k_golds_are_numbers(tmp_path):
    (tmp_path / "test.jsonl").write_bytes((DATA / "gsm8k_sample.jsonl").read_bytes())
    tasks = gsm8k(tmp_path, "test")
    assert len(tasks) == 60
    assert all(task.kind == "gsm8k" and task.source == "gsm8k/test" for task in tasks)
    assert verifiers.get("numeric").validate(task.gold for task in tasks).ok


def test_gsm8k_names_a_bad_row_and_a_missing_file(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"question": "2 + 2?", "answer": "four"}\n')
    with pytest.raises(
        jsonl.TaskFileError, match=r"train.jsonl, line 1: 'answer' does not end in '#### ' and a number"
    ):
        gsm8k(tmp_path, "train")
    with pytest.raises(jsonl.TaskFileError, match=r"test.jsonl: cannot be read: No such file"):
        gsm8k(tmp_path, "test")


# -- a user's file


def test_a_users_file_becomes_tasks(tmp_path):
    file = tmp_path / "mine.jsonl"
    file.write_text(
        '\ufeff{"question": "What is 2 * 21?", "answer": 42, "verifier": "numeric", "kind": "sums"}\n\n'
        '{"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Capital of Estonia?"}],'
        ' "answer": "Tallinn", "verifier": "exact"}\n',
        encoding="utf-8",
    )
    first, second = jsonl.load(file)
    assert (first.question, first.gold, first.verifier, first.kind) == ("What is 2 * 21?", "42", "numeric", "sums")
    assert (len(second.messages), second.question, second.kind) == (2, "Capital of Estonia?", "user")
    assert first.source == "mine.jsonl"


GOOD = '{"question": "1?", "answer": "1", "verifier": "numeric"}'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{nonsense", "line 2: is not JSON"),
        ("[" * 100_000, "line 2: is not JSON"),
        ("[1]", "line 2: is a JSON list, not an object"),
        ('{"question": "1?", "anwser": "1", "verifier": "numeric"}', "line 2: 'anwser' is not a field of a task"),
        ('{"answer": "1", "verifier": "numeric"}', "line 2: 'question' or 'messages' must be given"),
        ('{"question": " ", "answer": "1", "verifier": "numeric"}', "line 2: 'question' must be text and not empty"),
        ('{"question": "2?", "verifier": "numeric"}', "line 2: 'answer' must be text or a number, not NoneType"),
        ('{"question": "2?", "answer": true, "verifier": "numeric"}', "line 2: 'answer' must be text or a number"),
        ('{"question": "2?", "answer": "1"}', "line 2: 'verifier' must be one of approximate, em, exact, f1"),
        (
            '{"question": "2?", "answer": "1", "verifier": "maths"}',
            "line 2: 'verifier' is wrong: unknown verifier 'maths'",
        ),
        (
            '{"question": "2?", "answer": "one", "verifier": "numeric"}',
            "line 2: 'answer' cannot be judged by 'numeric'",
        ),
        ('{"question": "2?", "answer": "1", "verifier": "numeric", "kind": 3}', "line 2: 'kind' must be text"),
        ('{"messages": [], "answer": "1", "verifier": "numeric"}', "line 2: 'messages' must be a list"),
        (
            '{"messages": [{"role": "bot", "content": "x"}], "answer": "1", "verifier": "numeric"}',
            r"line 2: 'messages\[0\].role' is 'bot': use one of system, user, assistant",
        ),
        (
            '{"messages": [{"role": "assistant", "content": "x"}], "answer": "1", "verifier": "numeric"}',
            "line 2: 'messages' must end with the user's message",
        ),
        (GOOD, "line 2: repeats the task of line 1"),
    ],
)
def test_a_bad_line_is_named_with_its_field(tmp_path, line, message):
    file = tmp_path / "mine.jsonl"
    file.write_text(f"{GOOD}\n{line}\n")
    with pytest.raises(jsonl.TaskFileError, match=message):
        jsonl.load(file)


def test_a_file_that_is_empty_or_not_text_is_named(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "binary.jsonl").write_bytes(GOOD.encode() + b"\n\xff\xfe\n")
    with pytest.raises(jsonl.TaskFileError, match=r"empty.jsonl: no task in the file"):
        jsonl.load(tmp_path / "empty.jsonl")
    with pytest.raises(jsonl.TaskFileError, match=r"binary.jsonl, line 2: is not UTF-8"):
        jsonl.load(tmp_path / "binary.jsonl")
