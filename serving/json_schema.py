"""Whether a JSON schema of a client's can be held to: what a grammar can't enforce is refused, never ignored."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError
from llguidance import LLMatcher

_DEEPEST = 48  # levels: more than any schema that a person would write, fewer than a parser's stack


class BadSchema(ValueError):
    """The message says what is wrong, and `path` where: keys joined by dots, empty for the whole."""

    def __init__(self, path: str, message: str) -> None:
        super().__init__(message)
        self.path = path


def check_schema(schema: Mapping[str, Any]) -> None:
    """Raises BadSchema for what isn't JSON Schema (draft 2020-12), is nested too deeply, or refers elsewhere."""
    for path, value in _walk(schema):
        if len(path) > _DEEPEST:
            raise BadSchema(".".join(path[:8]), f"it is nested more than {_DEEPEST} levels deep")
        if path and path[-1] == "$ref" and isinstance(value, str) and not value.startswith("#"):
            raise BadSchema(
                ".".join(path),
                f"it refers to {value[:80]!r}; only the schema's own parts (#/…) can be",
            )
    try:
        Draft202012Validator.check_schema(schema)
    except SchemaError as error:
        raise BadSchema(".".join(map(str, error.absolute_path)), error.message[:200]) from error


def check_grammar(schema: Mapping[str, Any]) -> None:
    """Raises BadSchema, besides, for what no grammar can enforce, such as `not` or `uniqueItems`."""
    check_schema(schema)
    problem = _problem(schema)
    if not problem:
        return
    where: tuple[str, ...] = ()
    for path, value in _walk(schema):  # the innermost part that has the same problem by itself
        if isinstance(value, dict) and len(path) > len(where) and _problem(value) == problem:
            where = path
    raise BadSchema(".".join(where), f"it can't be enforced: {problem[:200]}")


def _problem(schema: Mapping[str, Any]) -> str:
    failed, told = LLMatcher.validate_grammar_with_warnings(LLMatcher.grammar_from_json_schema(json.dumps(schema)))
    return told[0] if failed and told else "it is no schema" if failed else ""


def _walk(schema: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], Any]]:
    waiting: list[tuple[tuple[str, ...], Any]] = [((), schema)]
    while waiting:
        path, value = waiting.pop()
        yield path, value
        if len(path) <= _DEEPEST:
            items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
            waiting += [((*path, str(key)), item) for key, item in items]


def moved(value: Any, to: str) -> Any:
    """A schema whose references still lead to its own parts once it stands at `to`, a JSON pointer such as "#/a"."""
    if isinstance(value, Mapping):
        return {k: to + v[1:] if k == "$ref" and isinstance(v, str) else moved(v, to) for k, v in value.items()}
    return [moved(item, to) for item in value] if isinstance(value, list) else value
