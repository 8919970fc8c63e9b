"""Downloads one page: within a size and a deadline, through checked redirects, decompressed no further than needed."""

from __future__ import annotations

import asyncio
import re
import socket
import ssl
import zlib
from dataclasses import dataclass
from email.message import Message
from functools import cache
from http import HTTPStatus

import httpcore
import httpx

from tools.documents.formats import HTML, PDF
from tools.fetch.guard import Guard, PinnedNetwork, Refused, certificate_fault

MAX_REDIRECTS = 5
_REDIRECTS = {301, 302, 303, 307, 308}
_JSON = re.compile(r"application/(?:[\w.+-]+\+)?json")
_HEADERS = [
    (b"User-Agent", b"Mozilla/5.0 (compatible; Whetstone; opens single pages for a person)"),
    (b"Accept", b"text/html,application/xhtml+xml,application/pdf;q=0.9,text/*;q=0.8,application/json;q=0.8"),
    (b"Accept-Language", b"en,*;q=0.5"),
    (b"Accept-Encoding", b"gzip, deflate"),  # these can be decompressed a piece at a time
    (b"Connection", b"close"),
]


class PageError(RuntimeError):
    """The page couldn't be had. The message is the end of a sentence about it; `status` is the server's, if any."""

    def __init__(self, said: str, status: int | None = None) -> None:
        super().__init__(said)
        self.status = status


@dataclass(frozen=True)
class Page:
    """`url` is the last one after `redirects` (those before it); `data` is decompressed, and cut if `truncated`."""

    url: str
    status: int
    media_type: str
    charset: str
    data: bytes
    truncated: bool
    redirects: tuple[str, ...]


async def open_page(
    url: str,
    guard: Guard,
    *,
    timeout_s: float,
    max_bytes: int,
    trust: ssl.SSLContext | None = None,
    network: httpcore.AsyncNetworkBackend | None = None,
) -> Page:
    """GET a page. No cookies, no credentials, and no proxy: one would resolve names behind the guard's back.

    `timeout_s` bounds all of it, redirects and a body that drips included; `max_bytes` the decompressed body. Raises
    Refused, and PageError for all that goes wrong. `trust` replaces the public certificate authorities, `network` the
    system's sockets.
    """
    pinned = PinnedNetwork(guard, network or httpcore.AnyIOBackend())
    try:
        async with (
            asyncio.timeout(timeout_s),
            httpcore.AsyncConnectionPool(ssl_context=trust or _public_authorities(), network_backend=pinned) as pool,
        ):
            return await _follow(pool, url, guard, timeout_s, max_bytes)
    except (TimeoutError, httpcore.TimeoutException) as error:
        raise PageError(f"takes more than {timeout_s:g} s") from error
    except socket.gaierror as error:
        raise PageError(f"can't be reached: its host isn't known ({error.strerror})") from error
    except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.UnsupportedProtocol, OSError) as error:
        if fault := certificate_fault(error):
            raise PageError(f"can't be trusted: {fault}") from error
        raise PageError(f"can't be reached ({type(error).__name__}: {str(error)[:200]})") from error


async def _follow(pool: httpcore.AsyncConnectionPool, url: str, guard: Guard, timeout_s: float, max_bytes: int) -> Page:
    redirects: list[str] = []
    while True:
        target = guard.check_url(url)
        place = httpcore.URL(
            scheme=target.raw_scheme, host=target.raw_host, port=target.port, target=target.raw_path or b"/"
        )
        timeouts = {"timeout": {"connect": timeout_s}}
        headers = [(b"Host", target.netloc), *_HEADERS]
        async with pool.stream("GET", place, headers=headers, extensions=timeouts) as response:
            answered = {name.lower().decode("latin-1"): value.decode("latin-1") for name, value in response.headers}
            if response.status not in _REDIRECTS or "location" not in answered:
                return await _read(response, answered, str(target), max_bytes, tuple(redirects))
        if len(redirects) == MAX_REDIRECTS:
            raise PageError(f"redirects more than {MAX_REDIRECTS} times", response.status)
        redirects.append(str(target))
        url = _joined(target, answered["location"])


def _joined(base: httpx.URL, location: str) -> str:
    if "\\" in location:
        raise Refused(f"{base} redirects to {location[:200]!r}, which isn't a web address.")
    try:
        return str(base.join(location))
    except (httpx.InvalidURL, ValueError) as error:
        raise Refused(f"{base} redirects to {location[:200]!r}, which isn't a web address.") from error


async def _read(
    response: httpcore.Response, headers: dict[str, str], url: str, max_bytes: int, redirects: tuple[str, ...]
) -> Page:
    status = response.status
    if not 200 <= status < 300:
        raise PageError(f"answers {status} {_phrase(status)}".strip(), status)
    said = Message()
    said["Content-Type"] = headers.get("content-type") or "application/octet-stream"
    media_type = said.get_content_type() if "content-type" in headers else ""
    if media_type and not _is_readable(media_type):
        raise PageError(f"is {media_type[:80]}; only HTML, text, JSON and PDF can be read", status)
    data, truncated = await _body(response, headers.get("content-encoding", ""), max_bytes)
    if not media_type:
        media_type = _sniffed(data)
    if media_type == PDF and truncated:
        raise PageError(f"is a PDF of more than {max_bytes} bytes", status)
    charset = said.get_param("charset", "")
    return Page(url, status, media_type, charset if isinstance(charset, str) else "", data, truncated, redirects)


def _is_readable(media_type: str) -> bool:
    return media_type.startswith("text/") or media_type in (*HTML, PDF) or bool(_JSON.fullmatch(media_type))


def _sniffed(data: bytes) -> str:
    if data.startswith(b"%PDF-"):
        return PDF
    return "text/html" if data.lstrip()[:1] == b"<" else "text/plain"


async def _body(response: httpcore.Response, encoding: str, max_bytes: int) -> tuple[bytes, bool]:
    """(the decompressed body, whether there was more of it)."""
    inflate = _Inflate(encoding)
    body = bytearray()
    received = 0
    async for chunk in response.aiter_stream():
        received += len(chunk)
        body += inflate.feed(chunk, max_bytes + 1 - len(body))
        if len(body) > max_bytes or received > max_bytes:
            return bytes(body[:max_bytes]), True
    return bytes(body), False


class _Inflate:
    """Undoes a Content-Encoding, never further than there is room: a bomb goes off in its own time."""

    def __init__(self, encoding: str) -> None:
        self.encoding = encoding.strip().lower()
        if self.encoding not in ("", "identity", "gzip", "x-gzip", "deflate"):
            raise PageError(f"is compressed as {self.encoding[:40]!r}, which wasn't asked for")
        self._decoder = zlib.decompressobj(zlib.MAX_WBITS | 32)  # a gzip or a zlib header, whichever comes
        self._begun = False

    def feed(self, data: bytes, room: int) -> bytes:
        """At most `room` bytes; what is beyond is lost."""
        if self.encoding in ("", "identity"):
            return data[:room]
        out = b""
        while data and len(out) < room:
            try:
                out += self._decoder.decompress(data, room - len(out))
            except zlib.error as error:
                if self._begun or self.encoding != "deflate":
                    raise PageError(f"isn't the {self.encoding} that it claims to be") from error
                self._decoder = zlib.decompressobj(-zlib.MAX_WBITS)  # some servers send it without its header
                out += self._decoder.decompress(data, room - len(out))
            self._begun = True
            if not self._decoder.eof:
                break
            data = self._decoder.unused_data  # gzip may be several in a row
            self._decoder = zlib.decompressobj(zlib.MAX_WBITS | 32)
            if not data.startswith(b"\x1f\x8b"):
                break  # padding
        return out


def _phrase(status: int) -> str:
    return HTTPStatus(status).phrase if status in HTTPStatus._value2member_map_ else ""


@cache
def _public_authorities() -> ssl.SSLContext:
    return httpx.create_ssl_context()
