"""Text that is safe and short enough to show to a policy."""

from __future__ import annotations

import re

# Control characters, direction marks, and all that Unicode calls default ignorable: what nobody sees could stand
# within a tag, which would then look like one.
_UNSEEN = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f"
    r"\u2028-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb\U00013430-\U0001343f\U0001bca0-\U0001bca3"
    r"\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)
_SURROGATE = re.compile(r"[\ud800-\udfff]")


def clean(text: str) -> str:
    """Without control characters, what is invisible, and lone surrogates; tabs and the ends of lines stay."""
    lines = text.replace("\r\n", "\n").replace("\r", "\n")
    return _SURROGATE.sub("\N{REPLACEMENT CHARACTER}", _UNSEEN.sub("", lines))


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
