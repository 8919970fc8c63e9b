"""Turns whose end the store couldn't take when it came: kept in memory, and closed as soon as it takes it."""

from __future__ import annotations

import logging
import threading

from feedback_store import NotFound, Store, StoreError
from feedback_store.errors import InvalidRecord
from feedback_store.records import FinalStatus

log = logging.getLogger(__name__)


class Unclosed:
    """Closes turns. Thread-safe: answers end while the heartbeat retries."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._left: dict[str, tuple[str, FinalStatus, str]] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._left)

    def finish(self, turn_id: str, answer: str, status: FinalStatus, error: str = "") -> None:
        """As `Store.finish_turn`; where that fails, `retry` does it later. Blocks. Raises StoreError."""
        try:
            self._store.finish_turn(turn_id, answer, status, error)
        except (NotFound, InvalidRecord):
            raise  # it is closed, or gone
        except StoreError:
            with self._lock:
                self._left[turn_id] = (answer, status, error)
            raise

    def retry(self) -> int:
        """How many were closed. Blocks. Raises StoreError while the store still can't."""
        with self._lock:
            left = dict(self._left)
        closed = 0
        for turn_id, end in left.items():
            try:
                self._store.finish_turn(turn_id, *end)
                closed += 1
            except (NotFound, InvalidRecord) as error:
                log.warning("a turn isn't left open any more: %s", error)
            with self._lock:
                self._left.pop(turn_id, None)
        return closed
