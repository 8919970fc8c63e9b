"""Redaction before training: what identifies people goes, and a task that would be spoilt is set aside."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from app.redaction import RedactionMissing, redactor
from feedback_store import Store
from online_rl.loop import RunOptions, run_once
from online_rl.recipe import load_recipe
from online_rl.redaction import redact_task
from online_rl.tasks.base import ask
from serving.engines.opening import embedded
from serving.model import BaseModel
from serving.versions import install_shipped
from tools.python import PythonTool
from tools.toolbox import Toolbox


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("Mail ada@example.com, or call +44 20 7946 0958.", "Mail [EMAIL], or call [PHONE]."),
        ("Card 4111 1111 1111 1111 from 10.1.2.3", "Card [CREDIT_CARD] from [IP_ADDRESS]"),
        ("SSN 078-05-1120", "SSN [SSN]"),
        ("What is 4837 * 291?", "What is 4837 * 291?"),
        ("In 2019 there were 90210 people.", "In 2019 there were 90210 people."),
    ],
)
def test_what_has_a_shape_is_found(text: str, clean: str) -> None:
    assert redactor()(text).text == clean


def test_a_task_that_stays_solvable_is_redacted() -> None:
    task = ask("I'm ada@example.com. Which planet is the largest?", "exact", "Jupiter", "plain")
    found = redact_task(task, redactor())
    assert not isinstance(found, str)
    assert found.question == "I'm [EMAIL]. Which planet is the largest?"
    assert (found.gold, found.verifier) == ("Jupiter", "exact")
    short = ask("I'm ada@example.com. Which letter is first?", "exact", "a", "plain")
    assert not isinstance(redact_task(short, redactor()), str), "an a in the address is no answer"
    untouched = ask("What is 2 + 2?", "numeric", "4", "sum")
    assert redact_task(untouched, redactor()) is untouched


@pytest.mark.parametrize(
    ("question", "verifier", "gold", "why"),
    [
        ("What is 555-123-4567 minus 1?", "numeric", "5551234566", "right answer|number"),
        ("What are the digits of (415) 555-2671 in sum?", "numeric", "35", "number of its question"),
        ("Which address is in 'from ada@example.com'?", "exact", "ada@example.com", "right answer"),
        ("At which host is ada@example.com?", "exact", "example.com", "right answer"),
    ],
)
def test_a_task_that_would_be_spoilt_is_set_aside(question: str, verifier: str, gold: str, why: str) -> None:
    found = redact_task(ask(question, verifier, gold, "k"), redactor())
    assert isinstance(found, str)
    assert any(reason in found for reason in why.split("|"))


def test_without_the_library_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datafog.engine", None)
    with pytest.raises(RedactionMissing, match="redact"):
        redactor()


def test_a_run_trains_on_what_is_left_and_on_who_consents(base: BaseModel, tmp_path: Path) -> None:
    with Store.open(tmp_path / "whetstone.db") as store:
        install_shipped(store, tmp_path)
        for question, verifier, gold, owner in (
            ("I am ada@example.com. Which is the largest planet?", "exact", "Jupiter", "ada"),
            ("What is 555-123-4567 + 1?", "numeric", "2", "ada"),
            ("Mine alone", "exact", "x", "bob"),
        ):
            store.add_task([{"role": "user", "content": question}], verifier, gold, "k", "test", owner)
        store.training_by_default = False  # bob said nothing
        store.set_consent("ada", True)
        options = RunOptions(load_recipe("embedded-cpu"), heldout=[], least_tasks=2, redact=redactor())
        result = run_once(tmp_path, store, embedded(base), Toolbox([PythonTool()]), options)
        assert result.status == "ended", "one task is too few: nothing was trained"
        (task,) = json.loads((result.folder / "tasks.json").read_text())
        assert task["messages"][0]["content"] == "I am [EMAIL]. Which is the largest planet?"
        (claim,) = [stage.detail for stage in store.run(result.run_id).stages if stage.stage == "claim"]
        assert list(claim["set_aside"]) == ["a number of its question would be redacted"]
        assert "Mine alone" not in str(store.tasks())
        spoilt, used = (task.id for task in sorted(store.tasks(), key=lambda one: "555" not in str(one.messages)))
        assert claim["unused"] == [spoilt], "every id, for lineage and for forgetting"
        assert [task.id for task in store.trace(result.run_id).came_from] == [used]
        assert store.erase(owner="ada").tasks_emptied == 2
        assert [run.task_ids for run in store.unswept().runs] == [[used]]
