"""Whether a JSON schema of a client's can be held to: what a grammar can't enforce is refused, never ignored."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError
from llguidance import LLMatcher

from tools.arguments import schema_problems

_DEEPEST = 48  # levels: more than any schema that a person would write, fewer than a parser's stack
_LARGEST = 64_000  # characters as JSON: to compile a schema takes the server's time
_TELLS = frozenset({"title", "description", "examples", "default", "$comment"})  # what forces nothing
_NAMED = frozenset({"properties", "patternProperties", "$defs", "definitions"})  # whose keys are the client's words


class BadSchema(ValueError):
    """The message says what is wrong, and `path` where: keys joined by dots, empty for the whole."""

    def __init__(self, path: str, message: str) -> None:
        super().__init__(message)
        self.path = path


def check_schema(schema: Mapping[str, Any]) -> None:
    """Raises BadSchema for what isn't JSON Schema (draft 2020-12), is too large or deep, or refers elsewhere."""
    for path, value in _walk(schema):
        if len(path) > _DEEPEST:
            raise BadSchema(".".join(path[:8]), f"it is nested more than {_DEEPEST} levels deep")
        if path and path[-1] == "$ref" and isinstance(value, str) and not value.startswith("#"):
            raise BadSchema(
                ".".join(path),
                f"it refers to {value[:80]!r}; only the schema's own parts (#/…) can be",
            )
    if (size := len(json.dumps(schema))) > _LARGEST:
        raise BadSchema("", f"it has {size} characters; at most {_LARGEST} are read")
    try:
        Draft202012Validator.check_schema(schema)
    except SchemaError as error:
        raise BadSchema(".".join(map(str, error.absolute_path)), error.message[:200]) from error


def check_grammar(schema: Mapping[str, Any]) -> None:
    """Raises BadSchema, besides, for what no grammar can enforce, such as `not` or `uniqueItems`.

    Nor can the engine's write what isn't ASCII, where the schema leaves no choice: its vocabulary has no half
    characters.
    """
    check_schema(schema)
    for path, value in _walk(schema):
        words = [*path[-1:], value] if isinstance(value, str) else path[-1:]
        if path and path[-1] == "x-guidance":
            raise BadSchema(".".join(path), "it is a word of the engine's own")
        if not _tells(path) and any(not word.isascii() or "<|" in word for word in words):
            raise BadSchema(".".join(path), "it can't be enforced: only ASCII can be, without <|")
        if path and path[-1] == "$ref" and _circles(schema, value):
            raise BadSchema(".".join(path), "it leads back to itself")
    problem = _problem(schema)
    if not problem:
        return
    where: tuple[str, ...] = ()
    for path, value in _walk(schema):  # the innermost part that has the same problem by itself
        if isinstance(value, dict) and len(path) > len(where) and _problem(value) == problem:
            where = path
    raise BadSchema(".".join(where), f"it can't be enforced: {problem[:200]}")


def holds(schema: Mapping[str, Any], text: str) -> bool:
    """Whether a text is JSON of the schema, but for its patterns: a client's could take for ever to match."""
    try:
        return not schema_problems(schema, json.loads(text))
    except (ValueError, RecursionError):
        return False


def _tells(path: tuple[str, ...]) -> bool:
    return any(key in _TELLS and (not at or path[at - 1] not in _NAMED) for at, key in enumerate(path))


def _circles(schema: Mapping[str, Any], reference: object) -> bool:
    """Whether a reference leads to a reference, and so on, without end."""
    seen = set()
    while isinstance(reference, str):
        if reference in seen:
            return True
        seen.add(reference)
        found: Any = schema
        for key in reference.removeprefix("#").split("/")[1:]:
            key = key.replace("~1", "/").replace("~0", "~")
            found = found.get(key) if isinstance(found, Mapping) else None
        reference = found.get("$ref") if isinstance(found, Mapping) else None
    return False


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
