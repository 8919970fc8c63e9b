"""What a tool takes: its JSON schema, as a prompt shows it, and arguments checked against it before anything runs."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError
from jsonschema.validators import extend
from langchain_core.tools import BaseTool
from langchain_core.utils.function_calling import convert_to_openai_tool
from pydantic import BaseModel
from referencing import Registry

TOOL_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
# What actions and observations are called: a tool of this name couldn't be told from them.
RESERVED = frozenset({"answer", "call", "invalid", "response", "think"})
_LONGEST_PROBLEM = 400  # characters
# Who wrote a schema may not be who runs this: a pattern could take for ever, and a reference fetch a page. The server
# that owns the schema checks its patterns itself; references are looked up in the schema alone.
_Validator = extend(Draft202012Validator, {"pattern": None, "patternProperties": None, "format": None})


class BadArguments(ValueError):
    """The message names the fields that are wrong, for the policy to mend."""


@dataclass(frozen=True)
class ToolSchema:
    """A tool as a prompt shows it. `parameters` is a JSON schema of type object."""

    name: str
    description: str
    parameters: Mapping[str, Any]

    def as_function(self) -> dict[str, Any]:
        """The shape that chat templates and OpenAI's `tools` have."""
        function = {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}
        return {"type": "function", "function": function}


def schema_of(tool: BaseTool) -> ToolSchema:
    """Raises ValueError when the tool has no schema that can be written as JSON."""
    try:
        function = convert_to_openai_tool(tool)["function"]
        parameters = function.get("parameters") or {"type": "object", "properties": {}}
        json.dumps(parameters)
        _Validator.check_schema(parameters)
    except SchemaError as error:
        raise ValueError(f"The tool {tool.name!r} has a schema that isn't JSON Schema: {error.message}") from error
    except Exception as error:  # a schema is the tool's own code
        raise ValueError(
            f"The tool {tool.name!r} has no usable schema: {type(error).__name__}: {error}. "
            "Give it an `args_schema`, or annotate its arguments with plain types."
        ) from error
    return ToolSchema(tool.name, str(function.get("description") or ""), parameters)


def checked(tool: BaseTool, schema: ToolSchema, arguments: str | Mapping[str, Any]) -> dict[str, Any]:
    """`arguments` by name; a text is the value of the only argument, or of the only one that is required.

    Raises BadArguments. Nothing is converted here: the tool does that when it is called.
    """
    names = list(schema.parameters.get("properties", {}))
    if isinstance(arguments, str):
        required = list(schema.parameters.get("required", ()))
        single = names if len(names) == 1 else required if len(required) == 1 else []
        if not single:
            raise _wrong(tool.name, names, [f"it takes {len(names)} arguments, by name"])
        arguments = {single[0]: arguments}
    given = dict(arguments)
    problems = (
        _model_problems(tool, given)
        if not isinstance(tool.args_schema, dict)
        else schema_problems(schema.parameters, given)
    )
    if problems:
        raise _wrong(tool.name, names, problems)
    return given


def check_against_schema(schema: ToolSchema, given: dict[str, Any]) -> None:
    """Arguments of a tool that runs elsewhere. Raises BadArguments."""
    if problems := schema_problems(schema.parameters, given):
        raise _wrong(schema.name, list(schema.parameters.get("properties", {})), problems)


def _wrong(tool: str, names: list[str], problems: list[str]) -> BadArguments:
    takes = f"It takes: {', '.join(names)}." if names else "It takes no arguments."
    told = "; ".join(problems)
    if len(told) > _LONGEST_PROBLEM:
        told = told[: _LONGEST_PROBLEM - 4] + " ..."
    return BadArguments(f"Wrong arguments for {tool}: {told}. {takes[:_LONGEST_PROBLEM]}")


def _model_problems(tool: BaseTool, given: dict[str, Any]) -> list[str]:
    """What a pydantic schema says, of this pydantic or of its version 1."""
    model: Any = tool.tool_call_schema  # without the arguments that the caller injects
    check = model.model_validate if issubclass(model, BaseModel) else model.parse_obj
    try:
        check(given)
    except ValueError as error:
        errors: Any = getattr(error, "errors", None)
        if not callable(errors):
            return [str(error)]
        found: list[Any] = errors()
        return [f"{'.'.join(str(part) for part in one['loc']) or 'arguments'}: {one['msg']}" for one in found]
    known = _known(model)
    return [] if known is None else [f"{name}: no such argument" for name in given if name not in known]


def _known(model: Any) -> set[str] | None:
    """The names that a model reads, or None when it takes any."""
    if not issubclass(model, BaseModel):
        return None
    if model.model_config.get("extra") == "allow" or {"kwargs", "args"} & set(model.model_fields):
        return None
    aliases = {str(field.alias) for field in model.model_fields.values() if field.alias}
    validation = {field.validation_alias for field in model.model_fields.values() if field.validation_alias}
    if not all(isinstance(alias, str) for alias in validation):
        return None
    return set(model.model_fields) | aliases | {str(alias) for alias in validation}


def schema_problems(schema: Mapping[str, Any], given: Any) -> list[str]:
    """What a JSON schema of somebody else's says of a value, but for its patterns; nothing is fetched for it."""
    validator = _Validator(schema, registry=Registry())
    problems = []
    try:
        for error in validator.iter_errors(given):
            where = ".".join(str(part) for part in error.absolute_path) or "arguments"
            problems.append(f"{where}: {error.message[:120]}")
            if len(problems) == 5:
                break
    except Exception as error:  # a reference that leads nowhere: the server is the judge then
        return [] if not problems else [*problems, f"({type(error).__name__})"]
    return problems
