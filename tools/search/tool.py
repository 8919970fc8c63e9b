"""The tool "search": asks its backends in order and writes what was found in a few lines."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any, Literal

from langchain_core.tools import BaseTool
from pydantic import BaseModel, ConfigDict, Field

from tools.search.backend import BackendUnavailable, Lookup, SearchBackend, SearchHit, utc_now
from tools.search.guarded import GuardedBackend
from tools.search.web import one_line

_ERROR_CHARS = 1000


class SearchInput(BaseModel):
    query: str = Field(description="What to look up, in a few words or as a question.")


class SearchTool(BaseTool):
    """The first backend that finds something answers. Nothing is raised: what failed is in the artifact.

    The artifact has `backend` (None if none answered), `sources` (title, url, source, retrieved_at in ISO 8601 UTC),
    `tried` (backend, error, seconds; error is empty for one that found nothing), `cached` and `error`, which is true
    only if every backend failed.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    name: str = "search"
    description: str = "Look up facts: countries, cities, chemical elements, and the web where there is a network."
    args_schema: type[BaseModel] = SearchInput
    response_format: Literal["content", "content_and_artifact"] = "content_and_artifact"
    backends: Sequence[Any]  # of SearchBackend: pydantic can't check a protocol's methods
    max_results: int = 1
    max_chars: int = 600

    async def _arun(self, query: str, **_: Any) -> tuple[str, dict[str, Any]]:
        if not one_line(query):
            return "The query is empty.", {**_artifact([]), "error": True}
        tried: list[dict[str, Any]] = []
        backend: SearchBackend
        for backend in self.backends:
            began = time.monotonic()
            error = ""
            try:
                lookup = await _look_up(backend, query, self.max_results)
                if lookup.hits:
                    artifact = _artifact(tried, backend.name, lookup)
                    return observation(list(lookup.hits), self.max_chars), artifact
            except BackendUnavailable as unavailable:
                error = str(unavailable) or "unavailable"
            except Exception as fault:  # a backend's fault must not cost the answer, whatever it is
                error = f"{type(fault).__name__}: {fault}"
            seconds = round(time.monotonic() - began, 3)
            tried.append({"backend": backend.name, "error": one_line(error)[:_ERROR_CHARS], "seconds": seconds})
        artifact = _artifact(tried)
        if artifact["error"]:
            reasons = "; ".join(f"{attempt['backend']}: {attempt['error']}" for attempt in tried)
            return f"Search is unavailable. {reasons}"[: self.max_chars], artifact
        return f"Nothing found for: {one_line(query)[:100]}", artifact

    def _run(self, query: str, **_: Any) -> tuple[str, dict[str, Any]]:
        return asyncio.run(self._arun(query))


async def _look_up(backend: SearchBackend, query: str, max_results: int) -> Lookup:
    if isinstance(backend, GuardedBackend):
        return await backend.look_up(query, max_results)
    return Lookup(tuple(await backend.search(query, max_results)), utc_now())


def _artifact(tried: list[dict[str, Any]], backend: str | None = None, lookup: Lookup | None = None) -> dict[str, Any]:
    sources = [
        {
            "title": one_line(hit.title),
            "url": one_line(hit.url),
            "source": one_line(hit.source),
            "retrieved_at": lookup.retrieved_at,
        }
        for hit in (lookup.hits if lookup else ())
        if lookup
    ]
    return {
        "error": lookup is None and all(attempt["error"] for attempt in tried),
        "backend": backend,
        "sources": sources,
        "cached": lookup is not None and lookup.cached,
        "tried": tried,
    }


def observation(hits: list[SearchHit], max_chars: int) -> str:
    """A line `Title: text` a hit, each with an equal share of the budget, what one leaves going to the next."""
    lines: list[str] = []
    left = max_chars
    for number, hit in enumerate(hits):
        share = left // (len(hits) - number) - (number > 0)
        line = one_line(f"{hit.title}: {hit.text}")
        if len(line) > share:
            line = line[: max(share - 4, 0)].rsplit(" ", 1)[0] + " ..."
        if share < 5:
            break
        lines.append(line)
        left -= len(line) + (number > 0)
    return "\n".join(lines)
