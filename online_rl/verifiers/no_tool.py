"""`no_tool`: a proper reply without a call. For prompts that no tool can help with."""

from __future__ import annotations

import re

from online_rl.verifiers.base import Score, Verifier
from online_rl.verifiers.exact import contains, words

MAX_WORDS = 300
MIN_DISTINCT = 0.3
"""The least share of different words in a reply of more than 20: below it, the text is going round in circles."""

_MARKUP = re.compile(r"</?(?:think|search|code|response|answer)\b|<\|", re.I)


def judge(gold: str, answer: str, tool_calls: int = 0) -> Score:
    """1 for a reply in words with no tool call, no markup and no circles; a gold that isn't empty must be in it."""
    if tool_calls:
        return Score(0.0, f"{tool_calls} tool calls where none was needed")
    said = words(answer)
    if not said or (len("".join(said)) < 2 and not gold.strip()):
        return Score(0.0, "no answer")
    if len(said) > MAX_WORDS:
        return Score(0.0, f"{len(said)} words, more than {MAX_WORDS}")
    if _MARKUP.search(answer):
        return Score(0.0, "markup in the reply")
    if len(said) > 20 and len(set(said)) < MIN_DISTINCT * len(said):
        return Score(0.0, "the reply repeats itself")
    if gold.strip() and not contains(said, words(gold)):
        return Score(0.0, "the reply lacks what it must say")
    return Score(1.0, "answered without a tool")


def rights(gold: str) -> list[str]:
    return [f"Sure: {gold}." if gold.strip() else "Hello! How can I help you?"]


def wrongs(gold: str) -> list[str]:
    return ["", " \n", "?", "<search>hello</search>", "hello " * 40, "words and more words, all new " * 80]


VERIFIER = Verifier("no_tool", judge, wrongs, rights)
