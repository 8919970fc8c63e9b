"""What a tool returned, as the record can keep it: a text, and a dict that is JSON and of bounded size."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from tools.text import clean

MAX_CHARS = 200_000  # of an artifact's strings and keys together
MAX_ITEMS = 20_000  # of its lists and dicts together
MAX_DEPTH = 12
_LONGEST_INT = 1 << 256  # longer ones take Python quadratic time to write, and JSON readers refuse them


def as_artifact(value: Any) -> dict[str, Any]:
    """A dict stays one, nothing is an empty one, and what is anything else is kept under `value`."""
    if value is None:
        return {}
    plain = _Plain()
    if isinstance(value, Mapping):
        # What people are shown comes first, should the rest not fit.
        keys = sorted(value, key=lambda key: key not in ("error", "backend", "sources", "files", "images"))
        return plain.mapping(((key, value[key]) for key in keys), 1)
    return {"value": plain.of(value, 1)}


def as_text(content: Any) -> str:
    """A message's content: a text, or blocks of which those without text are named in brackets."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return str(content)
    return "\n".join(part for part in (_block(block) for block in content) if part)


def _block(block: Any) -> str:
    if isinstance(block, str):
        return block
    if not isinstance(block, Mapping):
        return str(block)
    if isinstance(block.get("text"), str):
        return str(block["text"])
    where = block.get("url")
    kind = str(block.get("type", "block"))[:40]
    return f"[{kind}: {where[:500]}]" if isinstance(where, str) else f"[{kind}]"


class _Plain:
    """Turns one value into plain JSON within the budgets; what can't be is written as its repr."""

    def __init__(self) -> None:
        self._chars = MAX_CHARS
        self._items = MAX_ITEMS

    def of(self, value: Any, depth: int) -> Any:
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, str):
            return self._string(value)
        if type(value) is int:
            return value if abs(value) < _LONGEST_INT else f"an integer of {value.bit_length()} bits"
        if type(value) is float:
            return value if math.isfinite(value) else repr(value)
        if isinstance(value, bytes | bytearray | memoryview):
            return f"{len(value)} bytes"
        if isinstance(value, Mapping) and depth < MAX_DEPTH:
            return self.mapping(value.items(), depth + 1)
        if isinstance(value, list | tuple | set | frozenset) and depth < MAX_DEPTH:
            return [self.of(item, depth + 1) for item in self._budgeted(value)]
        return self._string(_described(value))

    def mapping(self, items: Iterable[tuple[Any, Any]], depth: int) -> dict[str, Any]:
        plain = {}
        for key, item in self._budgeted(items):
            plain[self._string(key if isinstance(key, str) else _described(key))[:200]] = self.of(item, depth)
        return plain

    def _budgeted(self, items: Iterable[Any]) -> Iterable[Any]:
        for item in items:
            if self._items <= 0:
                return
            self._items -= 1
            yield item

    def _string(self, text: str) -> str:
        text = text if len(text) <= self._chars else text[: self._chars]
        self._chars -= len(text)
        return clean(text)


def _described(value: Any) -> str:
    if isinstance(value, Mapping | list | tuple | set | frozenset):
        return f"{type(value).__name__} of {len(value)}"  # too deep: its repr could be endless
    try:
        return repr(value)[:2_000]
    except Exception:  # a repr is the tool's own code
        return f"a {type(value).__name__}"
