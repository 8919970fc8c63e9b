"""The tool "search": asks its backends in order and writes what was found in a few lines."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from typing import Any, Literal

from langchain_core.tools import BaseTool
from pydantic import BaseModel, ConfigDict, Field

from tools.search.backend import BackendUnavailable, SearchBackend, SearchHit
from tools.text import clean


class SearchInput(BaseModel):
    query: str = Field(description="What to look up, in a few words or as a question.")


class SearchTool(BaseTool):
    """The first backend that finds something answers. Nothing is raised: what failed is in the artifact.

    The artifact has `backend` (None if none answered), `hits` (title, source, url), `tried` (backend, error) and
    `error`, which is true only if every backend failed.
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
        tried: list[dict[str, str]] = []
        backend: SearchBackend
        for backend in self.backends:
            try:
                hits = await backend.search(query, self.max_results)
            except BackendUnavailable as error:
                tried.append({"backend": backend.name, "error": str(error)})
                continue
            except Exception as error:  # a backend's fault must not cost the answer, whatever it is
                tried.append({"backend": backend.name, "error": f"{type(error).__name__}: {error}"})
                continue
            if hits:
                sources = [{"title": hit.title, "source": hit.source, "url": hit.url} for hit in hits]
                artifact = {"error": False, "backend": backend.name, "hits": sources, "tried": tried}
                return observation(hits, self.max_chars), artifact
            tried.append({"backend": backend.name, "error": ""})
        failed = [attempt for attempt in tried if attempt["error"]]
        artifact = {"error": len(failed) == len(tried), "backend": None, "hits": [], "tried": tried}
        if artifact["error"]:
            reasons = "; ".join(f"{attempt['backend']}: {attempt['error']}" for attempt in failed)
            return f"Search is unavailable. {reasons}"[: self.max_chars], artifact
        return f"Nothing found for: {_one_line(query)[:100]}", artifact

    def _run(self, query: str, **_: Any) -> tuple[str, dict[str, Any]]:
        return asyncio.run(self._arun(query))


def observation(hits: list[SearchHit], max_chars: int) -> str:
    """A line `Title: text` a hit, each with an equal share of the budget, what one leaves going to the next."""
    lines: list[str] = []
    left = max_chars
    for number, hit in enumerate(hits):
        share = left // (len(hits) - number) - (number > 0)
        line = _one_line(f"{hit.title}: {hit.text}")
        if len(line) > share:
            line = line[: max(share - 4, 0)].rsplit(" ", 1)[0] + " ..."
        if share < 5:
            break
        lines.append(line)
        left -= len(line) + (number > 0)
    return "\n".join(lines)


def _one_line(text: str) -> str:
    return re.sub(r"\s+", " ", clean(text)).strip()
