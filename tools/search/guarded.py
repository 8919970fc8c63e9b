"""A web backend that can be relied on to answer or to give up within its time, whatever the web does."""

from __future__ import annotations

import asyncio
import time

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, stop_after_attempt, stop_before_delay
from tenacity.wait import wait_exponential_jitter

from tools.search.backend import (
    BackendUnavailable,
    Lookup,
    Passing,
    RateLimited,
    SearchBackend,
    SearchHit,
    TooSlow,
    utc_now,
)
from tools.search.breaker import Breaker
from tools.search.cache import LookupCache
from tools.search.rate import RateLimit
from tools.search.web import sendable

_TRIES = 3
_LAST_TRY = 0.8  # of the budget: a try that starts later would hardly be answered
_BACKOFF = wait_exponential_jitter(initial=0.25, max=2.0, jitter=0.25)


class GuardedBackend:
    """`backend` behind a cache, a circuit breaker, a rate limit and retries, all within `budget_s` a look-up.

    Each guarded backend has its own of all four: its cache needs no key for options that are fixed. The rate counts
    every request, retries too. Safe to use from several threads and event loops if `backend` is.
    """

    def __init__(
        self,
        backend: SearchBackend,
        budget_s: float = 6.0,
        per_minute: float = 30.0,
        cache_s: float = 900.0,
        breaker: Breaker | None = None,
    ) -> None:
        self._backend = backend
        self._budget_s = budget_s
        self._rate = RateLimit(per_minute)
        self._cache = LookupCache(cache_s)
        self._breaker = breaker or Breaker()

    @property
    def name(self) -> str:
        return self._backend.name

    async def search(self, query: str, max_results: int) -> list[SearchHit]:
        return list((await self.look_up(query, max_results)).hits)

    async def look_up(self, query: str, max_results: int) -> Lookup:
        """Like `search`, and says when. Raises nothing but BackendUnavailable and its own cancellation."""
        query = sendable(query)
        if not query or max_results < 1:
            return Lookup((), utc_now())
        return await self._cache.get((query.casefold(), max_results), lambda: self._ask(query, max_results))

    async def _ask(self, query: str, max_results: int) -> Lookup:
        deadline = time.monotonic() + self._budget_s
        retrying = AsyncRetrying(
            retry=retry_if_exception(_worth_another_try),
            wait=_pause,
            stop=stop_after_attempt(_TRIES) | stop_before_delay(_LAST_TRY * self._budget_s),
            reraise=True,
        )
        with self._breaker.trial():
            try:
                async with asyncio.timeout(self._budget_s):
                    hits: list[SearchHit] = await retrying(self._try, query, max_results, deadline)
            except TimeoutError as error:
                raise TooSlow(f"no answer within {self._budget_s:g} s") from error
            except BackendUnavailable:
                raise
            except Exception as error:  # a fault of the backend's own, such as rows of a new shape
                raise BackendUnavailable(f"{type(error).__name__}: {error}"[:300]) from error
        return Lookup(tuple(hits), utc_now())

    async def _try(self, query: str, max_results: int, deadline: float) -> list[SearchHit]:
        await self._rate.turn(deadline)
        hits = await self._backend.search(query, max_results)
        if not isinstance(hits, list) or not all(isinstance(hit, SearchHit) for hit in hits):
            raise BackendUnavailable(f"it returned {type(hits).__name__} instead of a list of hits")
        return hits[:max_results]


def _worth_another_try(error: BaseException) -> bool:
    """A refusal for the rate is, once the time that it names is over; without such a time it's left alone."""
    return isinstance(error, Passing) or (isinstance(error, RateLimited) and error.retry_after_s is not None)


def _pause(state: RetryCallState) -> float:
    error = state.outcome.exception() if state.outcome else None
    told = error.retry_after_s if isinstance(error, RateLimited) else None
    return max(told or 0.0, _BACKOFF(state))
