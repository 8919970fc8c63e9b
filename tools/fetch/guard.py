"""Keeps a page's address from leading inside: to this machine, its network or its cloud's metadata.

Covered: other schemes, credentials and unusual ports in a URL; every spelling of an address; names that resolve to
private, loopback, link-local, shared, multicast, reserved or metadata addresses, also hidden in IPv6; names that
resolve to something else a moment later (the connection is made to the very address that was checked); redirects to any
of these (each is checked anew).
Not covered: services inside that have public addresses, such as this machine's own; what a public page does when it's
asked, since a GET may act there.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass

import httpcore
import httpx

Resolve = Callable[[str, int], Awaitable[list[str]]]
Address = ipaddress.IPv4Address | ipaddress.IPv6Address

MAX_URL_CHARS = 2_000
_MAX_ADDRESSES = 4  # of one name, tried in turn
_UNICAST = ipaddress.ip_network("2000::/3")  # all of IPv6 that is given out
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_NOT_PUBLIC = tuple(
    ipaddress.ip_network(network)
    for network in (
        "0.0.0.0/8", "100.64.0.0/10", "192.0.0.0/24", "192.88.99.0/24", "198.18.0.0/15", "240.0.0.0/4",
        "168.63.129.16/32",  # Azure's metadata and agent host: public by number only
        "2001::/23", "2001:db8::/32", "3fff::/20",
    )
)  # fmt: skip


class Refused(ValueError):
    """This address isn't opened. The message names it and says why."""


async def resolve(host: str, port: int) -> list[str]:
    """The addresses of `host` by the system's resolver."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


@dataclass(frozen=True)
class Guard:
    """`ports` may be asked for at public addresses; `allow` are (address, port) pairs that may be whatever they are.

    `allow` is for a test's own server. `resolve` is the resolver that is asked.
    """

    ports: frozenset[int] = frozenset({80, 443, 8080, 8443})
    allow: frozenset[tuple[str, int]] = frozenset()
    resolve: Resolve = resolve

    def check_url(self, url: str) -> httpx.URL:
        """The URL that may be asked for, so far as it can be told before its name is resolved. Raises Refused."""
        shown = url[:200]
        if len(url) > MAX_URL_CHARS:
            raise Refused(f"{shown}... has {len(url)} characters; an address has at most {MAX_URL_CHARS}.")
        if re.search(r"[\x00-\x20\x7f-\xa0\\]", url):
            raise Refused(f"{shown!r} has a character that no web address has.")
        try:
            parsed = httpx.URL(url)
            host = parsed.raw_host.decode("ascii").rstrip(".")
        except (httpx.InvalidURL, UnicodeError, ValueError) as error:
            raise Refused(f"{shown} isn't a web address: {error}.") from error
        if parsed.scheme not in ("http", "https"):
            raise Refused(f"{shown} isn't a web address: it must begin with http:// or https://.")
        if parsed.userinfo or "@" in re.split(r"[/?#]", url.partition("//")[2], maxsplit=1)[0]:
            raise Refused(f"{shown} has a name or password in it; pages are opened without.")
        if not host:
            raise Refused(f"{shown} names no host.")
        port = parsed.port if parsed.port is not None else 443 if parsed.scheme == "https" else 80
        if port not in self.ports and port not in {allowed for _, allowed in self.allow}:
            raise Refused(
                f"{shown} asks for port {port}; pages are opened at {', '.join(map(str, sorted(self.ports)))}."
            )
        address = _address(host)
        if address is not None:
            self._check_address(address, host, port)
        elif re.fullmatch(r"\d+|0x[0-9a-f]*", host.rpartition(".")[2], re.IGNORECASE):
            raise Refused(f"{shown} has a number for its host that isn't an address of four decimal numbers.")
        elif not re.fullmatch(r"[a-z0-9_.-]+", host):
            raise Refused(f"{shown} isn't a web address: {host[:100]!r} is no name of a host.")
        elif "." not in host:
            raise Refused(f"{shown} names a host of the local network; only public pages are opened.")
        return parsed.copy_with(host=host, fragment=None)

    async def addresses(self, host: str, port: int) -> list[str]:
        """The checked addresses of `host`. One that isn't public has them all refused. Raises Refused, OSError."""
        literal = _address(host)
        try:
            found = [str(literal)] if literal is not None else await self.resolve(host, port)
        except UnicodeError as error:
            raise Refused(f"{host[:200]} isn't the name of a host.") from error
        checked = []
        for text in found:
            address = _address(text)
            if address is None:
                raise Refused(f"{host} resolves to {text}, which is no address to open.")
            self._check_address(address, host, port)
            checked.append(str(address))
        if not checked:
            raise OSError(f"{host} has no address")
        return checked[:_MAX_ADDRESSES]

    def _check_address(self, address: Address, host: str, port: int) -> None:
        if (str(address), port) in self.allow:
            return
        if port not in self.ports:
            raise Refused(f"{host}: port {port} isn't one that pages are opened at.")
        if not is_public(address):
            shown = host if host == str(address) else f"{host} ({address})"
            raise Refused(f"{shown} is an address inside a network; only public pages are opened.")


class PinnedNetwork(httpcore.AsyncNetworkBackend):
    """Connects to the very addresses that `guard` has checked. TLS still verifies the name that was asked for."""

    def __init__(self, guard: Guard, network: httpcore.AsyncNetworkBackend) -> None:
        self._guard = guard
        self._network = network

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109  httpcore's signature
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        addresses = await self._guard.addresses(host, port)
        share = None if timeout is None else timeout / len(addresses)
        last: Exception | None = None
        for address in addresses:
            try:
                return await self._network.connect_tcp(address, port, share, local_address, socket_options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                last = error
        assert last is not None
        raise last

    async def connect_unix_socket(
        self,
        path: str,
        timeout: float | None = None,  # noqa: ASYNC109  httpcore's signature
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        raise Refused(f"{path} is a socket of this machine.")

    async def sleep(self, seconds: float) -> None:
        await self._network.sleep(seconds)


def is_public(address: Address) -> bool:
    """Whether an address is one of the open internet's, looking also at an IPv4 address inside an IPv6 one."""
    if isinstance(address, ipaddress.IPv6Address):
        if address.scope_id is not None:
            return False
        embedded = address.ipv4_mapped
        if embedded is None and address in _NAT64:
            embedded = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if embedded is not None:
            return is_public(embedded)
        if address not in _UNICAST or address.sixtofour is not None or _is_isatap(address):
            return False  # 6to4, Teredo (2001::/32) and ISATAP lead to whatever IPv4 address they carry
    if address.is_multicast or address.is_reserved or not address.is_global:
        return False
    return not any(address in network for network in _NOT_PUBLIC if network.version == address.version)


def _is_isatap(address: ipaddress.IPv6Address) -> bool:
    return (int(address) >> 32) & 0xFCFFFFFF == 0x00005EFE


def _address(text: str) -> Address | None:
    try:
        return ipaddress.ip_address(text.strip("[]"))
    except ValueError:
        return None


def certificate_fault(error: BaseException | None) -> str:
    """What TLS found wrong with a certificate, if that is behind `error`."""
    while error is not None:
        if isinstance(error, ssl.SSLCertVerificationError):
            return error.verify_message
        error = error.__cause__ or error.__context__
    return ""
