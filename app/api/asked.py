"""What a request asks of its answers, as the agent takes it: messages with tool calls, stop strings, schemas, tools."""

from __future__ import annotations

import json
from typing import Any

from app.api.errors import ApiError
from app.api.schema import ChatRequest, JsonSchemaFormat, MessageIn, NamedChoice
from serving.dialects.base import BARE
from serving.json_schema import BadSchema, check_grammar, check_schema
from serving.terms import ANY_OBJECT, Terms
from tools.arguments import RESERVED, TOOL_NAME, ToolSchema

_TAKEN = RESERVED | BARE.keys()
_MOST_TOOLS = 128  # OpenAI's limit
_MOST_CHARACTERS = 64_000  # of all tools: to check and to tokenize them takes the server's time
_NOTHING = {"type": "object", "properties": {}}


def to_messages(given: list[MessageIn]) -> list[dict[str, Any]]:
    """The conversation, checked: each call is answered by one tool message right behind it. Raises ApiError."""
    messages = []
    waiting: set[str] = set()
    for index, said in enumerate(given):
        at = f"messages.{index}"
        message = said.as_message()
        if said.role == "tool":
            if said.tool_call_id not in waiting:
                raise _bad(f"{at}.tool_call_id", f"no call {said.tool_call_id!r} of the message before waits for it.")
            waiting.remove(said.tool_call_id)
        elif waiting:
            raise _bad(at, f"the call {min(waiting)!r} has no result: a message of the role tool comes first.")
        for number, call in enumerate(said.tool_calls or ()):
            where = f"{at}.tool_calls.{number}"
            if call.id in waiting:
                raise _bad(f"{where}.id", f"two calls are called {call.id!r}.")
            _check_call(where, call.function.name, call.function.arguments)
            waiting.add(call.id)
        if said.role == "user" and not message["content"].strip():
            raise ApiError(400, f"{at}: the message is empty.", "empty_message", "messages")
        messages.append(message)
    if waiting:
        raise _bad("messages", f"the call {min(waiting)!r} has no result: add a message of the role tool.")
    if messages[-1]["role"] not in ("user", "tool"):
        raise _bad("messages", "the last one must be the user's, or a tool's result.")
    return messages


def to_terms(body: ChatRequest) -> Terms:
    """Raises ApiError, naming the parameter's path."""
    if body.top_logprobs and not body.logprobs:
        raise _bad("top_logprobs", "it needs logprobs: true.")
    tools = _tools(body)
    must_call = _must_call(body, tools)
    if body.tool_choice == "none":
        tools = ()
    terms = Terms(
        tuple(body.stop or ()), (body.top_logprobs or 0) if body.logprobs else None, _schema(body), tools, must_call
    )
    if must_call and terms.forced is not None:
        try:
            check_grammar(terms.forced[1])
        except BadSchema as error:
            raise _bad("tool_choice", f"a call can't be had for sure: {error.path}: {error}.") from error
    return terms


def _schema(body: ChatRequest) -> Any:
    wanted = body.response_format
    if wanted is None or wanted.type == "text":
        return None
    if not isinstance(wanted, JsonSchemaFormat):
        return ANY_OBJECT
    at = "response_format.json_schema.schema"
    try:
        check_grammar(wanted.json_schema.schema_)
    except BadSchema as error:
        raise _bad(".".join(filter(None, (at, error.path))), f"{error}.") from error
    return wanted.json_schema.schema_


def _tools(body: ChatRequest) -> tuple[ToolSchema, ...]:
    given = body.tools or []
    if len(given) > _MOST_TOOLS:
        raise _bad("tools", f"there are {len(given)}; at most {_MOST_TOOLS} can be given.")
    if (size := sum(len(tool.model_dump_json()) for tool in given)) > _MOST_CHARACTERS:
        raise _bad("tools", f"they have {size} characters together; at most {_MOST_CHARACTERS} can be given.")
    tools: dict[str, ToolSchema] = {}
    for index, tool in enumerate(given):
        at, function = f"tools.{index}.function", tool.function
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


def _must_call(body: ChatRequest, tools: tuple[ToolSchema, ...]) -> tuple[str, ...]:
    choice, names = body.tool_choice, tuple(tool.name for tool in tools)
    if choice in (None, "none", "auto"):
        return ()
    if not names:
        raise _bad("tool_choice", "there are no tools to choose from: send tools, or leave it out.")
    if not isinstance(choice, NamedChoice):
        return names
    if choice.function.name not in names:
        raise _bad("tool_choice", f"there is no tool {choice.function.name[:80]!r}; there are {', '.join(names)}.")
    return (choice.function.name,)


def _check_call(at: str, name: str, arguments: str) -> None:
    if not TOOL_NAME.fullmatch(name):
        raise _bad(f"{at}.function.name", f"{name[:80]!r} is no name of a tool.")
    try:
        sound = isinstance(json.loads(arguments), dict)
    except (ValueError, RecursionError):
        sound = False
    if not sound:
        raise _bad(f"{at}.function.arguments", "they must be a JSON object, as text.")


def _bad(param: str, message: str) -> ApiError:
    return ApiError(400, f"{param}: {message}", "invalid_value", param)
