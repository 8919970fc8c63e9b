"""A circuit breaker: a backend that fails is left alone for a while, then tried by one look-up before by all.

Written here because the libraries' breakers (pybreaker, circuitbreaker, purgatory) rest for a fixed time, and this one
takes its time from the provider's Retry-After, and doubles it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tools.search.backend import BackendUnavailable, NotAsked, RateLimited, TooSlow

_LONGEST_RETRY_AFTER_S = 3600.0


class Breaker:
    """Opens after `tolerance` failed look-ups in a row, or after one that was refused for its rate or used up its time.

    It rests for `rest_s`, doubled with each further failure up to `longest_s`; a provider's longer Retry-After wins,
    up to an hour. Safe to use from several threads and event loops: it holds no loop's objects and waits for nothing.
    """

    def __init__(self, tolerance: int = 3, rest_s: float = 30.0, longest_s: float = 600.0) -> None:
        self._tolerance = tolerance
        self._rest_s = rest_s
        self._longest_s = longest_s
        self._lock = threading.Lock()
        self._failures = 0  # in a row, since the last success or rest
        self._rests = 0  # in a row, since the last success
        self._rested_at = 0.0  # end of the rest
        self._failed_at = float("-inf")
        self._probing = False
        self._reason = ""

    @contextmanager
    def trial(self) -> Iterator[None]:
        """Around one look-up. Raises NotAsked while the backend rests; learns from what the look-up raises."""
        probe = self._admit()
        began = time.monotonic()
        try:
            yield
        except NotAsked:
            self._leave(probe)
            raise
        except BackendUnavailable as error:
            self._failed(error, began, probe)
            raise
        except BaseException:  # cancelled: nothing was learnt
            self._leave(probe)
            raise
        else:
            self._succeeded(began, probe)

    def _admit(self) -> bool:
        """Whether this look-up is the one that tries after a rest."""
        with self._lock:
            if not self._rests:
                return False
            left = self._rested_at - time.monotonic()
            if left > 0:
                raise NotAsked(f"rests for another {left:.0f} s after: {self._reason}")
            if self._probing:
                raise NotAsked(f"is being tried again after: {self._reason}")
            self._probing = True
            return True

    def _leave(self, probe: bool) -> None:
        if probe:
            with self._lock:
                self._probing = False

    def _failed(self, error: BackendUnavailable, began: float, probe: bool) -> None:
        with self._lock:
            if probe:
                self._probing = False
            elif began < self._failed_at:
                return  # look-ups that were under way together fail for one cause: it counts once
            now = time.monotonic()
            self._failed_at = now
            self._reason = str(error)[:300]
            self._failures += 1
            if probe or self._failures >= self._tolerance or isinstance(error, RateLimited | TooSlow):
                rest_s = min(self._rest_s * 2**self._rests, self._longest_s)
                if isinstance(error, RateLimited) and error.retry_after_s is not None:
                    rest_s = max(rest_s, min(error.retry_after_s, _LONGEST_RETRY_AFTER_S))
                self._rested_at = now + rest_s
                self._rests = min(self._rests + 1, 30)
                self._failures = 0

    def _succeeded(self, began: float, probe: bool) -> None:
        with self._lock:
            if probe:
                self._probing = False
            elif began < self._failed_at:
                return  # older than the failure
            self._failures = self._rests = 0
