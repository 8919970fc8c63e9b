"""How an operator wants search to work, and the tool made of it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.search.backend import SearchBackend
from tools.search.ddgs import DdgsBackend
from tools.search.guarded import GuardedBackend
from tools.search.library import open_library
from tools.search.searxng import SearxngBackend
from tools.search.tool import SearchTool

BACKENDS = ("ddgs", "searxng", "local")
_SAFE = ("on", "moderate", "off")
_AGES = ("day", "week", "month", "year")


@dataclass(frozen=True)
class SearchOptions:
    """`backends` are asked in order. The rest but `max_results` and `max_chars` (an observation's) is of the web ones.

    `timeout_s`: of one look-up by one backend, retries included. `region`: country-language, as ddgs has it. `safe`:
    on, moderate or off. `age`: day, week, month or year. `cache_s`: how long a look-up may be given again, 0 for never.
    `per_minute`: requests to one backend.
    """

    backends: Sequence[str] = ("local",)
    timeout_s: float = 6.0
    region: str = "us-en"
    safe: str = "moderate"
    age: str | None = None
    news: bool = False
    cache_s: float = 900.0
    per_minute: float = 30.0
    searxng_url: str | None = None
    max_results: int = 1
    max_chars: int = 600


def open_search(home: Path, options: SearchOptions, documents: Path | None = None) -> SearchTool:
    """The tool "search". Blocks for a second or two when the local index must be built under `home`.

    `documents` is a folder that the local index has too. Raises ValueError, with the way out, for options that can't
    be used, and what `open_library` raises.
    """
    _check(options)
    backends = [_open(name, home, options, documents) for name in dict.fromkeys(options.backends)]
    return SearchTool(backends=backends, max_results=options.max_results, max_chars=options.max_chars)


def _open(name: str, home: Path, options: SearchOptions, documents: Path | None) -> SearchBackend:
    if name == "local":
        return open_library(home, documents)
    common: dict[str, Any] = {
        "timeout_s": options.timeout_s,
        "region": options.region,
        "safe": options.safe,
        "age": options.age,
        "news": options.news,
    }
    web = DdgsBackend(**common) if name == "ddgs" else SearxngBackend(options.searxng_url or "", **common)
    return GuardedBackend(web, options.timeout_s, options.per_minute, options.cache_s)


def _check(options: SearchOptions) -> None:
    if unknown := [name for name in options.backends if name not in BACKENDS]:
        raise ValueError(f"There is no search backend {unknown[0]!r}; use one or more of {', '.join(BACKENDS)}.")
    if not options.backends:
        raise ValueError(f"No search backend is named; use one or more of {', '.join(BACKENDS)}.")
    if "searxng" in options.backends and not options.searxng_url:
        raise ValueError(
            "The search backend 'searxng' needs the address of an instance: set searxng_url "
            "(WHETSTONE_SEARXNG_URL), or take searxng out of search_backends."
        )
    if options.safe not in _SAFE:
        raise ValueError(f"Safe search can't be {options.safe!r}; use {', '.join(_SAFE)}.")
    if options.age is not None and options.age not in _AGES:
        raise ValueError(f"Pages can't be of age {options.age!r}; use {', '.join(_AGES)}, or None.")
    if not re.fullmatch(r"[a-z]{2}-[a-z]{2,3}", options.region):
        raise ValueError(f"The region {options.region!r} isn't country-language, such as us-en, uk-en, de-de, wt-wt.")
    for knob in ("timeout_s", "per_minute"):
        if not getattr(options, knob) > 0:
            raise ValueError(f"{knob} is {getattr(options, knob)}; give a number above 0.")
    if not options.cache_s >= 0:
        raise ValueError(f"cache_s is {options.cache_s}; give a number of seconds, 0 to keep nothing.")
