"""What a request asks of its answers, as the agent takes it: messages with tool calls, stop strings, schemas, tools."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from app.api.errors import ApiError
from app.api.schema import ChatRequest, FunctionIn, FunctionName, JsonSchemaFormat, MessageIn, Metadata, NamedChoice
from app.service import Question
from app.settings import Settings
from serving.dialects.base import BARE
from serving.engines.base import Sampling
from serving.json_schema import BadSchema, check_grammar, check_schema
from serving.terms import ANY_OBJECT, Terms
from tools.arguments import RESERVED, TOOL_NAME, ToolSchema

_TAKEN = RESERVED | BARE.keys()
_MOST_TOOLS = 128  # OpenAI's limit
_MOST_CHARACTERS = 64_000  # of all tools: to check and to tokenize them takes the server's time
_SEEDS = 2**31  # an engine's seeds are 32 bits wide; a client's may be any number
_NOTHING = {"type": "object", "properties": {}}


@dataclass(frozen=True)
class Said:
    """A message, and where in the body it stands; `calls_at` are the places of its calls."""

    at: str
    message: MessageIn
    calls_at: tuple[str, ...] = ()


@dataclass(frozen=True)
class Fields:
    """What a route calls the parts of a call, and the whole of its messages."""

    messages: str = "messages"
    call_id: str = "id"
    name: str = "function.name"
    arguments: str = "function.arguments"
    answers: str = "tool_call_id"


_CHAT = Fields()


def said_in_chat(given: Sequence[MessageIn]) -> list[Said]:
    return [
        Said(f"messages.{i}", said, tuple(f"messages.{i}.tool_calls.{n}" for n in range(len(said.tool_calls or ()))))
        for i, said in enumerate(given)
    ]


def to_messages(
    given: Sequence[Said], before: Sequence[dict[str, Any]] = (), fields: Fields = _CHAT
) -> list[dict[str, Any]]:
    """The conversation, checked: each call is answered by one tool message right behind it. `before`: what was said
    in turns that this one goes on from. Raises ApiError."""
    messages = list(before)
    waiting: set[str] = {call["id"] for message in messages[-1:] for call in message.get("tool_calls", ())}
    for said in given:
        message = said.message.as_message()
        if message["role"] == "tool":
            call_id = said.message.tool_call_id
            if call_id not in waiting:
                raise _bad(f"{said.at}.{fields.answers}", f"no call {call_id!r} of the message before waits for it.")
            waiting.remove(call_id)
        elif waiting:
            raise _bad(said.at, f"the call {min(waiting)!r} has no result: that comes first.")
        for where, call in zip(said.calls_at, said.message.tool_calls or (), strict=True):
            if call.id in waiting:
                raise _bad(f"{where}.{fields.call_id}", f"two calls are called {call.id!r}.")
            _check_call(where, call.function.name, call.function.arguments, fields)
            waiting.add(call.id)
        if message["role"] == "user" and not message["content"].strip():
            raise ApiError(400, f"{said.at}: the message is empty.", "empty_message", fields.messages)
        messages.append(message)
    if waiting:
        raise _bad(fields.messages, f"the call {min(waiting)!r} has no result: add it behind the call.")
    if not messages or messages[-1]["role"] not in ("user", "tool"):
        raise _bad(fields.messages, "the last one must be the user's, or a tool's result.")
    return messages


def to_terms(body: ChatRequest) -> Terms:
    """Raises ApiError, naming the parameter's path."""
    if body.top_logprobs and not body.logprobs:
        raise _bad("top_logprobs", "it needs logprobs: true.")
    functions = [(f"tools.{index}.function", tool.function) for index, tool in enumerate(body.tools or ())]
    choice = body.tool_choice
    wanted = body.response_format
    schema: Mapping[str, Any] | None = None
    if isinstance(wanted, JsonSchemaFormat):
        schema = checked_schema("response_format.json_schema.schema", wanted.json_schema.schema_)
    elif wanted is not None and wanted.type == "json_object":
        schema = ANY_OBJECT
    return make_terms(
        functions,
        choice.function if isinstance(choice, NamedChoice) else choice,
        schema,
        stop=tuple(body.stop or ()),
        top_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        own_tokens=body.max_completion_tokens or body.max_tokens,
    )


def to_sampling(
    settings: Settings, temperature: float | None, top_p: float | None, max_tokens: int | None, seed: int | None = None
) -> Sampling:
    """What a client asks, with the settings' defaults where it leaves something open."""
    return Sampling(
        temperature=settings.temperature if temperature is None else temperature,
        top_p=settings.top_p if top_p is None else top_p,
        max_tokens=min(max_tokens or settings.max_tokens, settings.max_tokens),
        seed=None if seed is None else seed % _SEEDS,
    )


def make_question(
    settings: Settings,
    owner: str,
    request_id: str,
    model: str,
    metadata: Metadata | None,
    *,
    messages: list[dict[str, Any]],
    sampling: Sampling,
    terms: Terms,
    conversation_id: str | None = None,
    response: Mapping[str, Any] | None = None,
) -> Question:
    """What both routes ask of the service: `metadata` says the same on each. `conversation_id` wins over its own."""
    said = metadata or Metadata()
    return Question(
        owner=owner,
        messages=messages,
        sampling=sampling,
        conversation_id=conversation_id or said.conversation_id,
        version=None if model == settings.model_name else model,
        verifier=said.verifier,
        gold=said.gold,
        gold_expires_at=said.gold_expires_at,
        terms=terms,
        server_tools=said.server_tools == "all",
        response=response,
        request_id=request_id,
    )


def make_terms(
    functions: Sequence[tuple[str, FunctionIn]],
    choice: str | FunctionName | None,
    schema: Mapping[str, Any] | None,
    stop: tuple[str, ...] = (),
    top_logprobs: int | None = None,
    own_tokens: int | None = None,
) -> Terms:
    """`functions`: the client's tools, each with its place in the body. Raises ApiError."""
    tools = _tools(functions)
    must_call = _must_call(choice, tools)
    terms = Terms(stop, top_logprobs, schema, () if choice == "none" else tools, must_call, own_tokens)
    if must_call and terms.forced is not None:
        try:
            check_grammar(terms.forced[1])
        except BadSchema as error:
            raise _bad("tool_choice", f"a call can't be had for sure: {error.path}: {error}.") from error
    return terms


def checked_schema(at: str, schema: dict[str, Any]) -> dict[str, Any]:
    """`schema`, where a grammar can enforce it. Raises ApiError."""
    try:
        check_grammar(schema)
    except BadSchema as error:
        raise _bad(".".join(filter(None, (at, error.path))), f"{error}.") from error
    return schema


def _tools(given: Sequence[tuple[str, FunctionIn]]) -> tuple[ToolSchema, ...]:
    if len(given) > _MOST_TOOLS:
        raise _bad("tools", f"there are {len(given)}; at most {_MOST_TOOLS} can be given.")
    if (size := sum(len(function.model_dump_json()) for _, function in given)) > _MOST_CHARACTERS:
        raise _bad("tools", f"they have {size} characters together; at most {_MOST_CHARACTERS} can be given.")
    tools: dict[str, ToolSchema] = {}
    for at, function in given:
        if not TOOL_NAME.fullmatch(function.name) or function.name in _TAKEN:
            raise _bad(
                f"{at}.name",
                f"a tool can't be called {function.name[:80]!r}: a name has 1 to 64 of the characters A-Z, a-z, 0-9, _ "
                f"and -, and isn't one of {', '.join(sorted(_TAKEN))}.",
            )
        if function.name in tools:
            raise _bad(f"{at}.name", f"two tools are called {function.name!r}.")
        parameters = function.parameters or _NOTHING
        if parameters.get("type") != "object":
            raise _bad(f"{at}.parameters", 'a tool\'s parameters are a JSON schema of "type": "object".')
        try:
            check_schema(parameters)
        except BadSchema as error:
            raise _bad(".".join(filter(None, (f"{at}.parameters", error.path))), f"{error}.") from error
        tools[function.name] = ToolSchema(function.name, function.description or "", parameters)
    return tuple(tools.values())


def _must_call(choice: str | FunctionName | None, tools: tuple[ToolSchema, ...]) -> tuple[str, ...]:
    names = tuple(tool.name for tool in tools)
    if choice in (None, "none", "auto"):
        return ()
    if not names:
        raise _bad("tool_choice", "there are no tools to choose from: send tools, or leave it out.")
    if not isinstance(choice, FunctionName):
        return names
    if choice.name not in names:
        raise _bad("tool_choice", f"there is no tool {choice.name[:80]!r}; there are {', '.join(names)}.")
    return (choice.name,)


def _check_call(at: str, name: str, arguments: str, fields: Fields) -> None:
    if not TOOL_NAME.fullmatch(name):
        raise _bad(f"{at}.{fields.name}", f"{name[:80]!r} is no name of a tool.")
    try:
        sound = isinstance(json.loads(arguments), dict)
    except (ValueError, RecursionError):
        sound = False
    if not sound:
        raise _bad(f"{at}.{fields.arguments}", "they must be a JSON object, as text.")


def _bad(param: str, message: str) -> ApiError:
    return ApiError(400, f"{param}: {message}", "invalid_value", param)
