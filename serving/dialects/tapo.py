"""The `tapo` dialect: the tags of the TAPO paper (arXiv 2510.07038), on the model's own chat markup.

A generation is `<think>…</think>` and then one action: `<code>`, `<search>` or `<answer>`, or `<call>` with the JSON of
any further tool's call. What a tool returned comes back as `<response>…</response>`, in tokens that no text can turn
into markup: added tokens are never read from text, and the dialect's own tags are made harmless in it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from serving.dialects.base import LAST, MalformedCall, Parsed, cut_to_tokens, read_call, write_call
from serving.dialects.plain import PlainEncoder
from serving.trajectory import ActionKind, AnswerText, Thinking
from tools.arguments import ToolSchema

_USES = {
    "code": "To calculate, write Python that prints the result in <code></code>.",
    "search": "To look up a fact, write a query in <search></search>.",
}
_CALL = 'To use another tool, write {"name": "...", "arguments": {...}} in <call></call>.'
_TAGS = "think|code|search|call|response|answer"
_TAG = re.compile(rf"<(?=\s*/?\s*(?:{_TAGS})\b|\|)", re.IGNORECASE)
_ACTION = re.compile(r"<(code|search|call|answer)>(.*?)(?:</\1>|\Z)", re.DOTALL)
_THOUGHT = re.compile(r"<think>(.*?)(?:</think>|\Z)", re.DOTALL)
_STEP = re.compile(
    rf"\s*<think>(?P<thought>(?:(?!</?(?:{_TAGS})>).)*)</think>"
    rf"\s*<(?P<action>code|search|call|answer)>(?P<input>(?:(?!</?(?:{_TAGS})>).)*)</(?P=action)>\s*",
    re.DOTALL,
)
_MARKUP = re.compile(rf"</?(?:{_TAGS})>|<\|[^|>]*\|>")
_LONGEST_TAG = len("</response>")
_LONGEST_DESCRIPTION = 300  # characters of a tool's, in the prompt of each answer

INVALID = "Invalid action. Think, then write one code, search or answer block."


def rules(uses: Sequence[str]) -> str:
    """What the policy is told it can do, with the sentences of the actions that are on."""
    result = ["The result comes in <response></response>."] if uses else []
    return " ".join(["Think in <think></think>.", *uses, *result, "Finish with <answer></answer>."])


# What the policy reads where only the dialect's own two tools are on.
_RULES = {
    frozenset(names): rules([_USES[name] for name in names])
    for names in (("code", "search"), ("code",), ("search",), ())
}
_NAME = "You are Whetstone, a helpful assistant. "


class TapoDialect:
    """Works with any tokenizer that has the ChatML tokens `<|im_start|>` and `<|im_end|>`."""

    name = "tapo"

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._start, self._end = (tokenizer.convert_tokens_to_ids(t) for t in ("<|im_start|>", "<|im_end|>"))
        if self._start is None or self._end is None or self._start == self._end:
            raise ValueError("The tapo dialect needs a tokenizer with <|im_start|> and <|im_end|>.")
        self._encode = PlainEncoder(tokenizer)  # the dialect's own tags are plain text as well

    def render(self, messages: Sequence[dict[str, Any]], tools: Iterable[ToolSchema | str] = tuple(_USES)) -> list[int]:
        """The prompt's token ids: rules, then the conversation, then the header of the answer to come.

        A system message adds to the rules. Earlier answers are shown as answers, without their steps. Calls of the
        client's tools stand in the answer that they belong to, which goes on behind their results. "code" and
        "search" need no schema; any further tool is listed with its own.
        """
        tools = list(tools)
        names = {tool if isinstance(tool, str) else tool.name for tool in tools}
        further = [tool for tool in tools if isinstance(tool, ToolSchema) and tool.name not in _USES]
        if further:
            system = _NAME + rules([*(use for name, use in _USES.items() if name in names), _CALL])
            system += "".join("\n" + harmless(_listed(tool)) for tool in further)
        else:
            system = _NAME + _RULES[frozenset(names & _USES.keys())]
        system += "".join("\n" + m["content"] for m in messages if m["role"] in ("system", "developer"))
        ids = self._message("system", system)
        calls: dict[str, Any] = {}  # of the client's tools; their results continue the assistant's message
        is_open = False
        for message in messages:
            role, content = message["role"], message["content"]
            if role == "tool":
                ids += self._called(calls[message["tool_call_id"]]) + self.encode_observation(content)
            elif role == "assistant" and message.get("tool_calls"):
                calls = {call["id"]: call["function"] for call in message["tool_calls"]}
                if not is_open:
                    ids += [self._start, *self._encode("assistant\n")]
                is_open = True
                ids += self._encode(f"<think>{harmless(content)}</think>\n") if content.strip() else []
            elif role == "assistant" and is_open:
                ids += [*self._encode(f"<answer>{content}</answer>"), self._end, *self._encode("\n")]
                is_open = False
            elif role == "assistant":
                ids += self._message("assistant", f"<answer>{content}</answer>")
            elif role == "user":
                ids += [self._end, *self._encode("\n")] if is_open else []
                is_open = False
                ids += self._message("user", content)
        return ids if is_open else [*ids, self._start, *self._encode("assistant\n")]

    def at_least(self, messages: Sequence[dict[str, Any]]) -> int:
        return sum(self._encode.at_least(m["content"]) for m in messages if m["role"] != "assistant")

    def stops(self, last: bool = False) -> tuple[str, ...]:
        return ("</answer>",) if last else ("</code>", "</search>", "</call>", "</answer>")

    def parser(self) -> Parser:
        return Parser(self.tokenizer)

    def around(self, action: Literal["answer", "call"]) -> tuple[str, str]:
        return f"<{action}>", f"</{action}>"

    def encode_markup(self, text: str) -> list[int]:
        return self._encode(text)

    def encode_step(self, thought: str, action: ActionKind, text: str) -> list[int]:
        """`text` of a "call" is its JSON, as `write_call` makes it: a tag in it would end it early."""
        return self._encode(f"<think>{thought}</think>\n<{action}>{text}</{action}>")

    def fit(self, text: str, max_tokens: int) -> str:
        return cut_to_tokens(text, max_tokens, self.tokenizer, lambda part: self._encode(harmless(part)))

    def encode_observation(self, text: str, *, last: bool = False, after: Sequence[int] = ()) -> list[int]:
        note = "\n" + LAST if last else ""
        return self._encode(f"\n<response>{harmless(text)}{note}</response>\n")

    def invalid(self, tools: Sequence[ToolSchema]) -> str:
        return INVALID if all(tool.name in _USES for tool in tools) else INVALID.replace("search or", "search, call or")

    def bare(self, text: str) -> str:
        return _MARKUP.sub(" ", text).strip()

    def _called(self, function: dict[str, Any]) -> list[int]:
        return self._encode(f"<call>{write_call(function['name'], json.loads(function['arguments']))}</call>")

    def _message(self, role: str, content: str) -> list[int]:
        return [self._start, *self._encode(f"{role}\n{content}"), self._end, *self._encode("\n")]


def harmless(text: str) -> str:
    """`text` with the dialect's tags and special-token brackets turned into look-alikes that mean nothing."""
    return _TAG.sub("\u2039", text)


def _listed(tool: ToolSchema) -> str:
    """A line of JSON. Empty parts are left out: every token of it is read for every answer."""
    description = " ".join(tool.description.split())
    if len(description) > _LONGEST_DESCRIPTION:
        description = description[: _LONGEST_DESCRIPTION - 4] + " ..."
    shown = {"name": tool.name, "description": description, "arguments": tool.parameters.get("properties", {})}
    if defined := tool.parameters.get("$defs"):
        shown["$defs"] = defined
    if required := tool.parameters.get("required"):
        shown["required"] = required
    return json.dumps({key: value for key, value in shown.items() if value}, ensure_ascii=False, separators=(",", ":"))


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
        return self._shown["answer"] > 0

    @property
    def answer_start(self) -> int | None:
        action = _ACTION.search(self.text)
        return action.start(2) if action and action[1] == "answer" else None

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

    def finish(self, stopped: bool, ended: bool = False) -> Parsed:
        """A step without a closed action is invalid, whatever else it says."""
        text = self.text
        thought = match[1] if (match := _THOUGHT.search(text)) else ""
        action = _ACTION.search(text)
        whole = _STEP.fullmatch(text)
        closed = action is not None and text[action.start() :].find(f"</{action[1]}>") >= 0
        if not stopped or action is None or not closed:
            return Parsed(text, thought, "invalid", "", False)
        well_formed = whole is not None and bool(whole["thought"].strip()) and bool(whole["input"].strip())
        kind: ActionKind = action[1]  # type: ignore[assignment]
        if kind == "answer":
            return Parsed(text, thought, kind, action[2], well_formed)
        if kind != "call":
            return Parsed(text, thought, kind, action[2], well_formed, kind, action[2].strip())
        try:
            call = read_call(action[2])
        except MalformedCall as error:
            return Parsed(text, thought, "invalid", "", False, problem=str(error))
        return Parsed(text, thought, kind, action[2], well_formed, call.tool, call.input)
