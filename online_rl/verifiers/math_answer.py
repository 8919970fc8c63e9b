"""`math`: equal as mathematics. Plain numbers are compared as numbers, everything else by math-verify."""

from __future__ import annotations

import re

from online_rl.verifiers import numeric
from online_rl.verifiers.base import Score, Verifier
from online_rl.verifiers.math_process import compare
from online_rl.verifiers.numbers import plain_digits, read_number

MAX_EXPRESSION = 300
"""Characters of the committed expression. Symbolic equality of longer ones is rarely what a task asks."""

_DOLLARS = re.compile(r"\$\$?([^$]+)\$\$?|\\\((.{1,300}?)\\\)|\\\[(.{1,300}?)\\\]", re.S)
_MARK = re.compile(r"####|\b(?:answer|result|solution)\s*(?::|is)|\bis\b", re.I)
_LIST = re.compile(r"\b(?:or|and|maybe|either)\b", re.I)
_SYMBOLIC = re.compile(r"\\(?!\$|%|,|boxed)|[\^/√π∞]|\b[a-z]\b", re.I)
_TEXT = re.compile(r"\\(?:text|mathrm|mathbf|textbf)\{([^{}]*)\}")


def judge(gold: str, answer: str, _tool_calls: int = 0) -> Score:
    """1 when the one expression that the answer commits to equals the gold, else 0.

    The expression is what is boxed, else the one formula in dollars, else what follows "the answer is", else all of
    it. Several different boxed expressions, or several joined by "or", are a list and wrong.
    """
    if not bare(gold):
        return Score(0.0, "the gold is empty")
    said = _committed(answer)
    if isinstance(said, Score):
        return said
    if bare(said) == bare(gold):
        return Score(1.0, "the gold itself")
    if read_number(gold).value is not None and not _SYMBOLIC.search(gold):
        score = numeric.judge(gold, said)
        if score.right or not _SYMBOLIC.search(said):
            return score
    if len(said) > MAX_EXPRESSION or len(gold) > MAX_EXPRESSION:
        return Score(0.0, f"an expression of more than {MAX_EXPRESSION} characters")
    if _LIST.search(_TEXT.sub(r"\1", said)) and not _LIST.search(gold):
        return Score(0.0, "a list of answers")
    reply = compare(_formula(gold), _formula(said))
    if reply.get("error"):
        return Score(0.0, f"not judged: {reply['error']}")
    if not reply["gold_read"]:
        return Score(0.0, f"the gold {gold[:60]!r} is not mathematics")
    if not reply["answer_read"]:
        return Score(0.0, "no mathematics in the answer")
    return Score(1.0, "equal") if reply["equal"] else Score(0.0, "another value")


def _committed(answer: str) -> str | Score:
    """The expression that the answer stands by."""
    answer = plain_digits(answer).strip()
    if not answer:
        return Score(0.0, "no answer")
    boxed = list(dict.fromkeys(_boxed(answer)))
    if len(boxed) > 1:
        return Score(0.0, f"{len(boxed)} different boxed answers")
    if boxed:
        return boxed[0]
    formulas = list(dict.fromkeys("".join(groups) for groups in _DOLLARS.findall(answer)))
    marks = list(_MARK.finditer(answer))
    tail = answer[marks[-1].end() :].strip() if marks else ""
    if len(formulas) == 1 and ("\\" in answer or not marks):
        return formulas[0].strip()
    return tail or answer


def _boxed(text: str) -> list[str]:
    r"""The contents of every \boxed{…}, with balanced braces."""
    found = []
    for match in re.finditer(r"\\boxed\s*\{", text):
        depth, start = 1, match.end()
        for i in range(start, min(len(text), start + 2 * MAX_EXPRESSION)):
            depth += {"{": 1, "}": -1}.get(text[i], 0)
            if not depth:
                found.append(text[start:i].strip())
                break
    return found


def _formula(text: str) -> str:
    return text.strip().strip("$").strip().removesuffix(".").strip()


def bare(text: str) -> str:
    """Without dollars, text commands, spaces, case and closing dot: equal where only the typesetting differs."""
    return re.sub(r"\s+|[$]", "", _TEXT.sub(r"\1", text)).casefold().removesuffix(".")


def wrongs(gold: str) -> list[str]:
    """Near misses and lists made from a gold."""
    formula = _formula(gold)
    made = ["", "I don't know.", f"\\boxed{{{formula}}} \\boxed{{{formula}+1}}", f"${formula}$ or ${formula}+1$"]
    if re.fullmatch(r"[^=<>{},\[\]]+|\\d?frac\{\d+\}\{\d+\}", formula) and re.search(r"\d", formula):
        made.append(f"$({formula}) + 1$")
    return made


VERIFIER = Verifier("math", judge, wrongs)
