"""What a request for a response asks, as the agent takes it, and what of it is kept with its turn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from app.api.asked import Fields, Said, checked_schema, make_question, make_terms, to_messages, to_sampling
from app.api.errors import ApiError
from app.api.responses.schema import CallItem, Content, FunctionChoice, Item, MessageItem, ResponseRequest, SchemaFormat
from app.api.responses.wire import call_of
from app.api.schema import FunctionCallIn, FunctionName, MessageIn, ToolCallIn
from app.api.wire import tool_call
from app.service import Question
from app.settings import Settings
from feedback_store import Turn
from serving.terms import ANY_OBJECT, Terms

_FIELDS = Fields("input", "call_id", "name", "arguments", "call_id")
ANSWERED = ("done", "no_answer", "length", "tool_calls")  # what can be gone on from


@dataclass(frozen=True)
class Before:
    """Where a response goes on: a conversation, and the last turn of it that counts, if there is one."""

    conversation_id: str | None = None
    turn: Turn | None = None


def to_question(
    body: ResponseRequest, before: Before, owner: str, settings: Settings, request_id: str
) -> tuple[Question, dict[str, Any]]:
    """The request, checked, and what its response object echoes of it. Raises ApiError."""
    system = [] if body.instructions is None else [{"role": "system", "content": body.instructions}]
    said = messages_after(before.turn) if before.turn else []
    messages = system + to_messages(_said(body.input), said, _FIELDS)
    metadata = body.metadata
    sampling = to_sampling(settings, body.temperature, body.top_p, body.max_output_tokens)
    echo: dict[str, Any] = {
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": metadata.model_dump(mode="json", exclude_unset=True, exclude_none=True) if metadata else {},
        "previous_response_id": body.previous_response_id,
        "conversation": {"id": body.conversation_id} if body.conversation_id else None,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "text": _as_sent(body.text) if body.text and body.text.format else {"format": {"type": "text"}},
        "tool_choice": _as_sent(body.tool_choice) if body.tool_choice else "auto",
        "tools": [{"parameters": None, "strict": None} | _as_sent(tool) for tool in body.tools or ()],
        "store": body.store is not False,
    }
    question = make_question(
        settings,
        owner,
        request_id,
        body.model,
        metadata,
        messages=messages,
        sampling=sampling,
        terms=_terms(body),
        conversation_id=before.conversation_id,
        response=echo if echo["store"] else None,
    )
    return question, echo


def check(body: ResponseRequest) -> None:
    """Refuse what can't be honoured, before anything is looked up. Raises ApiError."""
    if refused := body.unsupported():
        param, message = refused
        raise ApiError(400, message, "unsupported_parameter", param)
    named = {
        "previous_response_id": body.previous_response_id,
        "conversation": body.conversation_id,
        "metadata.conversation_id": body.metadata.conversation_id if body.metadata else None,
    }
    given = [name for name, value in named.items() if value is not None]
    if len(given) > 1:
        raise ApiError(400, f"{given[1]}: {given[0]} says where it goes on: send one.", "invalid_value", given[1])
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options: it needs stream: true.", "invalid_value", "stream_options")


def messages_after(turn: Turn) -> list[dict[str, Any]]:
    """The context of what follows `turn`: its messages, without its instructions, and its answer or its call.

    Raises ApiError for a turn without an answer.
    """
    if turn.status not in ANSWERED:
        state = "is still being answered" if turn.status == "running" else f"has no answer ({turn.status})"
        raise ApiError(
            409, f"the response before {state}: go on from the one before it.", "response_not_finished", "input"
        )
    said = context_of(turn)
    if turn.status == "tool_calls":
        return [*said, {"role": "assistant", "content": "", "tool_calls": [tool_call(turn.id, call_of(turn))]}]
    return [*said, {"role": "assistant", "content": turn.answer}]


def context_of(turn: Turn) -> list[dict[str, Any]]:
    """The messages that a turn was asked with, without its instructions, which are no item of its input."""
    response: Mapping[str, Any] = turn.asked.get("response") or {}
    return list(turn.messages[1:] if response.get("instructions") is not None else turn.messages)


def _said(given: str | Sequence[Item]) -> list[Said]:
    """The items as messages: calls that stand together are one message of the assistant's."""
    if isinstance(given, str):
        return [Said("input", MessageIn(role="user", content=given))]
    said: list[Said] = []
    for index, item in enumerate(given):
        at = f"input.{index}"
        if isinstance(item, MessageItem):
            said.append(Said(at, MessageIn(role=item.role, content=_text(item.content))))
        elif isinstance(item, CallItem):
            function = FunctionCallIn(name=item.name, arguments=item.arguments)
            call = ToolCallIn(id=item.call_id, function=function)
            last = said[-1] if said else None
            if last is not None and last.message.role == "assistant":
                calls = [*(last.message.tool_calls or ()), call]
                said[-1] = Said(last.at, last.message.model_copy(update={"tool_calls": calls}), (*last.calls_at, at))
            else:
                said.append(Said(at, MessageIn(role="assistant", tool_calls=[call]), (at,)))
        else:
            said.append(Said(at, MessageIn(role="tool", content=_text(item.output), tool_call_id=item.call_id)))
    return said


def _text(content: Content) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


def _terms(body: ResponseRequest) -> Terms:
    functions = [(f"tools.{index}", tool) for index, tool in enumerate(body.tools or ())]
    choice = body.tool_choice
    wanted = body.text.format if body.text else None
    schema: Mapping[str, Any] | None = None
    if isinstance(wanted, SchemaFormat):
        schema = checked_schema("text.format.schema", wanted.schema_)
    elif wanted is not None and wanted.type == "json_object":
        schema = ANY_OBJECT
    named = FunctionName(name=choice.name) if isinstance(choice, FunctionChoice) else choice
    return make_terms(functions, named, schema, own_tokens=body.max_output_tokens)


def _as_sent(value: Any) -> Any:
    return value if isinstance(value, str) else value.model_dump(exclude_unset=True, by_alias=True)
