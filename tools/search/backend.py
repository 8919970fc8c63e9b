"""The seam between the search tool and whatever finds things. A new backend is one file that fills this in."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Protocol


class BackendUnavailable(RuntimeError):
    """This backend can't answer now; the next one should. The message says why."""


class NotAsked(BackendUnavailable):
    """Nothing was sent, so that this says nothing about the backend's health: no network, no turn, a rest."""


class Passing(BackendUnavailable):
    """A moment's trouble, such as a dropped connection: asking again within the same look-up is worth a try."""


class TooSlow(BackendUnavailable):
    """It used up the time that a look-up has."""


class RateLimited(BackendUnavailable):
    """It was asked too often. `retry_after_s` is when it wants to be asked again, if it said so."""

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


@dataclass(frozen=True)
class SearchHit:
    """`source` says whose knowledge it is; `url` is empty where there is no page to open."""

    title: str
    text: str
    source: str
    url: str = ""


@dataclass(frozen=True)
class Lookup:
    """What a backend found. `retrieved_at` (ISO 8601, UTC) is when it was asked; `cached` whether that was earlier."""

    hits: tuple[SearchHit, ...]
    retrieved_at: str
    cached: bool = False


class SearchBackend(Protocol):
    @property
    def name(self) -> str: ...

    async def search(self, query: str, max_results: int) -> list[SearchHit]:
        """Best first; empty when nothing was found. Raises BackendUnavailable when it couldn't look."""
        ...


def utc_now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
