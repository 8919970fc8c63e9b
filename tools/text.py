"""Text that is safe and short enough to show to a policy."""

from __future__ import annotations

import re

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u200b-\u200f\u202a-\u202e\u2066-\u2069\ufeff]")
_SURROGATE = re.compile(r"[\ud800-\udfff]")


def clean(text: str) -> str:
    """Without control characters, direction marks and lone surrogates; line feeds and tabs stay."""
    return _SURROGATE.sub("\N{REPLACEMENT CHARACTER}", _CONTROL.sub("", text.replace("\r\n", "\n")))


def cut(text: str, max_chars: int) -> str:
    """At most `max_chars` characters: the beginning, a mark, and the end (an error's last line is there)."""
    if len(text) <= max_chars:
        return text
    mark = f"\n... {len(text)} characters, cut ...\n"
    room = max_chars - len(mark)
    if room <= 0:
        return text[: max(max_chars, 0)]
    tail = room // 3
    return text[: room - tail] + mark + text[len(text) - tail :]
