"""Search of the live web by ddgs, which is given up on quickly while the network or the service is away."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Callable
from typing import Any

from tools.search.backend import BackendUnavailable, SearchHit

Fetch = Callable[[str, int, float], list[dict[str, Any]]]
"""(query, max_results, timeout in seconds) -> rows with `title`, `body`, `href`."""


_MAX_COOLDOWN_S = 600.0


class DdgsBackend:
    """After a failure it isn't asked again for `cooldown_s`, doubled with each further failure up to ten minutes."""

    name = "ddgs"

    def __init__(self, timeout_s: float = 6.0, cooldown_s: float = 30.0, fetch: Fetch | None = None) -> None:
        self._timeout_s = timeout_s
        self._cooldown_s = cooldown_s
        self._fetch = fetch
        self._failures = 0
        self._reason = ""
        self._failed_at = 0.0
        self._retry_at = 0.0

    async def search(self, query: str, max_results: int) -> list[SearchHit]:
        wait = self._retry_at - time.monotonic()
        if wait > 0:
            raise BackendUnavailable(f"ddgs rests for another {wait:.0f} s after: {self._reason}")
        if self._fetch is None and not has_network():
            raise BackendUnavailable("there is no network")
        began = time.monotonic()
        try:
            async with asyncio.timeout(self._timeout_s + 1):  # ddgs limits each request, not them all
                rows = await asyncio.to_thread(self._fetch or _fetch, query[:400], max_results, self._timeout_s)
        except Exception as error:
            raise self._failed(error, began) from error
        self._failures = 0
        hits = [SearchHit(str(r.get("title", "")), str(r.get("body", "")), "web", str(r.get("href", ""))) for r in rows]
        return [hit for hit in hits if hit.text.strip() or hit.title.strip()][:max_results]

    def _failed(self, error: Exception, began: float) -> BackendUnavailable:
        reason = f"{type(error).__name__}: {error}"[:300]
        if began >= self._failed_at:  # calls that were under way together fail for one cause: it counts once
            self._failed_at = time.monotonic()
            self._retry_at = self._failed_at + min(self._cooldown_s * 2**self._failures, _MAX_COOLDOWN_S)
            self._failures += 1
            self._reason = reason
        return BackendUnavailable(reason)


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


def _fetch(query: str, max_results: int, timeout_s: float) -> list[dict[str, Any]]:
    from ddgs import DDGS
    from ddgs.exceptions import DDGSException

    try:
        return DDGS(timeout=max(1, round(timeout_s))).text(query, max_results=max_results)
    except DDGSException as error:
        if str(error) == "No results found.":  # that the web has nothing is an answer
            return []
        raise
