"""Search of the live web by ddgs, which asks several public engines one after another until one has an answer."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from tools.search.backend import BackendUnavailable, NotAsked, SearchHit, TooSlow
from tools.search.web import sendable, web_hit

Fetch = Callable[[str, int, float], list[dict[str, Any]]]
"""(query, max_results, timeout in seconds) -> rows with `title`, `body`, and `href` or `url`."""

# Threads of its own: look-ups that hang must not take those that the rest of the program works with.
_THREADS = ThreadPoolExecutor(max_workers=8, thread_name_prefix="ddgs")


class DdgsBackend:
    """`region` is country-language, `safe` on, moderate or off, `age` day, week, month or year.

    `fetch` replaces ddgs. Wrap it in a GuardedBackend to be spared its bad days.
    """

    name = "ddgs"

    def __init__(
        self,
        timeout_s: float = 6.0,
        region: str = "us-en",
        safe: str = "moderate",
        age: str | None = None,
        news: bool = False,
        fetch: Fetch | None = None,
    ) -> None:
        self._timeout_s = timeout_s
        self._needs_network = fetch is None
        self._fetch = fetch or partial(_look_up, region=region, safe=safe, age=age, news=news)

    async def search(self, query: str, max_results: int) -> list[SearchHit]:
        query = sendable(query)
        if not query or max_results < 1:
            return []
        if self._needs_network and not has_network():
            raise NotAsked("there is no network")
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._timeout_s):
                rows = await loop.run_in_executor(_THREADS, self._fetch, query, max_results, self._timeout_s)
        except TimeoutError as error:
            raise TooSlow(f"no answer within {self._timeout_s:g} s") from error
        if not isinstance(rows, list):
            raise BackendUnavailable(f"ddgs returned {type(rows).__name__} instead of a list")
        hits = [_hit(row) for row in rows if isinstance(row, dict)]
        return [hit for hit in hits if hit is not None][:max_results]


def has_network() -> bool:
    """Is there a route to the outside, or a proxy? Asks the routing table only: no packet is sent, nothing waits."""
    if os.environ.get("DDGS_PROXY"):
        return True
    for family, address in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")):
        try:
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.connect((address, 53))  # a documentation address, RFC 5737 and RFC 3849
                return True
        except OSError:
            continue
    return False


def _hit(row: dict[str, Any]) -> SearchHit | None:
    """News rows name their publisher in `source`."""
    return web_hit(row.get("title"), row.get("body"), row.get("href") or row.get("url"), row.get("source"))


def _look_up(query: str, max_results: int, timeout_s: float, **options: Any) -> list[dict[str, Any]]:
    from tools.search.ddgs_engines import look_up  # ddgs loads all its engines: not before one is asked

    return look_up(query, max_results, timeout_s, **options)
