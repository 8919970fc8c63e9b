"""Search of the live web by a SearXNG instance of the operator's choice, over its JSON format."""

from __future__ import annotations

import asyncio
import json
import re
import ssl
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cache
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import httpx

from tools.search.backend import BackendUnavailable, Passing, RateLimited, SearchHit, TooSlow
from tools.search.web import one_line, sendable, web_hit

_SAFE = {"on": "2", "moderate": "1", "off": "0"}
_MAX_BYTES = 2_000_000  # an answer has about 30 kB
_CONNECT_S = 2.0
_HEADERS = {
    "Accept": "application/json",
    "Accept-Encoding": "identity",  # so that the limit on bytes is one on memory
    "User-Agent": "Mozilla/5.0 (compatible; Whetstone)",
}


class SearxngBackend:
    """`url` is the instance's address, with its path if it has one. Raises ValueError if that isn't http or https.

    A client is made for each look-up: it would belong to one event loop. Redirects aren't followed: a `!!bang` in a
    query makes SearXNG redirect to another site.
    """

    name = "searxng"

    def __init__(
        self,
        url: str,
        timeout_s: float = 6.0,
        region: str = "us-en",
        safe: str = "moderate",
        age: str | None = None,
        news: bool = False,
    ) -> None:
        self._url = endpoint(url)
        self._timeout_s = timeout_s
        self._parameters = {
            "format": "json",
            "language": _language(region),
            "safesearch": _SAFE[safe],
            "categories": "news" if news else "general",
            **({"time_range": age} if age else {}),
        }

    async def search(self, query: str, max_results: int) -> list[SearchHit]:
        query = _plain(sendable(query))
        if not query or max_results < 1:
            return []
        try:
            async with asyncio.timeout(self._timeout_s):
                body = await self._get({"q": query, **self._parameters})
        except TimeoutError as error:
            raise TooSlow(f"no answer within {self._timeout_s:g} s") from error
        return _hits(body)[:max_results]

    async def _get(self, parameters: dict[str, str]) -> bytes:
        timeout = httpx.Timeout(self._timeout_s, connect=min(_CONNECT_S, self._timeout_s))
        try:
            async with (
                httpx.AsyncClient(headers=_HEADERS, timeout=timeout, verify=_certificates()) as client,
                client.stream("GET", self._url, params=parameters) as response,
            ):
                _check(response)
                body = bytearray()
                async for chunk in response.aiter_raw():
                    body += chunk
                    if len(body) > _MAX_BYTES:
                        raise BackendUnavailable(f"it sent more than {_MAX_BYTES // 1_000_000} MB")
                return bytes(body)
        except httpx.TimeoutException as error:
            raise Passing(f"{type(error).__name__}: nothing was heard in time") from error
        except httpx.HTTPError as error:  # refused, reset, no such host, no network, not HTTP at all
            raise Passing(f"{type(error).__name__}: {error}"[:300]) from error


def endpoint(url: str) -> str:
    """The address of its search, whichever of its pages `url` is. ValueError names what is wrong."""
    way_out = "Give the address of a SearXNG instance, such as http://127.0.0.1:8888."
    try:
        parts = urlsplit(url.strip())
        known = parts.scheme.lower() in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError as error:
        raise ValueError(f"The SearXNG address {url!r} can't be read: {error}. {way_out}") from error
    if not known:
        raise ValueError(f"The SearXNG address {url!r} isn't http or https. {way_out}")
    path = parts.path.rstrip("/").removesuffix("/search")
    return urlunsplit((parts.scheme, parts.netloc, f"{path}/search", "", ""))


def _check(response: httpx.Response) -> None:
    status = response.status_code
    if status == 200:
        return
    if status == 403:
        raise BackendUnavailable(
            "HTTP 403: its JSON format is off. Enable `search.formats: json` in the instance's settings.yml: "
            "formats: [html, json]"
        )
    retry_after_s = _retry_after(response.headers.get("Retry-After", ""))
    if status == 429 or (status == 503 and retry_after_s is not None):
        raise RateLimited(f"HTTP {status}: its limiter says that it is asked too often", retry_after_s)
    if 300 <= status < 400:
        target = one_line(response.headers.get("Location", "")).split("?")[0][:200]
        raise BackendUnavailable(f"HTTP {status}: it redirects to {target!r}; if that is its address, set searxng_url")
    if status >= 500:
        raise Passing(f"HTTP {status} {response.reason_phrase}"[:100])
    raise BackendUnavailable(f"HTTP {status} {response.reason_phrase}: is the address right?"[:200])


def _hits(body: bytes) -> list[SearchHit]:
    """Results, then infoboxes. Raises BackendUnavailable if `body` isn't SearXNG's, or if none of its engines works."""
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise BackendUnavailable(f"its answer isn't JSON: {one_line(body[:80].decode(errors='replace'))!r}") from error
    if not isinstance(answer, dict) or not isinstance(answer.get("results"), list):
        raise BackendUnavailable("its answer is JSON without a list of results: is the address a SearXNG instance's?")
    hits = [web_hit(row.get("title"), row.get("content"), row.get("url")) for row in answer["results"] if _is_row(row)]
    for box in _list(answer.get("infoboxes")):
        if _is_row(box):
            links = [link.get("url") for link in _list(box.get("urls")) if _is_row(link)]
            hits.append(web_hit(box.get("infobox"), box.get("content"), next(iter(links), "")))
    found = [hit for hit in hits if hit is not None]
    silent = [
        ": ".join(map(str, row[:2])) for row in _list(answer.get("unresponsive_engines")) if isinstance(row, list)
    ]
    if not found and silent:  # it found nothing because it couldn't look
        raise BackendUnavailable(f"its engines don't answer ({one_line(', '.join(silent))[:200]})")
    return found


def _is_row(value: Any) -> bool:
    return isinstance(value, dict)


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _plain(query: str) -> str:
    """Without SearXNG's own syntax (`!engine`, `:language`, `<seconds`): a query chooses what to look for only."""
    return re.sub(r"(?<!\S)[!:<?]+(?=\S)", "", query).strip()


def _language(region: str) -> str:
    """ddgs's country-language as SearXNG's language-COUNTRY."""
    country, _, language = region.partition("-")
    return "all" if country == "wt" or not language else f"{language}-{country.upper()}"


def _retry_after(value: str) -> float | None:
    """Seconds, from a Retry-After header of either form."""
    if value.strip().isdecimal():
        return float(value)
    try:
        when = parsedate_to_datetime(value)
    except ValueError:
        return None
    when = when if when.tzinfo else when.replace(tzinfo=UTC)
    return max(0.0, (when - datetime.now(UTC)).total_seconds())


@cache
def _certificates() -> ssl.SSLContext:
    """Read once: it takes longer than a look-up on the local network."""
    return httpx.create_ssl_context()
