"""The published layouts of data sets: from a row, as its authors or the hub publish it, to a task.

One layout a family, not one a set: most question answering differs only in the names of its fields.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from online_rl.tasks.base import Task
from online_rl.verifiers import em

Row = dict[str, Any]
_GSM8K = re.compile(r"####\s*(-?[0-9][0-9,]*(?:\.[0-9]+)?)\s*$")
_INTEGER = re.compile(r"-?\d+")
_DAPO_BEFORE = re.compile(r"\A\s*Solve the following math problem step by step\..*?\n\s*\n", re.S)
_DAPO_AFTER = re.compile(r"\n\s*\n?Remember to put your answer on its own line.*\Z", re.S)


class BadField(ValueError):
    """A row lacks what its layout needs; `field` names it."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field!r} {problem}")
        self.field, self.problem = field, problem


def qa(row: Row, kind: str) -> Task:
    """Open-domain questions with one or several right answers, verified by `em`.

    FlashRAG's common form (`golden_answers`); NQ-open (`answer`, a list); TriviaQA (`answer` with `value` and
    `aliases`); HotpotQA and 2WikiMultihopQA (`answer`); MuSiQue (with `answer_aliases`); Bamboogle (`Question`,
    `Answer`).
    """
    question = _text(row, "question", "Question")
    found = next((row[name] for name in ("golden_answers", "answer", "Answer") if row.get(name) is not None), None)
    if isinstance(found, dict):
        found = [found.get("value"), *(found.get("aliases") or [])]
    golds = [found] if isinstance(found, (str, int, float)) else list(found or [])
    golds += row.get("answer_aliases") or []
    texts = [str(gold) for gold in golds if gold is not None and str(gold).strip()]
    if not texts:
        raise BadField("answer", "is missing or empty: there is no gold")
    question = question if question.endswith(("?", ".", "!")) else f"{question}?"  # NQ's are without
    return _ask(question, "em", em.gold_of(texts), kind)


def gsm8k(row: Row, kind: str) -> Task:
    """GSM8K (arXiv 2110.14168): the gold stands behind #### in `answer`."""
    solution = row.get("answer")
    gold = _GSM8K.search(solution) if isinstance(solution, str) else None
    question = _text(row, "question")
    if gold is None:
        raise BadField("answer", "does not end in '#### ' and a number")
    return _ask(question, "numeric", gold[1].replace(",", ""), kind)


def maths(row: Row, kind: str) -> Task:
    """MATH-500 (`problem`, `answer`), AIME (`Problem` or `question`, `Answer`), DeepMath-103K (`final_answer`)."""
    question = _text(row, "problem", "Problem", "question")
    return _ask(question, *_mathematical(_gold(row, "final_answer", "answer", "Answer")), kind)


def dapo(row: Row, kind: str) -> Task:
    """DAPO-Math-17k (arXiv 2503.14476): verl's form, whose prompt has instructions around the problem; or the cleaned
    ones, with `prompt` as text and `target` or `solution`."""
    prompt = row.get("prompt")
    if isinstance(prompt, (list, tuple)) and prompt and isinstance(prompt[-1], dict):
        prompt = prompt[-1].get("content")
    if not isinstance(prompt, str) or not prompt.strip():
        raise BadField("prompt", "is missing or empty")
    reward = row.get("reward_model")
    gold = _gold(reward, "ground_truth") if isinstance(reward, dict) else _gold(row, "target", "solution", "answer")
    return _ask(_DAPO_AFTER.sub("", _DAPO_BEFORE.sub("", prompt)).strip(), *_mathematical(gold), kind)


def tapo(row: Row, kind: str) -> Task:
    """TAPO (arXiv 2510.07038): `data_source` says how the answer in `reward_model` is judged, and is the task's kind.

    Its code compares facts by containment or edit distance; `em` is stricter, and can't be paid for stuffing.
    """
    question, source = _text(row, "question"), _text(row, "data_source")
    reward = row.get("reward_model")
    truth = reward.get("ground_truth") if isinstance(reward, dict) else None
    target = truth.get("target") if isinstance(truth, dict) else truth
    if target is None or target == [] or not str(target).strip():
        raise BadField("reward_model", "has no ground_truth: there is no gold")
    texts = [target] if isinstance(target, (str, int, float)) else list(target)
    golds = [str(text).strip() for text in texts]
    if source == "nq":
        return _ask(question, "em", em.gold_of(golds), source)
    if source == "calculator":
        return _ask(question, "numeric", golds[0], source)
    if source == "complex":
        return _ask(question, "approximate", golds[0], source)
    if source in ("default", "gsm8k", "dapo_math", "deep_math") or source.startswith("aime"):
        return _ask(question, *_mathematical(golds[0]), source)
    raise BadField("data_source", f"is {source!r}, and no rule for that is known")


LAYOUTS: dict[str, Callable[[Row, str], Task]] = {"qa": qa, "gsm8k": gsm8k, "maths": maths, "dapo": dapo, "tapo": tapo}


def _ask(question: str, verifier: str, gold: str, kind: str) -> Task:
    return Task(({"role": "user", "content": question},), verifier, gold, kind)


def _mathematical(gold: str) -> tuple[str, str]:
    """The verifier of a mathematical gold, and the gold."""
    return ("numeric" if _INTEGER.fullmatch(gold) else "math"), gold


def _text(row: Row, *names: str) -> str:
    value = next((row[name] for name in names if row.get(name) is not None), None)
    if not isinstance(value, str) or not value.strip():
        raise BadField(names[0], "is missing or empty")
    return value.strip()


def _gold(row: Row, *names: str) -> str:
    value = next((row[name] for name in names if row.get(name) is not None), None)
    if isinstance(value, bool) or not isinstance(value, (str, int, float)) or not str(value).strip():
        raise BadField(names[0], "is missing or empty: there is no gold")
    return str(value).strip()
