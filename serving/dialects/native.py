"""The `native` dialect: the model's own chat template, with calls in the Hermes form that Qwen and others write.

A generation may think in `<think>…</think>`, and is then either a text, which is the answer, or a
`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`. "code" and "search" are functions like any other.

What keeps texts from becoming markup: the template is filled with placeholders, never with a text of a conversation.
Then its own special tokens become control tokens, and everything between two of them is encoded as one plain text, so
that a benign prompt has just the ids that the template would give, and no content ever holds a control token.
What a tool returned has the dialect's tags made harmless besides.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from serving.dialects.base import BARE, LAST, MalformedCall, Parsed, cut_to_tokens, read_call, write_call
from serving.dialects.plain import PlainEncoder
from serving.trajectory import ActionKind, AnswerText, Thinking
from tools.arguments import ToolSchema

# For a model whose template knows no tools, on ChatML tokens: the Hermes form, as Qwen2.5's template has it.
CHATML = """\
{%- if tools or messages[0].role == 'system' -%}
<|im_start|>system
{% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}
{%- if tools %}

# Tools

Call a function to help with the question when you need one. These are the functions:
<tools>
{%- for tool in tools %}
{{ tool | tojson }}
{%- endfor %}
</tools>

To call one, write its name and arguments as JSON:
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call>
{%- endif %}<|im_end|>
{% endif %}
{%- for message in messages %}
{%- if message.role == 'tool' -%}
<|im_start|>user
<tool_response>
{{ message.content }}
</tool_response><|im_end|>
{% elif message.role == 'assistant' and message.tool_calls -%}
<|im_start|>assistant
{{ message.content }}
{%- for call in message.tool_calls %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>
{%- endfor %}<|im_end|>
{% elif message.role != 'system' -%}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endif %}
{%- endfor %}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif %}"""

_SYSTEM = "You are Whetstone, a helpful assistant."
_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_TAG = re.compile(r"<(?=\s*/?\s*(?:think|tool_call|tool_response|tools)\b|\|)", re.IGNORECASE)
_THOUGHT = re.compile(r"\s*<think>(.*?)(</think>|\Z)", re.DOTALL)
_MARKUP = re.compile(r"</?(?:think|tool_call|tool_response|tools)>|<\|[^|>]*\|>")
_LONGEST_TAG = max(len(_CLOSE), len("</think>"))
_PLACE = "\ue000{}\ue001"  # private use: what stands for a content in the template
_PLACES = re.compile("\ue000([0-9]+)\ue001")
# Text before a call is thought, text without one is the answer. Which of them it is shows late: so much is held back.
_HELD_BACK = 160  # characters


class NativeDialect:
    """Works with a tokenizer of byte-level BPE whose template writes `<tool_call>`, or that has ChatML tokens."""

    name = "native"

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._template = _template(tokenizer)
        self._plain = PlainEncoder(tokenizer)
        self._added, self._control = self._plain.added, self._plain.control
        if str(tokenizer.decode([*self._plain("a\n"), *self._plain("b")])) != "a\nb":
            raise ValueError(
                "The native dialect joins pieces of text, and this model's tokenizer changes them when it encodes "
                "them apart (only byte-level BPE doesn't). Use dialect = tapo."
            )
        self._before, self._after = self._around_a_result()
        end = self._control.search(self._before)
        self._end = end[0] if end else ""
        header = self._filled([{"role": "user", "content": ""}], []).rpartition(_PLACE.format(0))[2]
        begun = re.search(r"<think>\s*\Z", header)  # some templates begin the thought
        self._begun = begun[0] if begun else ""

    def render(self, messages: Sequence[dict[str, Any]], tools: Iterable[ToolSchema] = ()) -> list[int]:
        """Earlier answers are shown as answers, without their steps; system messages follow the product's own line."""
        system = "\n".join([_SYSTEM, *(m["content"] for m in messages if m["role"] in ("system", "developer"))])
        turns = [{"role": "system", "content": system}]
        turns += [self._turn(m) for m in messages if m["role"] in ("user", "assistant", "tool")]
        filled = self._filled(turns, list(tools))
        pieces: list[tuple[str, bool]] = []
        for index, part in enumerate(_PLACES.split(filled)):
            pieces.append((turns[int(part)]["content"], False) if index % 2 else (part, True))
        return self._encode(pieces)

    def at_least(self, messages: Sequence[dict[str, Any]]) -> int:
        return sum(self._plain.at_least(m["content"]) for m in messages if m["role"] != "assistant")

    def stops(self, last: bool = False) -> tuple[str, ...]:
        return () if last else (_CLOSE,)

    def parser(self) -> Parser:
        return Parser(self.tokenizer, self._end, self._begun)

    def around(self, action: Literal["answer", "call"]) -> tuple[str, str]:
        return ("", self._end) if action == "answer" else (_OPEN + "\n", "\n" + _CLOSE)

    def encode_markup(self, text: str) -> list[int]:
        return self._encode([(text, True)])

    def fit(self, text: str, max_tokens: int) -> str:
        return cut_to_tokens(text, max_tokens, self.tokenizer, lambda part: self._plain(harmless(part)))

    def encode_observation(self, text: str, *, last: bool = False, after: Sequence[int] = ()) -> list[int]:
        before = self._before
        if self._end and list(after[-1:]) == [self._added[self._end]]:
            before = before.partition(self._end)[2]  # the policy ended its turn itself
        note = "\n" + LAST if last else ""
        return self._encode([(before, True), (harmless(text) + note, False), (self._after, True)])

    def encode_step(self, thought: str, action: ActionKind, text: str) -> list[int]:
        """`text` of a "call" is its JSON, as `write_call` makes it. An answer ends with the end of the turn."""
        pieces: list[tuple[str, bool]] = []
        if thought:
            pieces = [("" if self._begun else "<think>\n", True), (thought, False), ("\n</think>\n\n", True)]
        elif self._begun:
            pieces = [("\n</think>\n\n", True)]
        if action == "answer":
            return self._encode([*pieces, (text, False), (self._end, True)])
        call = text if action == "call" else write_call(action, {BARE[action]: text})
        return self._encode([*pieces, (_OPEN + "\n", True), (call, False), ("\n" + _CLOSE, True)])

    def invalid(self, tools: Sequence[ToolSchema]) -> str:
        can = f"Call one function in {_OPEN}{_CLOSE}, or write the answer." if tools else "Write the answer."
        return f"Invalid action. {harmless(can)}"

    def bare(self, text: str) -> str:
        return _MARKUP.sub(" ", _THOUGHT.sub("", self._begun + text, count=1) or text).strip()

    def _filled(self, turns: Sequence[dict[str, Any]], tools: Sequence[ToolSchema]) -> str:
        """The template's text, with a placeholder for the content of each turn."""
        places = [
            # Templates ask whether something was said before a call; a placeholder would be something.
            turn if turn.get("tool_calls") and not turn["content"] else turn | {"content": _PLACE.format(index)}
            for index, turn in enumerate(turns)
        ]
        functions = [self._harmless(tool.as_function()) for tool in tools]
        return str(
            self.tokenizer.apply_chat_template(
                places,
                tools=functions or None,
                chat_template=self._template,
                add_generation_prompt=True,
                tokenize=False,
            )
        )

    def _turn(self, message: dict[str, Any]) -> dict[str, Any]:
        """A message as templates take it. Calls and results may hold what others wrote, so no tag of the dialect's."""
        if message["role"] == "tool":
            return {"role": "tool", "content": harmless(message["content"])}
        turn = {"role": message["role"], "content": message["content"]}
        if calls := message.get("tool_calls"):
            functions = [call["function"] for call in calls]
            turn["tool_calls"] = [
                {
                    "type": "function",
                    "function": {"name": f["name"], "arguments": self._harmless(json.loads(f["arguments"]))},
                }
                for f in functions
            ]
        return turn

    def _around_a_result(self) -> tuple[str, str]:
        """What the template writes between a call and its result, and between the result and what comes next."""
        call = {"type": "function", "function": {"name": "f", "arguments": {}}}
        turns: list[dict[str, Any]] = [
            {"role": "user", "content": ""},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "name": "f", "content": ""},
        ]
        _, called, tail = self._filled(turns, []).rpartition(_CLOSE)
        before, found, after = tail.partition(_PLACE.format(2))
        if not (called and found):
            raise ValueError("This model's chat template doesn't show what a tool returned. Use dialect = tapo.")
        return before, after

    def _harmless(self, value: Any) -> Any:
        """A schema is written by whoever wrote the tool: its texts hold no tag, control token or placeholder."""
        if isinstance(value, dict):
            return {self._harmless(key): self._harmless(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._harmless(item) for item in value]
        if not isinstance(value, str):
            return value
        return self._control.sub(lambda token: "\u2039" + token[0][1:], harmless(_PLACES.sub("", value)))

    def _encode(self, pieces: Iterable[tuple[str, bool]]) -> list[int]:
        """Ids of texts of which only the template's own (True) may hold control tokens."""
        ids: list[int] = []
        run = ""
        for text, is_markup in pieces:
            if not is_markup:
                run += text
                continue
            at = 0
            for match in self._control.finditer(text):
                ids += self._plain(run + text[at : match.start()])
                ids.append(self._added[match[0]])
                run, at = "", match.end()
            run += text[at:]
        return ids + self._plain(run)


def _template(tokenizer: Any) -> str:
    """The model's own template where it writes calls as we read them, else ours. Raises ValueError."""
    own = tokenizer.chat_template
    if isinstance(own, dict):  # several, by purpose
        own = own.get("tool_use") or own.get("default")
    if isinstance(own, str) and "tools" in own and _OPEN in own:
        return own
    start, end, unknown = (tokenizer.convert_tokens_to_ids(t) for t in ("<|im_start|>", "<|im_end|>", "\ue000"))
    if None in (start, end) or start == end or unknown in (start, end):
        raise ValueError(
            f"The native dialect reads calls in {_OPEN}; this model's chat template writes none, and its tokenizer has "
            "no <|im_start|> and <|im_end|>. Use dialect = tapo with a ChatML model."
        )
    return CHATML


def harmless(text: str) -> str:
    """`text` with the dialect's tags and special-token brackets turned into look-alikes that mean nothing."""
    return _TAG.sub("\u2039", text)


class Parser:
    """`end`: the text of the end-of-turn token. `begun`: what the template has begun the generation with."""

    def __init__(self, tokenizer: Any, end: str, begun: str = "") -> None:
        self._tokenizer = tokenizer
        self._end = end
        self._begun = begun
        self._ids: list[int] = []
        self._thought_shown = 0
        self._answer_shown = 0

    @property
    def answering(self) -> bool:
        rest = _split(self._said())[1]
        return bool(rest and rest.strip()) and _OPEN not in (rest or "")

    @property
    def answer_start(self) -> int | None:
        said = self._said()
        answer = (_split(said)[1] or "").lstrip()
        if not answer or _OPEN in answer or _OPEN.startswith(answer):
            return None
        return len(said) - len(answer) - len(self._begun)

    def feed(self, token_ids: Sequence[int]) -> list[Thinking | AnswerText]:
        self._ids += token_ids
        text = self._said().rstrip("\ufffd")  # the rest of a character is still to come
        events: list[Thinking | AnswerText] = []
        thought, rest = _split(text)
        if thought is not None:
            shown = thought if rest is not None else _without_half_a_tag(thought)
            if grown := shown[self._thought_shown :]:
                self._thought_shown += len(grown)
                events.append(Thinking(grown))
        if rest is not None and _OPEN not in rest:
            answer = _without_half_a_tag(rest.lstrip())
            # White space at the end may be the last there is: it is shown with what follows it.
            grown = answer.rstrip()[self._answer_shown :]
            if grown and (self._answer_shown or len(answer) > _HELD_BACK):
                self._answer_shown += len(grown)
                events.append(AnswerText(grown))
        return events

    def finish(self, stopped: bool, ended: bool = False) -> Parsed:
        """A closed call is one, whatever was said before it; a text that the policy ended is an answer."""
        said = self._said()
        text = said.removeprefix(self._begun)
        thought, rest = _split(said)
        if thought is None and rest is None:
            rest = said
        thought, rest = (thought or "").removeprefix("\n").removesuffix("\n"), rest or ""
        before, opened, inside = rest.partition(_OPEN)
        if opened:
            return _parsed_call(text, thought, before, inside, stopped)
        answer = rest.strip()
        unshown = answer[self._answer_shown :]
        if not ended or not answer:
            return Parsed(text, thought, "invalid", "", False, unshown=unshown)
        return Parsed(text, thought, "answer", answer, _MARKUP.search(thought + answer) is None, unshown=unshown)

    def _said(self) -> str:
        """The generation's text, from where the template begins it, to the end of the turn."""
        decoded = self._begun + str(self._tokenizer.decode(self._ids, skip_special_tokens=False))
        return decoded.partition(self._end)[0] if self._end else decoded


def _parsed_call(text: str, thought: str, before: str, inside: str, stopped: bool) -> Parsed:
    written, closed, behind = inside.partition(_CLOSE)
    spoken = "\n".join(part for part in (thought, before.strip()) if part)
    if not (stopped and closed):
        return Parsed(text, spoken, "invalid", "", False)
    try:
        call = read_call(written)
    except MalformedCall as error:
        return Parsed(text, spoken, "invalid", "", False, problem=str(error))
    well_formed = not behind.strip() and _MARKUP.search(spoken + written) is None
    if call.tool not in BARE:
        return Parsed(text, spoken, "call", written.strip(), well_formed, call.tool, call.input)
    kind: ActionKind = "code" if call.tool == "code" else "search"
    return Parsed(text, spoken, kind, call.input, well_formed, call.tool, call.input)


def _split(text: str) -> tuple[str | None, str | None]:
    """(thought, rest): no thought where none was begun, no rest while it goes on or could still begin."""
    match = _THOUGHT.match(text)
    if match is not None:
        return match[1], text[match.end() :] if match[2] else None
    if "<think>".startswith(text.lstrip()):
        return None, None  # perhaps the opening tag: wait
    return None, text


def _without_half_a_tag(text: str) -> str:
    bracket = text.rfind("<", max(len(text) - _LONGEST_TAG, 0))
    return text if bracket < 0 else text[:bracket]
