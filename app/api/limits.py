"""How often a key may call: requests a minute and answers at once, counted in this process.

Where no key is needed there is no such limit: one person on one machine is held by `max_answers` alone. Several
endpoint processes count each for itself.
"""

from __future__ import annotations

from math import ceil

from cachetools import TTLCache
from pyrate_limiter import InMemoryBucket, Rate, RateItem
from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.errors import ApiError
from app.keys import Holder
from app.owners import LOCAL_OWNER
from app.settings import Settings

ANSWER_PATHS = frozenset({"/v1/chat/completions", "/v1/responses"})
UNCOUNTED = frozenset({"/healthz", "/metrics"})  # asked by machines that watch this one
_MINUTE_MS = 60_000
_OWNERS = 10_000  # buckets kept; one that nobody used for a minute is empty, and may go


class Limits:
    """ASGI middleware, inside the guard. OpenAI's headers tell a client where it stands; 429 says when to try again."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.app = app
        self._per_minute = settings.requests_per_minute
        self._at_once = settings.answers_per_key
        self._buckets: TTLCache[tuple[str, int], InMemoryBucket] = TTLCache(_OWNERS, 2 * _MINUTE_MS / 1000)
        self._answering: dict[str, int] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        holder: Holder | None = scope.get("state", {}).get("holder")
        if scope["type"] != "http" or holder is None or holder.owner == LOCAL_OWNER or scope["path"] in UNCOUNTED:
            await self.app(scope, receive, send)
            return
        try:
            told = self._count(holder)
            places = None
            if scope["method"] == "POST" and scope["path"] in ANSWER_PATHS:
                places = scope["state"]["places"] = _Places(self._answering, holder, self._at_once, told)
                places.take(1)
        except ApiError as error:
            await error.response()(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(told)
            await send(message)

        try:
            await self.app(scope, receive, send_with_headers)
        finally:
            if places is not None:
                places.give_back()

    def _count(self, holder: Holder) -> dict[str, str]:
        """The headers that say where the holder stands, this request counted. Raises ApiError where it is one too many.

        A request that is refused doesn't count, so a client that waits as it is told gets through.
        """
        limit = holder.requests_per_minute or self._per_minute
        if limit is None:
            return {}
        bucket = self._buckets.get((holder.owner, limit)) or InMemoryBucket([Rate(limit, _MINUTE_MS)])
        self._buckets[holder.owner, limit] = bucket  # anew: its time to live begins again
        now: int = bucket.now()
        bucket.leak(now)
        item = RateItem("", now)
        taken = bucket.put(item)
        wait_ms = 0 if taken else max(1, int(bucket.waiting(item)))  # type: ignore[arg-type]  # no awaitable in memory
        oldest = bucket.peek(bucket.count() - 1)
        reset_s = (oldest.timestamp + _MINUTE_MS - now) / 1000 if oldest else 0.0
        told = {
            "x-ratelimit-limit-requests": str(limit),
            "x-ratelimit-remaining-requests": str(max(0, limit - bucket.count())),
            "x-ratelimit-reset-requests": f"{max(0.0, reset_s):.1f}s",
        }
        if not taken:
            raise ApiError(
                429,
                f"the key {holder.name!r} has made its {limit} requests of this minute: try again in "
                f"{ceil(wait_ms / 1000)} s.",
                "rate_limit_exceeded",
                headers=told | {"Retry-After": str(ceil(wait_ms / 1000)), "retry-after-ms": str(wait_ms)},
            )
        return told


class _Places:
    """What one request has of its key's answers at once: one from the start, more once the body says how many."""

    def __init__(self, answering: dict[str, int], holder: Holder, at_once: int | None, told: dict[str, str]) -> None:
        """`answering`: each owner's answers under way. `told`: headers that go with a refusal."""
        self._answering = answering
        self._holder = holder
        self._limit = holder.answers_at_once or at_once
        self._told = told
        self._taken = 0

    def take(self, count: int) -> None:
        """Raises ApiError where the key would have more answers under way than it may."""
        owner, limit = self._holder.owner, self._limit
        under_way = self._answering.get(owner, 0)
        others, wanted = under_way - self._taken, self._taken + count
        if limit is not None and wanted > limit:
            raise ApiError(
                400,
                f"n: the key {self._holder.name!r} may have {limit} answer{'s' if limit > 1 else ''} at once: ask for "
                "fewer.",
                "invalid_value",
                "n",
            )
        if limit is not None and others + wanted > limit:
            more = f" and asks for {wanted} more" if wanted > 1 else ""
            raise ApiError(
                429,
                f"the key {self._holder.name!r} has {others} answer{'s' if others > 1 else ''} under way{more}; its "
                f"limit is {limit}: try again when one has ended.",
                "concurrency_limit_exceeded",
                headers=self._told | {"Retry-After": "2"},
            )
        self._answering[owner] = under_way + count
        self._taken += count

    def give_back(self) -> None:
        owner = self._holder.owner
        left = self._answering.get(owner, 0) - self._taken
        self._taken = 0
        if left > 0:
            self._answering[owner] = left
        else:
            self._answering.pop(owner, None)


def take_places(request: Request, count: int) -> None:
    """Have a request that asks for several answers counted as so many. Raises ApiError."""
    places: _Places | None = getattr(request.state, "places", None)
    if places is not None and count:
        places.take(count)
