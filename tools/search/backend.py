"""The seam between the search tool and whatever finds things. A new backend is one file that fills this in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


class BackendUnavailable(RuntimeError):
    """This backend can't answer now; the next one should. The message says why."""


@dataclass(frozen=True)
class SearchHit:
    """`source` says whose knowledge it is; `url` is empty where there is no page to open."""

    title: str
    text: str
    source: str
    url: str = ""


class SearchBackend(Protocol):
    @property
    def name(self) -> str: ...

    async def search(self, query: str, max_results: int) -> list[SearchHit]:
        """Best first; empty when nothing was found. Raises BackendUnavailable when it couldn't look."""
        ...
