"""The events of a streamed response, typed, numbered and in the order in which OpenAI sends them.

`response.created`, `response.in_progress`, an item with its parts and deltas, then `response.completed`, `.incomplete`
or `.failed`. Thinking and the server's own tools come between them as events whose type begins with `whetstone.`: they
belong to no item, and clients that don't know them pass them by.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from openai import BaseModel
from openai.types import responses as types

from app.api import wire as chat
from app.api.errors import ApiError
from app.api.responses import wire
from app.service import Finished, ServiceEvent, Started
from serving.trajectory import AnswerText, ClientCall, StepDone, Thinking, ToolCall, ToolResult

Sent = tuple[str, str]  # an event's type, and its JSON

_TYPES: dict[str, type[BaseModel]] = {
    "response.created": types.ResponseCreatedEvent,
    "response.in_progress": types.ResponseInProgressEvent,
    "response.completed": types.ResponseCompletedEvent,
    "response.incomplete": types.ResponseIncompleteEvent,
    "response.failed": types.ResponseFailedEvent,
    "response.output_item.added": types.ResponseOutputItemAddedEvent,
    "response.output_item.done": types.ResponseOutputItemDoneEvent,
    "response.content_part.added": types.ResponseContentPartAddedEvent,
    "response.content_part.done": types.ResponseContentPartDoneEvent,
    "response.output_text.delta": types.ResponseTextDeltaEvent,
    "response.output_text.done": types.ResponseTextDoneEvent,
    "response.output_text.annotation.added": types.ResponseOutputTextAnnotationAddedEvent,
    "response.function_call_arguments.delta": types.ResponseFunctionCallArgumentsDeltaEvent,
    "response.function_call_arguments.done": types.ResponseFunctionCallArgumentsDoneEvent,
}


class Events:
    """Of one response: `first`, then `event` for each of the service's, then `last` or `failed`."""

    def __init__(self, started: Started, echo: Mapping[str, Any], created_at: float) -> None:
        self._started = started
        self._echo = echo
        self._created_at = created_at
        self._number = 0
        self._items = 0
        self._step = 0  # the number of the step that is being written
        self._writing: int | None = None  # the step whose text the open message has
        self._text = ""  # of that message
        self._space = ""  # at its end, so far: an answer has none there
        self._call: ClientCall | None = None

    def first(self) -> list[Sent]:
        told = wire.begun(self._started, self._created_at)
        return [self._response("response.created", told), self._response("response.in_progress", told)]

    def event(self, event: ServiceEvent) -> list[Sent]:
        match event:
            case AnswerText(text):
                return self._grow(text)
            case ClientCall():
                return self._called(event)
            case Thinking(text):
                return [self._tell("whetstone.thinking.delta", delta=text)]
            case ToolCall(tool, text):
                return [self._tell("whetstone.tool_call", tool=tool, input=text)]
            case ToolResult(observation):
                return [self._tell("whetstone.tool_result", **asdict(observation))]
            case StepDone(step):
                self._step += 1
                return [self._tell("whetstone.step", index=step.index, action=step.action)]
        return []

    def last(self, finished: Finished, completed_at: float) -> list[Sent]:
        told: list[Sent] = []
        output: list[dict[str, Any]] = []
        status = "incomplete" if finished.trajectory.stop_reason == "length" else "completed"
        if self._call is not None:
            output = [wire.function_call(self._started.turn_id, self._call)]
        else:
            last = max(len(finished.trajectory.steps) - 1, 0)
            if self._writing != last:  # the answer only became clear at the end
                told += self._open(last)
                told += self._delta(finished.trajectory.answer)
            cited = wire.flat(chat.url_citations(finished))
            output = [wire.message(self._started.turn_id, last, self._text, status, cited)]
            told += self._close(status, cited)
        end = wire.ended(finished, output, self._created_at, completed_at)
        return [*told, self._response(f"response.{end.status}", end)]

    def failed(self, error: ApiError) -> list[Sent]:
        told = self._close("incomplete")
        end = wire.Told(
            self._started.turn_id,
            self._started.version,
            "failed",
            self._created_at,
            error=wire.failure(error),
            whetstone=chat.ids(self._started) | error.body,
        )
        return [*told, self._response("response.failed", end)]

    def _grow(self, text: str) -> list[Sent]:
        told = [] if self._writing == self._step else self._open(self._step)
        grown = self._space + text if self._text else text.lstrip()
        shown = grown.rstrip()
        self._space = grown[len(shown) :]
        return told + self._delta(shown)

    def _delta(self, text: str) -> list[Sent]:
        if not text:
            return []
        self._text += text
        return [self._in_part("response.output_text.delta", delta=text, logprobs=[])]

    def _open(self, step: int) -> list[Sent]:
        """A message, in place of an open one that came to nothing: the policy began to answer, and then acted."""
        told = self._close("incomplete")
        self._writing, self._text, self._space = step, "", ""
        begun = wire.message(self._started.turn_id, step, "", "in_progress") | {"content": []}
        told.append(self._tell("response.output_item.added", output_index=self._items, item=begun))
        told.append(self._in_part("response.content_part.added", part=wire.output_text("")))
        return told

    def _close(self, status: str, cited: Sequence[Mapping[str, Any]] = ()) -> list[Sent]:
        if self._writing is None:
            return []
        whole = wire.message(self._started.turn_id, self._writing, self._text, status, cited)
        told = [
            self._in_part("response.output_text.annotation.added", annotation_index=number, annotation=dict(one))
            for number, one in enumerate(cited)
        ]
        told += [
            self._in_part("response.output_text.done", text=self._text, logprobs=[]),
            self._in_part("response.content_part.done", part=whole["content"][0]),
            self._tell("response.output_item.done", output_index=self._items, item=whole),
        ]
        self._items += 1
        self._writing = None
        return told

    def _called(self, call: ClientCall) -> list[Sent]:
        self._call = call
        told = self._close("incomplete")
        begun = wire.function_call(self._started.turn_id, ClientCall(call.tool, ""), "in_progress")
        whole = wire.function_call(self._started.turn_id, call)
        at = {"item_id": whole["id"], "output_index": self._items}
        told += [
            self._tell("response.output_item.added", output_index=self._items, item=begun),
            self._tell("response.function_call_arguments.delta", **at, delta=call.arguments),
            self._tell("response.function_call_arguments.done", **at, name=call.tool, arguments=call.arguments),
            self._tell("response.output_item.done", output_index=self._items, item=whole),
        ]
        self._items += 1
        return told

    def _in_part(self, kind: str, **fields: Any) -> Sent:
        assert self._writing is not None, "a part belongs to an open message"
        at = wire.message_id(self._started.turn_id, self._writing)
        return self._tell(kind, item_id=at, output_index=self._items, content_index=0, **fields)

    def _response(self, kind: str, told: wire.Told) -> Sent:
        return self._tell(kind, response=wire.response(told, self._echo))

    def _tell(self, kind: str, **fields: Any) -> Sent:
        shape = _TYPES.get(kind, BaseModel)
        made = shape.model_validate({"type": kind, "sequence_number": self._number, **fields})
        self._number += 1
        return kind, made.model_dump_json(exclude_unset=True, by_alias=True)
