"""Look-ups kept for a while, and look-ups under way shared by all who ask the same."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

from cachetools import TTLCache

from tools.search.backend import Lookup


@dataclass
class _Flight:
    task: asyncio.Task[Lookup]
    waiting: int = 0


class LookupCache:
    """Keeps up to `size` look-ups that found something, each for `seconds`; 0 keeps none, and still shares.

    What was kept is for all threads and event loops; a look-up under way is shared within one loop.
    """

    def __init__(self, seconds: float, size: int = 1024) -> None:
        self._kept: TTLCache[Hashable, Lookup] = TTLCache(maxsize=size, ttl=seconds)
        self._lock = threading.Lock()
        self._flights: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[Hashable, _Flight]] = WeakKeyDictionary()

    async def get(self, key: Hashable, ask: Callable[[], Awaitable[Lookup]]) -> Lookup:
        """What is kept under `key`, or what `ask` finds. Raises what `ask` raises; a failure isn't kept.

        Cancelling a caller cancels `ask` only if nobody else waits for it.
        """
        with self._lock:
            kept = self._kept.get(key)
        if kept is not None:
            return replace(kept, cached=True)
        with self._lock:
            flights = self._flights.setdefault(asyncio.get_running_loop(), {})
        flight = flights.get(key)
        if flight is None:
            flight = flights[key] = _Flight(asyncio.create_task(self._ask(key, ask)))
            flight.task.add_done_callback(lambda task: _landed(flights, key, task))
        flight.waiting += 1
        try:
            return await asyncio.shield(flight.task)
        finally:
            flight.waiting -= 1
            if not flight.waiting and not flight.task.done():
                _forget(flights, key, flight.task)
                flight.task.cancel()

    async def _ask(self, key: Hashable, ask: Callable[[], Awaitable[Lookup]]) -> Lookup:
        lookup = await ask()
        if lookup.hits:
            with self._lock:
                self._kept[key] = lookup
        return lookup


def _landed(flights: dict[Hashable, _Flight], key: Hashable, task: asyncio.Task[Lookup]) -> None:
    _forget(flights, key, task)
    if not task.cancelled():
        task.exception()  # whoever asked has it, or has left


def _forget(flights: dict[Hashable, _Flight], key: Hashable, task: asyncio.Task[Lookup]) -> None:
    flight = flights.get(key)
    if flight is not None and flight.task is task:
        del flights[key]
