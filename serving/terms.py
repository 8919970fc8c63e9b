"""What a client asks of one answer beyond its sampling: where it stops, what shape it has, what tools of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from serving.json_schema import moved
from tools.arguments import ToolSchema

ANY_OBJECT: Mapping[str, Any] = {"type": "object"}


@dataclass(frozen=True)
class Terms:
    """`stop`: the answer's text ends before one of these. `top_logprobs`: None, or how many alternatives to tell with
    each token of the answer. `schema`: what the answer is JSON of. `tools`: the client's own, which end the answer when
    they are called; `must_call` are the names of those of which one must be. `own_tokens`: that the policy may write,
    in all generations of the answer; None for as many as the agent lets it."""

    stop: tuple[str, ...] = ()
    top_logprobs: int | None = None
    schema: Mapping[str, Any] | None = None
    tools: tuple[ToolSchema, ...] = ()
    must_call: tuple[str, ...] = ()
    own_tokens: int | None = None

    def until_stop(self, text: str) -> str:
        stop = StopText(self.stop)
        return stop.feed(text) + stop.rest()

    def tool(self, name: str) -> ToolSchema | None:
        return next((tool for tool in self.tools if tool.name == name), None)

    @property
    def forced(self) -> tuple[Literal["answer", "call"], Mapping[str, Any]] | None:
        """The action whose text a grammar makes, and the JSON schema of that text; None where the policy is free."""
        if self.must_call:
            tools = [tool for tool in self.tools if tool.name in self.must_call]
            if len(tools) == 1:
                return "call", _call(tools[0], "#")
            return "call", {"anyOf": [_call(tool, f"#/anyOf/{index}") for index, tool in enumerate(tools)]}
        return None if self.schema is None else ("answer", self.schema)


def _call(tool: ToolSchema, at: str) -> dict[str, Any]:
    """The schema of a call of the tool; `at` is where it will stand."""
    arguments = moved(tool.parameters, f"{at}/properties/arguments")
    return {
        "type": "object",
        "properties": {"name": {"const": tool.name}, "arguments": arguments},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


class StopText:
    """Text on its way to a client, which ends before a stop string. What may begin one is held back."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = stops
        self._held = ""
        self.hit = False

    def feed(self, text: str) -> str:
        """What of the text so far can be shown now; after a hit, nothing more."""
        if self.hit:
            return ""
        text = self._held + text
        first = min((at for at in map(text.find, self._stops) if at >= 0), default=None)
        if first is not None:
            self.hit, self._held = True, ""
            return text[:first]
        held = max(self._beginnings(text), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def rest(self) -> str:
        """What was held back, once no more text comes."""
        held, self._held = self._held, ""
        return held

    def _beginnings(self, text: str) -> Iterator[int]:
        """The lengths at which the text's end is a stop string's beginning."""
        for stop in self._stops:
            for length in range(1, min(len(stop), len(text) + 1)):
                if text.endswith(stop[:length]):
                    yield length
