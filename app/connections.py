"""The connections below the endpoint and the chat: how many there may be, and how long a client may take to ask.

uvicorn waits for ever for a request that was begun, or never is. Here a request has 20 seconds, and two more for every
kilobyte that came, or its connection is closed: enough for the slowest modem, and too little for one who opens
thousands and says a byte a minute. A head is 64 kB at most (uvicorn's own limit), a body what the settings allow.
"""

from __future__ import annotations

import asyncio
import resource
from typing import cast

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

KEEP_ALIVE_SECONDS = 75
"""Longer than clients and balancers keep an idle connection (httpx 5 s, AWS 60 s): who closes first must be the one who
asks, else a request may meet a connection that is just being closed."""

_OPEN_FILES = 65_536
_LATE = b"HTTP/1.1 408 Request Timeout\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"


class PatientH11(H11Protocol):
    """HTTP/1.1 as uvicorn speaks it, whose clients have so many seconds for a request and as many bytes a second."""

    seconds = 20.0
    bytes_per_second = 500.0

    _deadline: asyncio.TimerHandle | None = None
    _began = 0.0
    _got = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        if self._deadline is None and self._waiting:
            self._wait()  # the next request of a connection that was kept
        self._got += len(data)
        super().data_received(data)
        if not self._waiting:
            self._stop()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        super().connection_lost(exc)

    def handle_websocket_upgrade(self, event: h11.Request) -> None:
        self._stop()
        super().handle_websocket_upgrade(event)

    @property
    def _waiting(self) -> bool:
        """For a request, or for the rest of one."""
        cycle = self.cycle
        return cast("object", cycle) is None or cycle.response_complete or cycle.more_body

    def _wait(self) -> None:
        self._began, self._got = self.loop.time(), 0
        self._deadline = self.loop.call_later(self.seconds, self._look)

    def _stop(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _look(self) -> None:
        left = self._began + self.seconds + self._got / self.bytes_per_second - self.loop.time()
        if self.flow.read_paused:  # it is we who don't read
            left = max(left, 1.0)
        if left > 0:
            self._deadline = self.loop.call_later(left, self._look)
            return
        self._deadline = None
        asking = cast("object", self.cycle) is not None and not self.cycle.response_complete
        if self._got and not (asking and self.cycle.response_started):
            self.transport.write(_LATE)
        self.transport.close()


def raise_open_files() -> int:
    """Let this process open as many files, and so connections, as it may (at most 65,536); returns how many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        return wanted
    return soft if soft != resource.RLIM_INFINITY else _OPEN_FILES
