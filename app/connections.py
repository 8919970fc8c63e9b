"""The connections below the endpoint and the chat: how many there may be, and how long a client may take to ask and to
read.

uvicorn waits for ever for a request that was begun, or never is. Here a request has 20 seconds, and two more for every
kilobyte that came, or its connection is closed: enough for the slowest modem, and too little for one who opens
thousands and says a byte a minute. A head is 64 kB at most (uvicorn's own limit), a body what the settings allow.

Nor does uvicorn give up one who doesn't read, whose answer then holds its place in the engine. Here, one who is behind
has to take 15 kB every 30 seconds, or the connection is cut off.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import resource
import struct
import termios
from typing import cast

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

log = logging.getLogger(__name__)

KEEP_ALIVE_SECONDS = 75
"""Longer than clients and balancers keep an idle connection (httpx 5 s, AWS 60 s): who closes first must be the one who
asks, else a request may meet a connection that is just being closed."""

_OPEN_FILES = 65_536
_LATE = b"HTTP/1.1 408 Request Timeout\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"


class PatientH11(H11Protocol):
    """HTTP/1.1 as uvicorn speaks it, whose clients have so many seconds for a request and as many bytes a second.

    One who is behind in reading takes as many bytes a second, in every `reading_seconds` that it stays so."""

    seconds = 20.0
    reading_seconds = 30.0
    bytes_per_second = 500.0

    _reading: asyncio.TimerHandle | None = None
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
        self._stop_reading()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stop_reading()
        self._wait_for_reading()

    def resume_writing(self) -> None:
        self._stop_reading()
        super().resume_writing()

    def handle_websocket_upgrade(self, event: h11.Request) -> None:
        self._stop()
        self._stop_reading()
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

    def _wait_for_reading(self) -> None:
        self._reading = self.loop.call_later(self.reading_seconds, self._look_at_reading, self._unread())

    def _stop_reading(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None

    def _look_at_reading(self, before: int) -> None:
        if before - self._unread() < self.reading_seconds * self.bytes_per_second:
            log.warning("a client is too slow to read its answer: its connection is cut off")
            self.transport.abort()
        else:
            self._wait_for_reading()

    def _unread(self) -> int:
        """Bytes that wait here and in the kernel for the client. Nothing is added while writing is paused."""
        kernel = 0
        told = self.transport.get_extra_info("socket")
        if told is not None:
            try:
                (kernel,) = struct.unpack("i", fcntl.ioctl(told.fileno(), termios.TIOCOUTQ, b"\0" * 4))
            except OSError as error:  # a system that doesn't tell: what waits here has to do
                log.debug("the kernel doesn't tell what a client has to read: %s", error)
        return self.transport.get_write_buffer_size() + kernel


def raise_open_files() -> int:
    """Let this process open as many files, and so connections, as it may (at most 65,536); returns how many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        return wanted
    return soft if soft != resource.RLIM_INFINITY else _OPEN_FILES
