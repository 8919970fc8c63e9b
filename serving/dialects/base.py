"""The seam between the agent and the way in which a policy writes its actions: a new dialect is one file."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from serving.trajectory import ActionKind, AnswerText, Thinking
from tools.arguments import TOOL_NAME, ToolSchema

LAST = "No more tools. Give the answer now."
_CUT = " [cut]"
# Tools whose input is one text, which is shown, recorded and replayed as it is: the name of its argument.
BARE = {"code": "code", "search": "query"}


@dataclass(frozen=True)
class Parsed:
    """What a finished generation says.

    `input` is exactly what stood in the action. `tool` and `tool_input` are what to run for it: a bare text for
    "code" and "search", else the arguments as JSON. `problem` tells the policy what is wrong with an invalid one;
    `unshown` is the part of the answer that no event has given yet.
    """

    text: str
    thought: str
    action: ActionKind
    input: str
    well_formed: bool
    tool: str = ""
    tool_input: str = ""
    problem: str = ""
    unshown: str = ""


class Parser(Protocol):
    """Reads one generation as its tokens come."""

    @property
    def answering(self) -> bool:
        """Whether part of an answer has been shown."""
        ...

    @property
    def answer_start(self) -> int | None:
        """Where in the generation's text the answer begins, once it can be told."""
        ...

    def feed(self, token_ids: Sequence[int]) -> list[Thinking | AnswerText]:
        """The thinking and the answer, as they grow."""
        ...

    def finish(self, stopped: bool, ended: bool = False) -> Parsed:
        """`stopped`: a stop string ended the generation. `ended`: the policy's end-of-turn token did."""
        ...


class Dialect(Protocol):
    """Rendering then parsing a step is the identity. No text can become markup: not a user's, not a tool's."""

    name: str
    tokenizer: Any

    def render(self, messages: Sequence[dict[str, Any]], tools: Sequence[ToolSchema]) -> list[int]:
        """The prompt's token ids, up to where the policy goes on. What follows is only ever appended to them.

        Messages in OpenAI's shape, with calls of the client's tools and what these returned.
        """
        ...

    def at_least(self, messages: Sequence[dict[str, Any]]) -> int:
        """How many tokens these messages take in a prompt at the very least, told without encoding them."""
        ...

    def stops(self, last: bool = False) -> tuple[str, ...]:
        """The strings that end a generation; in the last one of an answer, tools are off."""
        ...

    def parser(self) -> Parser: ...

    def around(self, action: Literal["answer", "call"]) -> tuple[str, str]:
        """The markup that opens an action and that closes it; a call's JSON stands between them."""
        ...

    def encode_markup(self, text: str) -> list[int]:
        """The ids of the dialect's own markup: of no text that comes from elsewhere."""
        ...

    def fit(self, text: str, max_tokens: int) -> str:
        """`text`, or the beginning of it that has `max_tokens` tokens, and a mark. What fits once, fits again."""
        ...

    def encode_observation(self, text: str, *, last: bool = False, after: Sequence[int] = ()) -> list[int]:
        """A tool's result as ids, up to where the policy goes on. `after`: the ids of the step so far."""
        ...

    def encode_step(self, thought: str, action: ActionKind, text: str) -> list[int]:
        """The ids of a well-formed step, for demonstrations. Parsing them gives the same three back."""
        ...

    def invalid(self, tools: Sequence[ToolSchema]) -> str:
        """What a policy is told that wrote no action."""
        ...

    def bare(self, text: str) -> str:
        """What an unfinished generation said, without its markup: better than nothing for the reader."""
        ...


def cut_to_tokens(text: str, max_tokens: int, tokenizer: Any, encode: Callable[[str], list[int]]) -> str:
    """What `Dialect.fit` promises, with the dialect's way to encode a tool's text."""
    ids = encode(text.removesuffix(_CUT))
    if len(ids) <= max_tokens:
        return text
    kept = max_tokens
    while True:
        beginning = str(tokenizer.decode(ids[:kept])).rstrip("\ufffd")
        if kept <= 0 or len(encode(beginning)) <= max_tokens:  # a text may take more tokens than those it came from
            return beginning + _CUT
        kept -= 1


@dataclass(frozen=True)
class Call:
    """A tool and its arguments, read from a policy's JSON."""

    tool: str
    arguments: Mapping[str, Any]

    @property
    def input(self) -> str:
        """The bare text where the tool takes one, else the arguments as JSON, keys sorted: same call, same text."""
        if self.tool in BARE:
            return as_utf8(self.arguments[BARE[self.tool]])
        return as_utf8(json.dumps(dict(self.arguments), ensure_ascii=False, sort_keys=True))


class MalformedCall(ValueError):
    """The message tells the policy, in a line, what is wrong."""


def read_call(text: str) -> Call:
    """The call that `{"name": ..., "arguments": {...}}` says. Raises MalformedCall."""
    try:
        found = json.loads(text, parse_constant=_no_constant)
        if isinstance(found, dict) and isinstance(found.get("arguments"), str):
            found["arguments"] = json.loads(found["arguments"], parse_constant=_no_constant)  # as OpenAI's wire has it
    except (ValueError, RecursionError) as error:
        raise _malformed(str(error) if isinstance(error, ValueError) else "it is nested too deeply") from error
    if not isinstance(found, dict) or not isinstance(name := found.get("name"), str) or not TOOL_NAME.fullmatch(name):
        raise _malformed('"name" must be the name of a tool')
    arguments = found.get("arguments")
    if arguments is not None and not isinstance(arguments, dict):
        raise _malformed('"arguments" must be an object')
    if extra := found.keys() - {"name", "arguments"}:
        raise _malformed(f"{as_utf8(min(extra))[:40]!r} doesn't belong there")
    arguments = arguments or {}
    if (argument := BARE.get(name)) and not (arguments.keys() == {argument} and isinstance(arguments[argument], str)):
        raise MalformedCall(f'Wrong arguments for {name}: it takes {{"{argument}": "a text"}}.')
    return Call(name, arguments)


def write_call(name: str, arguments: Mapping[str, Any]) -> str:
    """The JSON of a call, in which no tag can stand: `<` is written as its escape where one could begin."""
    text = json.dumps({"name": name, "arguments": dict(arguments)}, ensure_ascii=False)
    return re.sub(r"<(?=[/|\w])", r"\\u003c", text)


def read_input(tool: str, text: str) -> str | dict[str, Any]:
    """What `Call.input` wrote, as a toolbox takes it. Raises MalformedCall."""
    if tool in BARE:
        return text
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _malformed(str(error)) from error
    if not isinstance(found, dict):
        raise _malformed('"arguments" must be an object')
    return found


def as_utf8(text: str) -> str:
    """JSON can spell what no encoding can write: lone surrogates, and NUL, which not every database keeps."""
    return text.replace("\x00", "").encode("utf-8", "replace").decode("utf-8")


def _malformed(why: str) -> MalformedCall:
    return MalformedCall(f'Malformed call: {why[:120]}. A call is {{"name": "...", "arguments": {{...}}}}.')


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} isn't JSON")
