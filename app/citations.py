"""The sources that an answer rests on, numbered in the order in which its tools gave them.

Titles and addresses come from web pages and from tools that anyone wrote, so what isn't plainly a title or the address
of a web page is left out here, once, for the chat and the endpoint.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlsplit

from feedback_store.records import ObservationLike
from serving.trajectory import Trajectory
from tools.text import clean

_TITLE_CHARS = 160
_URL_CHARS = 2000
_URL_SAFE = "/:?#@!$&*+,;=%~-._[]"  # no quotes, angle brackets, parentheses: nothing ends a link early
MAX_SOURCES = 20


@dataclass(frozen=True)
class Source:
    """`number` counts from 1. `url` is an http or https address, or empty; `source` says whose knowledge it is."""

    number: int
    title: str
    url: str
    source: str
    retrieved_at: str


def sources_of(trajectory: Trajectory) -> list[Source]:
    """What the tools that succeeded gave the answer to read, each once. An answer that never came cites nothing."""
    if trajectory.stop_reason in ("cancelled", "no_answer"):
        return []
    return collect(step.observation for step in trajectory.steps if step.observation is not None)


def collect(observations: Iterable[ObservationLike]) -> list[Source]:
    found: dict[str, Source] = {}
    for observation in observations:
        listed = observation.artifact.get("sources")
        if observation.error or not isinstance(listed, list):
            continue
        for given in listed:
            if isinstance(given, dict) and len(found) < MAX_SOURCES:
                _add(found, given)
    return list(found.values())


def _add(found: dict[str, Source], given: dict[str, Any]) -> None:
    title, whose = _line(given.get("title")), _line(given.get("source"))
    url = web_address(given.get("url"))
    if not (title or whose or url):
        return
    key = url.partition("#")[0].rstrip("/") or f"{title.casefold()}\n{whose.casefold()}"
    found.setdefault(
        key,
        Source(len(found) + 1, title or whose or _host(url), url, whose, _line(given.get("retrieved_at"))),
    )


def web_address(given: object) -> str:
    """`given` as an address that is safe to link to, or "" where it isn't one.

    Only http and https; no user name, which serves to make one host look like another.
    """
    if not isinstance(given, str):
        return ""
    text = given.strip()
    if not text or len(text) > _URL_CHARS or any(character.isspace() for character in text) or clean(text) != text:
        return ""
    try:
        parts = urlsplit(text)
        host, _ = parts.hostname, parts.port
    except ValueError:
        return ""
    if parts.scheme.lower() not in ("http", "https") or not host or "@" in parts.netloc or "\\" in text:
        return ""
    return quote(text, safe=_URL_SAFE)


def _host(url: str) -> str:
    return urlsplit(url).hostname or url


def _line(given: object) -> str:
    text = " ".join(clean(given).split()) if isinstance(given, str) else ""
    return text if len(text) <= _TITLE_CHARS else text[: _TITLE_CHARS - 1].rstrip() + "…"
