"""Responses as the official client types them, and one extra field `whetstone` in each, which other clients ignore.

What is told of a response comes from the answer as it ends, or from its turn in the record, days later.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from openai.types.responses import Response

from app.api import wire as chat
from app.api.errors import ApiError
from app.citations import collect
from app.service import Finished, Started
from feedback_store import Turn
from serving.dialects.base import read_call
from serving.trajectory import ClientCall

_STATUS = {
    "running": "in_progress",
    "done": "completed",
    "no_answer": "completed",
    "tool_calls": "completed",
    "length": "incomplete",
    "cancelled": "cancelled",
    "error": "failed",
    "interrupted": "failed",
}


@dataclass(frozen=True)
class Told:
    """What a response tells of its turn. `status` is the response's; `output` holds items, `usage` is None so far."""

    turn_id: str
    version: str
    status: str
    created_at: float
    completed_at: float | None = None
    output: Sequence[Mapping[str, Any]] = ()
    usage: Mapping[str, Any] | None = None
    error: Mapping[str, Any] | None = None
    whetstone: Mapping[str, Any] = field(default_factory=dict)


def begun(started: Started, created_at: float) -> Told:
    return Told(started.turn_id, started.version, "in_progress", created_at, whetstone=chat.ids(started))


def ended(finished: Finished, output: Sequence[Mapping[str, Any]], created_at: float, completed_at: float) -> Told:
    started, trajectory = finished.started, finished.trajectory
    status = {"length": "incomplete", "cancelled": "cancelled"}.get(trajectory.stop_reason, "completed")
    used = usage(started.prompt_tokens, trajectory.own_tokens)
    more = chat.ids(started) | chat.summary(finished)
    return Told(started.turn_id, started.version, status, created_at, completed_at, output, used, None, more)


def recorded(turn: Turn) -> Told:
    """Of a turn in the record, with its steps."""
    status = _STATUS[turn.status]
    output: list[dict[str, Any]] = []
    if turn.status == "tool_calls":
        output = [function_call(turn.id, call_of(turn))]
    elif turn.status in ("done", "no_answer", "length"):
        cited = () if turn.status == "no_answer" else citations_of(turn)
        index = max(len(turn.steps) - 1, 0)
        output = [message(turn.id, index, turn.answer, status, cited)]
    own = sum(sum(step.mask) for step in turn.steps)
    return Told(
        turn.id,
        turn.version,
        status,
        turn.created_at.timestamp(),
        turn.finished_at.timestamp() if turn.finished_at else None,
        output,
        usage(len(turn.prompt_ids), own) if turn.finished_at else None,
        {"code": "server_error", "message": turn.error or turn.status} if status == "failed" else None,
        {"turn_id": turn.id, "conversation_id": turn.conversation_id, "version": turn.version},
    )


def response(told: Told, echo: Mapping[str, Any]) -> Response:
    """`echo`: what of the request a response says again. `model` is the version that answered."""
    incomplete = {"reason": "max_output_tokens"} if told.status == "incomplete" else None
    return Response.model_validate(
        {
            "id": response_id(told.turn_id),
            "object": "response",
            "created_at": int(told.created_at),
            "completed_at": int(told.completed_at) if told.completed_at and told.status == "completed" else None,
            "status": told.status,
            "error": told.error,
            "incomplete_details": incomplete,
            "model": told.version,
            "output": list(told.output),
            "parallel_tool_calls": False,  # a step calls one tool at most
            "truncation": "disabled",
            "usage": told.usage,
            "whetstone": dict(told.whetstone),
            **echo,
        }
    )


def written(told: Response) -> dict[str, Any]:
    return told.model_dump(exclude_unset=True, by_alias=True)


def message(turn_id: str, step: int, text: str, status: str, cited: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
    """The item of an answer, which the step of that number wrote."""
    return {
        "id": message_id(turn_id, step),
        "type": "message",
        "role": "assistant",
        "status": status,
        "content": [output_text(text, cited)],
    }


def output_text(text: str, cited: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": list(cited), "logprobs": []}


def function_call(turn_id: str, call: ClientCall, status: str = "completed") -> dict[str, Any]:
    return {
        "id": f"fc_{_bare(turn_id)}",
        "type": "function_call",
        "call_id": f"call_{_bare(turn_id)}",
        "name": call.tool,
        "arguments": call.arguments,
        "status": status,
    }


def input_items(turn_id: str, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What a response was asked with, and what was said before it, the oldest first."""
    items: list[dict[str, Any]] = []
    for said in messages:
        made: list[dict[str, Any]] = []
        if said["role"] == "tool":
            made.append({"type": "function_call_output", "call_id": said["tool_call_id"], "output": said["content"]})
        elif said["role"] != "assistant":
            content = [{"type": "input_text", "text": said["content"]}]
            made.append({"type": "message", "role": said["role"], "content": content})
        elif said["content"] or not said.get("tool_calls"):
            made.append({"type": "message", "role": "assistant", "content": [output_text(said["content"])]})
        made += [
            {"type": "function_call", "call_id": call["id"]} | call["function"] for call in said.get("tool_calls", ())
        ]
        for item in made:
            items.append({"id": f"item_{_bare(turn_id)}_{len(items)}", "status": "completed"} | item)
    return items


def usage(prompt: int, own: int) -> dict[str, Any]:
    """What was read from a cache and what was thought isn't told apart: both are 0."""
    return {
        "input_tokens": prompt,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": own,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": prompt + own,
    }


def failure(error: ApiError) -> dict[str, Any]:
    """As a response's error, whose codes are OpenAI's own."""
    code = "server_error" if error.status_code >= 500 else "invalid_prompt"
    return {"code": code, "message": error.message}


def flat(cited: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Chat's citations as those of a response."""
    return [{"type": "url_citation"} | one["url_citation"] for one in cited]


def citations_of(turn: Turn) -> list[dict[str, Any]]:
    sources = collect(step.observation for step in turn.steps if step.observation is not None)
    at = {"type": "url_citation", "start_index": len(turn.answer), "end_index": len(turn.answer)}
    return [at | {"title": source.title, "url": source.url} for source in sources if source.url]


def call_of(turn: Turn) -> ClientCall:
    """The client's tool that a turn ended with calling."""
    call = read_call(turn.steps[-1].input)
    return ClientCall(call.tool, call.input)


def response_id(turn_id: str) -> str:
    return f"resp_{_bare(turn_id)}"


def turn_id_of(response_id: str) -> str:
    return f"turn_{response_id.removeprefix('resp_')}"


def message_id(turn_id: str, step: int) -> str:
    return f"msg_{_bare(turn_id)}_{step}"


def _bare(turn_id: str) -> str:
    return turn_id.removeprefix("turn_")
