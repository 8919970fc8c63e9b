"""One look-up by ddgs with its outcomes told apart: found, nothing there, refused, too slow, failed.

ddgs itself reports every status but 200 as "No results found."; here each engine's statuses are noted on the way.
"""

from __future__ import annotations

import time
from typing import Any

from ddgs.base import BaseSearchEngine
from ddgs.ddgs import DDGS  # ddgs.DDGS is a proxy that can't be subclassed
from ddgs.engines import ENGINES
from ddgs.exceptions import DDGSException, RatelimitException, TimeoutException

from tools.search.backend import BackendUnavailable, Passing, RateLimited, TooSlow

_AGES = {"day": "d", "week": "w", "month": "m", "year": "y"}
_ENCYCLOPEDIAS = {"wikipedia", "grokipedia"}  # 200 with nothing is all they say to a question
_AGELESS = {*_ENCYCLOPEDIAS, "mojeek"}  # engines that ignore how old a page may be
_REFUSALS = {202, 403, 418, 429, 503}  # 202 is DuckDuckGo's
_SHARE = 3  # one request may take a third of a look-up's time: the next engine gets its chance


def look_up(
    query: str, max_results: int, timeout_s: float, region: str, safe: str, age: str | None, news: bool
) -> list[dict[str, Any]]:
    """Rows with `title`, `body`, and `href` or `url`; news have `source` too. Blocks for little more than `timeout_s`.

    Raises RateLimited if the engines refused, Passing if they failed, TooSlow or plain BackendUnavailable if none could
    be reached: all of them have been tried then, so that the same again would help nobody. How long an engine's page
    may be is ddgs's own affair.
    """
    category = "news" if news else "text"
    backend = "auto"  # ddgs's own order, from one engine to the next until there are results enough
    if age and not news:
        backend = ",".join(name for name in ENGINES[category] if name not in _AGELESS)
    watch = _Watch(deadline=time.monotonic() + timeout_s)
    search = _WatchedDDGS(watch, timeout=max(1, round(timeout_s / _SHARE)))
    try:
        return getattr(search, category)(  # type: ignore[no-any-return]
            query,
            region=region,
            safesearch=safe,
            timelimit=_AGES[age] if age else None,
            max_results=max_results,
            backend=backend,
        )
    except DDGSException as error:
        return _nothing(error, watch)


def _nothing(error: DDGSException, watch: _Watch) -> list[dict[str, Any]]:
    """No rows if that is what the web has; else raises why nobody could say."""
    said = [(name, code) for name, code in watch.statuses if name not in _ENCYCLOPEDIAS]
    if any(code == 200 for _, code in said):
        return []
    refused = [f"{name} {code}" for name, code in said if code in _REFUSALS]
    if refused or isinstance(error, RatelimitException):
        raise RateLimited(f"its engines refuse ({', '.join(refused) or error})"[:300]) from error
    if said:
        raise Passing(f"its engines fail ({', '.join(f'{name} {code}' for name, code in said)})"[:300]) from error
    if isinstance(error, TimeoutException):
        raise TooSlow("its engines time out") from error
    if str(error) == "No results found.":
        return []
    kind = str(error).split(":")[0][:80]  # what follows names an engine's address, with the query
    raise BackendUnavailable(f"none of its engines can be reached ({kind})") from error


class _Watch:
    """`statuses`: (engine, HTTP status) of each response. Nothing is sent after `deadline` (`time.monotonic()`)."""

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline
        self.statuses: list[tuple[str, int]] = []


class _WatchedDDGS(DDGS):
    """Should ddgs rename the method that is overridden here, only the watching is lost."""

    def __init__(self, watch: _Watch, timeout: int) -> None:
        super().__init__(timeout=timeout)
        self._watch = watch

    def _get_engines(self, category: str, backend: str) -> list[BaseSearchEngine[Any]]:
        engines = super()._get_engines(category, backend)
        for engine in engines:
            if not isinstance(engine.http_client, _WatchedClient):
                engine.http_client = _WatchedClient(engine.http_client, self._watch, engine.name)  # type: ignore[assignment]
        return engines


class _WatchedClient:
    """An engine's HTTP client that notes each status, and sends nothing more once the look-up's time is over."""

    def __init__(self, client: Any, watch: _Watch, engine: str) -> None:
        self._client = client
        self._watch = watch
        self._engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def request(self, *args: Any, **kwargs: Any) -> Any:
        if time.monotonic() >= self._watch.deadline:
            raise TimeoutException("the look-up timed out")
        response = self._client.request(*args, **kwargs)
        self._watch.statuses.append((self._engine, response.status_code))
        return response
