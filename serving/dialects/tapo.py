"""The `tapo` dialect: the tags of the TAPO paper (arXiv 2510.07038), on the model's own chat markup.

A generation is `<think>…</think>` and then one action: `<code>`, `<search>` or `<answer>`. What a tool returned comes
back as `<response>…</response>`, in tokens that no text can turn into markup: special tokens are never read from
text, and the dialect's own tags are made harmless in it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from serving.trajectory import ActionKind, AnswerText, Thinking

Tool = Literal["code", "search"]
TOOLS: tuple[Tool, ...] = ("code", "search")

_RULES = {
    frozenset(TOOLS): (
        "Think in <think></think>. To calculate, write Python that prints the result in <code></code>. "
        "To look up a fact, write a query in <search></search>. The result comes in <response></response>. "
        "Finish with <answer></answer>."
    ),
    frozenset({"code"}): (
        "Think in <think></think>. To calculate, write Python that prints the result in <code></code>. "
        "The result comes in <response></response>. Finish with <answer></answer>."
    ),
    frozenset({"search"}): (
        "Think in <think></think>. To look up a fact, write a query in <search></search>. "
        "The result comes in <response></response>. Finish with <answer></answer>."
    ),
    frozenset(): "Think in <think></think>. Finish with <answer></answer>.",
}
_NAME = "You are Whetstone, a helpful assistant. "
_TAGS = "think|code|search|response|answer"
_TAG = re.compile(rf"<(?=/?\s*(?:{_TAGS})\b|\|)", re.IGNORECASE)
_ACTION = re.compile(r"<(code|search|answer)>(.*?)(?:</\1>|\Z)", re.DOTALL)
_THOUGHT = re.compile(r"<think>(.*?)(?:</think>|\Z)", re.DOTALL)
_STEP = re.compile(
    rf"\s*<think>(?P<thought>(?:(?!</?(?:{_TAGS})>).)*)</think>"
    rf"\s*<(?P<action>code|search|answer)>(?P<input>(?:(?!</?(?:{_TAGS})>).)*)</(?P=action)>\s*",
    re.DOTALL,
)
_LONGEST_TAG = len("</response>")

INVALID = "Invalid action. Think, then write one code, search or answer block."
LAST = "No more tools. Give the answer now."


@dataclass(frozen=True)
class Parsed:
    """What a finished generation says. `input` is exactly what stood between the action's tags."""

    text: str
    thought: str
    action: ActionKind
    input: str
    well_formed: bool


class TapoDialect:
    """Works with any tokenizer that has the ChatML tokens `<|im_start|>` and `<|im_end|>`."""

    name = "tapo"

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._start, self._end = (tokenizer.convert_tokens_to_ids(t) for t in ("<|im_start|>", "<|im_end|>"))
        if self._start is None or self._end is None or self._start == self._end:
            raise ValueError("The tapo dialect needs a tokenizer with <|im_start|> and <|im_end|>.")

    def render(self, messages: Sequence[dict[str, str]], tools: Iterable[str] = TOOLS) -> list[int]:
        """The prompt's token ids: rules, then the conversation, then the header of the answer to come.

        A system message adds to the rules. Earlier answers are shown as answers, without their steps.
        """
        system = _NAME + _RULES[frozenset(t for t in TOOLS if t in set(tools))]
        system += "".join("\n" + m["content"] for m in messages if m["role"] in ("system", "developer"))
        ids = self._message("system", system)
        for message in messages:
            if message["role"] == "user":
                ids += self._message("user", message["content"])
            elif message["role"] == "assistant":
                ids += self._message("assistant", f"<answer>{message['content']}</answer>")
        return [*ids, self._start, *self._encode("assistant\n")]

    def stops(self, last: bool = False) -> tuple[str, ...]:
        """The strings that end a generation; in the last one of an answer, tools are off."""
        return ("</answer>",) if last else ("</code>", "</search>", "</answer>")

    def parser(self) -> Parser:
        return Parser(self.tokenizer)

    def encode_step(self, thought: str, action: ActionKind, text: str) -> list[int]:
        """The ids of a well-formed step, for demonstrations. Parsing them gives the same three back."""
        return self._encode(f"<think>{thought}</think>\n<{action}>{text}</{action}>")

    def encode_observation(self, text: str, max_tokens: int, last: bool = False) -> list[int]:
        """A tool's result as ids, its text cut to `max_tokens` tokens."""
        ids = self._encode(harmless(text))
        if len(ids) > max_tokens:
            text = self.tokenizer.decode(ids[:max_tokens]).rstrip("\ufffd") + " [cut]"
        note = "\n" + LAST if last else ""
        return self._encode(f"\n<response>{harmless(text)}{note}</response>\n")

    def _message(self, role: str, content: str) -> list[int]:
        return [self._start, *self._encode(f"{role}\n{content}"), self._end, *self._encode("\n")]

    def _encode(self, text: str) -> list[int]:
        # Special tokens written in a text are text: splitting them keeps a user or a web page from forging a turn.
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        return ids


def harmless(text: str) -> str:
    """`text` with the dialect's tags and special-token brackets turned into look-alikes that mean nothing."""
    return _TAG.sub("\u2039", text)


class Parser:
    """Reads one generation as its tokens come. Feed it ids; it gives the thinking and the answer as they grow."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._shown = {"think": 0, "answer": 0}

    @property
    def text(self) -> str:
        decoded: str = self._tokenizer.decode(self._ids, skip_special_tokens=False)
        return decoded

    @property
    def answering(self) -> bool:
        """Whether part of an answer has been shown."""
        return self._shown["answer"] > 0

    def feed(self, token_ids: Sequence[int]) -> list[Thinking | AnswerText]:
        self._ids += token_ids
        text = self.text.rstrip("\ufffd")  # the rest of a character is still to come
        events: list[Thinking | AnswerText] = []
        if grown := self._grown("think", _THOUGHT.search(text), text):
            events.append(Thinking(grown))
        action = _ACTION.search(text)
        if action and action[1] == "answer" and (grown := self._grown("answer", action, text, group=2)):
            events.append(AnswerText(grown))
        return events

    def _grown(self, tag: str, match: re.Match[str] | None, text: str, group: int = 1) -> str:
        if match is None:
            return ""
        content = match[group]
        if match.end(group) == len(text) and (bracket := content.rfind("<", -_LONGEST_TAG)) >= 0:
            content = content[:bracket]  # perhaps the closing tag: wait
        grown = content[self._shown[tag] :]
        self._shown[tag] += len(grown)
        return grown

    def finish(self, stopped: bool) -> Parsed:
        """`stopped`: whether generation ended with a closing tag. A step without a closed action is invalid."""
        text = self.text
        thought = _THOUGHT.search(text)
        action = _ACTION.search(text)
        whole = _STEP.fullmatch(text)
        closed = action is not None and text[action.start() :].find(f"</{action[1]}>") >= 0
        if not stopped or action is None or not closed:
            return Parsed(text, thought[1] if thought else "", "invalid", "", False)
        well_formed = whole is not None and bool(whole["thought"].strip()) and bool(whole["input"].strip())
        kind: ActionKind = action[1]  # type: ignore[assignment]
        return Parsed(text, thought[1] if thought else "", kind, action[2], well_formed)
