"""How often one provider is asked."""

from __future__ import annotations

import asyncio
import threading
import time

from pyrate_limiter import InMemoryBucket, Rate, RateItem

from tools.search.backend import NotAsked


class RateLimit:
    """At most `per_minute` turns in any minute, counted over any `window_s`; a share of one is a turn in several.

    Safe to use from several threads and event loops: the bucket is asked without waiting, and the waiting is done in
    the caller's own loop. (pyrate-limiter's `Limiter` would add a thread that tidies the bucket.)
    """

    def __init__(self, per_minute: float, window_s: float = 60.0) -> None:
        if not per_minute > 0:
            raise ValueError(f"A rate of {per_minute} look-ups per minute allows none; give a number above 0.")
        turns = max(1, int(per_minute * window_s / 60))
        self._per_minute = per_minute
        self._bucket = InMemoryBucket([Rate(turns, max(1, round(60_000 * turns / per_minute)))])
        self._lock = threading.Lock()

    async def turn(self, deadline: float) -> None:
        """Take a turn. Raises NotAsked at once if it would come after `deadline`, in `time.monotonic()` seconds."""
        while (wait_s := self._take()) > 0:
            if time.monotonic() + wait_s >= deadline:
                raise NotAsked(f"its {self._per_minute:g} look-ups a minute are used up; the next is in {wait_s:.0f} s")
            await asyncio.sleep(wait_s)

    def _take(self) -> float:
        """0.0 if a turn was taken, else seconds until it is worth asking again."""
        with self._lock:
            now_ms: int = self._bucket.now()
            self._bucket.leak(now_ms)
            item = RateItem("", now_ms)
            if self._bucket.put(item):
                return 0.0
            wait_ms = self._bucket.waiting(item)
            assert isinstance(wait_ms, int)  # awaitable for buckets that are elsewhere
            return max(wait_ms, 1) / 1000
