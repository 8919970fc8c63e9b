"""Model and tool text as Markdown that shows what was written and runs nothing: no HTML, no pictures from elsewhere."""

from __future__ import annotations

import html
import re

_CODE = re.compile(r"(?P<fence>`+)(?!`).+?(?<!`)(?P=fence)(?!`)", re.DOTALL)
_BACKTICKS = re.compile(r"`+")


def as_markdown(text: str) -> str:
    """`text` with its Markdown kept, but HTML shown as characters and pictures and raw links left unloaded.

    Inside code the characters stay as they are, since Markdown shows those literally.
    """
    parts: list[str] = []
    end = 0
    for span in _CODE.finditer(text):
        parts += [_escape(text[end : span.start()]), span.group()]
        end = span.end()
    return "".join([*parts, _escape(text[end:])])


def as_code(text: str, language: str = "") -> str:
    """A fenced block that `text` can't close, whatever backticks it has."""
    longest = max((len(run) for run in _BACKTICKS.findall(text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def _escape(text: str) -> str:
    return html.escape(text, quote=False).replace("![", "!\\[")


def as_words(text: str) -> str:
    """`text` on one line, every character shown as it is: no Markdown, no HTML, no link."""
    return "".join(
        character if character.isalnum() or character == " " else f"&#{ord(character)};"
        for character in " ".join(text.split())
    )


def as_link(text: str, url: str) -> str:
    """A link that shows `text` as it is. `url` is one of our own, or has passed `app.citations.web_address`."""
    return f"[{as_words(text)}](<{url}>)"
