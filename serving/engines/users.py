"""How many requests use a version, and when none does."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator


class Users:
    """`idle` is set while nothing is in flight."""

    def __init__(self) -> None:
        self._count = 0
        self.idle = asyncio.Event()
        self.idle.set()

    @contextlib.contextmanager
    def one(self) -> Iterator[None]:
        """One more, until the block ends."""
        self._count += 1
        self.idle.clear()
        try:
            yield
        finally:
            self._count -= 1
            if not self._count:
                self.idle.set()
