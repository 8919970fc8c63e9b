"""What is sent to the web, and what is taken from it: a query made fit to send, a stranger's row made a hit."""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import urlsplit

from tools.search.backend import SearchHit
from tools.text import clean

_QUERY_CHARS = 400  # search engines refuse or cut longer ones
_TITLE_CHARS = 300
_TEXT_CHARS = 4_000  # an encyclopedia's row has its whole article
_URL_CHARS = 2_000


def sendable(query: str) -> str:
    """On one line, without control characters, cut after a word at 400 characters; empty if nothing is left."""
    line = one_line(query[: 10 * _QUERY_CHARS])
    if len(line) <= _QUERY_CHARS:
        return line
    head = line[: _QUERY_CHARS + 1]
    return (head.rsplit(" ", 1)[0] if " " in head else head)[:_QUERY_CHARS]


def web_hit(title: Any, text: Any, url: Any, source: Any = "") -> SearchHit | None:
    """A hit from values of any type; None when there is nothing to read in it.

    Only an http or https address is kept: it becomes a link. `source` is by default the page's host.
    """
    title, text, source = (clean(value) if isinstance(value, str) else "" for value in (title, text, source))
    if not title.strip() and not text.strip():
        return None
    address, host = _address(url)
    return SearchHit(
        one_line(title)[:_TITLE_CHARS], text[:_TEXT_CHARS], one_line(source)[:100] or host or "web", address
    )


def one_line(text: str) -> str:
    return re.sub(r"\s+", " ", clean(text)).strip()


def _address(url: Any) -> tuple[str, str]:
    """(address, host), or two empty strings for what can't be opened as a web page."""
    if not isinstance(url, str) or len(url) > _URL_CHARS:
        return "", ""
    url = clean(url).strip()
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
    except ValueError:
        return "", ""
    if parts.scheme.lower() not in ("http", "https") or not host or re.search(r"[\s<>\"]", url):
        return "", ""
    return url, host.removeprefix("www.")
