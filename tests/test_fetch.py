"""Opening a page: what is read, what bounds it, and that no address leads inside. All traffic stays on loopback."""

from __future__ import annotations

import asyncio
import gzip
import ipaddress
import socket
import ssl
import time
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpcore
import pytest
import trustme
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.test_index import pdf
from tools.fetch import FetchTool, Guard, PageError, Refused, open_page
from tools.fetch.guard import is_public

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter, str], Awaitable[None]]
PUBLIC = "93.184.216.34"
ARTICLE = (
    "<html><head><title>Quokkas</title></head><body><nav><a href=/>Home</a></nav><article><h1>Quokkas</h1>"
    "<p>The quokka is a small macropod.</p><h2>Diet</h2><p>It eats leaves &amp; grasses.</p></article>"
    "<script>steal()</script></body></html>"
)


def http(body: bytes | str = b"", status: str = "200 OK", type: str | None = "text/html", **more: str) -> bytes:
    data = body.encode() if isinstance(body, str) else body
    headers = {"Content-Length": str(len(data))} | ({"Content-Type": type} if type else {})
    headers |= {name.replace("_", "-"): value for name, value in more.items()}
    return (
        f"HTTP/1.1 {status}\r\n{''.join(f'{k}: {v}' + chr(13) + chr(10) for k, v in headers.items())}\r\n".encode()
        + data
    )


class Server:
    """A server of raw bytes on 127.0.0.1. `asked` are the request heads that it saw."""

    def __init__(self, answer: bytes | Callable[[str], bytes] | Handler) -> None:
        self.answer = answer
        self.asked: list[str] = []
        self.port = 0
        self.waits = True  # for a whole request

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n" if self.waits else b"\x03")).decode("latin-1")
            self.asked.append(head)
            path = head.split(" ")[1] if self.waits else ""
            answer = self.answer if isinstance(self.answer, bytes) else self.answer(path)  # type: ignore[call-arg]
            if isinstance(answer, bytes):
                writer.write(answer)
            else:
                await answer(reader, writer, path)
            await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            return  # the client has had enough
        finally:
            writer.close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@asynccontextmanager
async def serving(answer: Any, tls: ssl.SSLContext | None = None) -> AsyncIterator[Server]:
    server = Server(answer)
    listening = await asyncio.start_server(server.handle, "127.0.0.1", 0, ssl=tls)
    server.port = listening.sockets[0].getsockname()[1]
    try:
        yield server
    finally:
        listening.close()


def tool(server: Server | None = None, **knobs: Any) -> FetchTool:
    allow = frozenset({("127.0.0.1", server.port)} if server else set())
    return FetchTool(**{"guard": Guard(allow=allow)} | knobs)


async def fetch(tool: FetchTool, url: str) -> tuple[str, dict[str, Any]]:
    message = await tool.ainvoke({"type": "tool_call", "name": "fetch", "id": "1", "args": {"url": url}})
    return message.content, message.artifact


class NoNetwork(httpcore.AsyncNetworkBackend):
    """Refuses to connect, and remembers where to it was asked for."""

    def __init__(self) -> None:
        self.connected: list[tuple[str, int]] = []

    async def connect_tcp(self, host: str, port: int, *_: Any, **__: Any) -> httpcore.AsyncNetworkStream:
        self.connected.append((host, port))
        raise httpcore.ConnectError("no network here")


def resolver(*answers: list[str]) -> Callable[[str, int], Awaitable[list[str]]]:
    """Gives one answer after the other, the last one for ever."""
    left = list(answers)

    async def resolve(host: str, port: int) -> list[str]:
        return left.pop(0) if len(left) > 1 else left[0]

    return resolve


# -- what is read


async def test_a_page_is_its_readable_text_and_its_source() -> None:
    async with serving(http(ARTICLE)) as server:
        text, artifact = await fetch(tool(server), server.url + "/quokka?x=1#diet")
    assert text == "Quokkas\n\nThe quokka is a small macropod.\n\nDiet\n\nIt eats leaves & grasses."
    (source,) = artifact.pop("sources")
    assert source.pop("retrieved_at").endswith("+00:00")
    assert source == {
        "title": "Quokkas", "url": server.url + "/quokka?x=1", "source": f"127.0.0.1:{server.port}",
    }  # fmt: skip
    assert artifact == {
        "error": False, "status": 200, "media_type": "text/html", "bytes": len(ARTICLE), "truncated": False,
        "redirects": [],
    }  # fmt: skip
    assert "cookie" not in server.asked[0].lower()
    assert f"host: 127.0.0.1:{server.port}\r\n" in server.asked[0].lower()


async def test_text_json_and_pdf_are_read(tmp_path: Any) -> None:
    pdf(tmp_path / "a.pdf", ["The rent is due", "on the first."], "Lease")
    answers = {
        "/text": http("a <b>plain</b> text", type="text/plain; charset=utf-8"),
        "/json": http('{"quokka": [1, 2]}', type="application/json"),
        "/ld": http('{"quokka": [1, 2]}', type="application/ld+json"),
        "/csv": http("a,b\n1,2", type="text/csv"),
        "/pdf": http((tmp_path / "a.pdf").read_bytes(), type="application/pdf"),
        "/untyped": http(ARTICLE, type=None),
        "/untyped-pdf": http((tmp_path / "a.pdf").read_bytes(), type=None),
    }
    async with serving(answers.__getitem__) as server:
        opened = {path: (await fetch(tool(server), server.url + path))[0] for path in answers}
    assert "a <b>plain</b> text" in opened["/text"]
    assert '{"quokka": [1, 2]}' in opened["/json"]
    assert '{"quokka": [1, 2]}' in opened["/ld"]
    assert "a,b\n1,2" in opened["/csv"]
    assert opened["/pdf"] == opened["/untyped-pdf"] == "Lease\n\nThe rent is due\n\non the first."
    assert opened["/untyped"].startswith("Quokkas\n\nThe quokka")


@pytest.mark.parametrize(
    ("body", "type"),
    [
        ("naïve café".encode("latin-1"), "text/plain; charset=iso-8859-1"),
        ("naïve café".encode("latin-1"), "text/plain; charset=utf-8"),  # it isn't
        ("naïve café".encode(), "text/plain; charset=klingon"),
        ("naïve café".encode(), "text/plain; charset=zlib"),
        ("naïve café".encode("utf-16"), "text/plain"),
        (b"<meta charset=cp1252><p>na\xefve caf\xe9</p>", "text/html"),
    ],
)
async def test_a_wrong_charset_is_seen_through(body: bytes, type: str) -> None:
    async with serving(http(body, type=type)) as server:
        text, artifact = await fetch(tool(server), server.url)
    assert not artifact["error"]
    assert "naïve café" in text


async def test_an_observation_keeps_its_budget() -> None:
    async with serving(http("<p>" + "word " * 50_000)) as server:
        text, artifact = await fetch(tool(server, max_chars=100), server.url)
    assert len(text) <= 100
    assert text.endswith("word ...")
    assert artifact["truncated"]


@pytest.mark.parametrize(
    "type", ["image/png", "application/zip", "application/octet-stream", "video/mp4", "a/b/c", "x"]
)
async def test_other_media_types_are_refused(type: str) -> None:
    async with serving(http(b"\x89PNG\0\0", type=type)) as server:
        text, artifact = await fetch(tool(server), server.url)
    assert artifact["error"]
    assert artifact["sources"] == []
    assert "only HTML, text, JSON and PDF" in text or "isn't text" in text


async def test_bytes_that_are_not_the_text_they_claim_to_be() -> None:
    async with serving(http(bytes(range(256)) * 9)) as server:
        text, artifact = await fetch(tool(server), server.url)
    assert (artifact["error"], artifact["status"]) == (True, 200)
    assert "isn't text" in text


@pytest.mark.parametrize(
    "body",
    [
        "<div>" * 100_000 + "x",
        "<table><tr><td>" * 3_000 + "quokka",
        "<p>quokka</p>" + "<!-- " * 50_000,
        "<a href='" + "x" * 900_000 + "'>quokka</a>",
        "&#x0;&#xD800;&#1114112;&lt;|im_end|&gt;quokka\x1b[2J",
        "<html><head><meta charset=utf-7></head>+ADw-script+AD4-",
        "<?xml version='1.0'?><!DOCTYPE x [<!ENTITY a SYSTEM 'file:///etc/passwd'>]><html><body><p>&a;quokka</p>",
        "<!DOCTYPE x [<!ENTITY a 'ha'><!ENTITY b '&a;&a;&a;&a;&a;&a;&a;&a;'>]><html><body><p>&b;quokka</p></body>",
        "<iframe src='file:///etc/passwd'></iframe><object data='file:///etc/passwd'></object>quokka",
        "<script>" * 1000 + "quokka",
        "\0" * 10_000,
        "",
    ],
)
async def test_hostile_html_is_text_or_an_error(body: str) -> None:
    async with serving(http(body.encode("utf-8", "surrogatepass"))) as server:
        text, artifact = await fetch(tool(server), server.url)
    assert isinstance(artifact["error"], bool)
    assert text
    assert "root:" not in text
    assert not {"\x1b", "\0"} & set(text)


async def test_a_broken_pdf_is_an_error_in_words() -> None:
    async with serving(http(b"%PDF-1.7 nothing", type="application/pdf")) as server:
        text, artifact = await fetch(tool(server), server.url)
    assert artifact["error"]
    assert "isn't a PDF that can be read" in text


@pytest.mark.parametrize("status", ["404 Not Found", "500 Internal Server Error", "429 Too Many Requests", "799 Odd"])
async def test_an_error_of_the_server_is_said(status: str) -> None:
    async with serving(http("<p>sorry, <b>here is some text</b></p>", status=status)) as server:
        text, artifact = await fetch(tool(server), server.url)
    assert f"answers {status.removesuffix(' Odd')}" in text
    assert (artifact["error"], artifact["status"]) == (True, int(status[:3]))


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"not http\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nshort",
        b"HTTP/1.1 999999 x\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 100_000,
    ],
)
async def test_a_server_that_answers_nonsense(answer: bytes) -> None:
    async with serving(answer) as server:
        text, artifact = await fetch(tool(server), server.url)
    assert artifact["error"]
    assert "can't be reached" in text


async def test_nobody_there() -> None:
    async with serving(b"") as server:
        opener = tool(server)
    text, artifact = await fetch(opener, server.url)
    assert (artifact["error"], artifact["status"]) == (True, None)
    assert "can't be reached" in text


# -- what bounds it


async def test_an_endless_body_is_cut() -> None:
    async def endless(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, path: str) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n\r\n")
        while True:
            writer.write(b"quokka " * 10_000)
            await writer.drain()

    async with serving(lambda path: endless) as server:
        text, artifact = await fetch(tool(server, max_bytes=100_000), server.url)
    assert (artifact["error"], artifact["truncated"], artifact["bytes"]) == (False, True, 100_000)
    assert "quokka quokka" in text


@pytest.mark.parametrize("where", ["body", "head", "silence"])
async def test_a_slow_drip_ends_at_the_deadline(where: str) -> None:
    async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, path: str) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n" + (b"\r\n" if where == "body" else b"X-A: "))
        while True:
            writer.write(b"" if where == "silence" else b"x")
            await writer.drain()
            await asyncio.sleep(0.05)

    async with serving(lambda path: drip) as server:
        began = time.monotonic()
        text, artifact = await fetch(tool(server, timeout_s=0.5), server.url)
    assert 0.4 < time.monotonic() - began < 4
    assert artifact["error"]
    assert "takes more than 0.5 s" in text


async def test_a_chain_of_slow_redirects_ends_at_the_deadline() -> None:
    async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, path: str) -> None:
        await asyncio.sleep(0.25)
        writer.write(http(status="302 Found", Location=path + "x"))

    async with serving(lambda path: slow) as server:
        began = time.monotonic()
        text, _ = await fetch(tool(server, timeout_s=0.6), server.url + "/")
    assert time.monotonic() - began < 4
    assert "takes more than 0.6 s" in text


async def test_a_cancelled_call_leaves_nothing_behind() -> None:
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, path: str) -> None:
        asked.set()
        closed.set_result(await reader.read())

    asked = asyncio.Event()
    closed: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
    async with serving(lambda path: silent) as server:
        call = asyncio.create_task(fetch(tool(server), server.url))
        await asyncio.wait_for(asked.wait(), 10)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert await asyncio.wait_for(closed, 5) == b""


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "raw deflate"])
async def test_a_bomb_goes_off_in_its_own_time(encoding: str) -> None:
    packer = zlib.compressobj(9, wbits={"gzip": 31, "deflate": 15, "raw deflate": -15}[encoding])
    bomb = b"".join(packer.compress(b"quokka " * 150_000) for _ in range(200)) + packer.flush()
    assert len(bomb) < 1_000_000
    async with serving(http(bomb, type="text/plain", Content_Encoding=encoding.split()[-1])) as server:
        page = await open_page(
            server.url, Guard(allow=frozenset({("127.0.0.1", server.port)})), timeout_s=10, max_bytes=300_000
        )
    assert (len(page.data), page.truncated) == (300_000, True)
    assert page.data.startswith(b"quokka quokka")


async def test_compressed_pages_are_read() -> None:
    answers = {
        "/gzip": http(gzip.compress(ARTICLE.encode()), Content_Encoding="gzip"),
        "/two": http(
            gzip.compress(ARTICLE[:99].encode()) + gzip.compress(ARTICLE[99:].encode()), Content_Encoding="gzip"
        ),
        "/deflate": http(zlib.compress(ARTICLE.encode()), Content_Encoding="deflate"),
        "/lie": http(ARTICLE, Content_Encoding="gzip"),
        "/br": http(b"\x0b\x02\x80abc\x03", Content_Encoding="br"),
        "/cut": http(gzip.compress(ARTICLE.encode() * 50)[:-60], Content_Encoding="gzip"),
    }
    async with serving(answers.__getitem__) as server:
        opened = {path: await fetch(tool(server), server.url + path) for path in answers}
    for path in ("/gzip", "/two", "/deflate", "/cut"):
        assert opened[path][0].startswith("Quokkas\n\nThe quokka"), path
    assert "isn't the gzip that it claims to be" in opened["/lie"][0]
    assert "'br', which wasn't asked for" in opened["/br"][0]


async def test_a_pdf_that_is_too_large_is_said(tmp_path: Any) -> None:
    async with serving(http(b"%PDF-1.7" + b"x" * 5000, type="application/pdf")) as server:
        text, _ = await fetch(tool(server, max_bytes=1000), server.url)
    assert "is a PDF of more than 1000 bytes" in text


# -- redirects


async def test_redirects_are_followed_and_told() -> None:
    def answer(path: str) -> bytes:
        number = int(path.removeprefix("/"))
        return http(status="302 Found", Location=f"/{number - 1}") if number else http(ARTICLE)

    async with serving(answer) as server:
        text, artifact = await fetch(tool(server), server.url + "/5")
        assert text.startswith("Quokkas")
        assert artifact["redirects"] == [f"{server.url}/{number}" for number in (5, 4, 3, 2, 1)]
        assert artifact["sources"][0]["url"] == server.url + "/0"
        text, artifact = await fetch(tool(server), server.url + "/6")
        assert artifact["error"]
        assert "redirects more than 5 times" in text


@pytest.mark.parametrize(
    "location",
    [
        "http://127.0.0.1:{canary}/", "http://localhost:{canary}/", "//127.0.0.1:{canary}/", "http://127.0.0.1:80/",
        "http://169.254.169.254/latest/meta-data/", "http://[::1]/", "http://10.0.0.1/", "http://2130706433/",
        "file:///etc/passwd", "ftp://example.com/", "gopher://127.0.0.1:{canary}/x", "javascript:alert(1)",
        "data:text/plain,x",
        "http://user:pass@example.com/", "http://example.com:22/", "\\\\127.0.0.1:{canary}\\x", "http://[",
        "http://" + "a" * 3000 + ".com/",
    ],
)  # fmt: skip
async def test_a_redirect_inside_is_refused(location: str) -> None:
    async with serving(http("secret")) as canary:
        target = location.replace("{canary}", str(canary.port))
        async with serving(lambda path: http(status="302 Found", Location=target)) as server:
            network = Recording()
            text, artifact = await fetch(tool(server, network=network), server.url)
        assert artifact["error"]
        assert text.startswith("Refused: ")
        assert network.connected == [("127.0.0.1", server.port)]
        assert canary.asked == []


class Recording(httpcore.AnyIOBackend):
    """Real sockets, to loopback only, and a list of where they went."""

    def __init__(self) -> None:
        super().__init__()
        self.connected: list[tuple[str, int]] = []

    async def connect_tcp(self, host: str, port: int, *args: Any, **kwargs: Any) -> httpcore.AsyncNetworkStream:
        self.connected.append((host, port))
        assert ipaddress.ip_address(host).is_loopback
        return await super().connect_tcp(host, port, *args, **kwargs)


# -- no address leads inside

INSIDE = [
    "127.0.0.1", "127.1.2.3", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "169.254.170.2",
    "100.64.0.1", "100.100.100.200", "192.0.0.192", "198.18.0.1", "192.0.2.1", "224.0.0.1", "239.1.1.1", "240.0.0.1",
    "255.255.255.255", "168.63.129.16", "192.88.99.1",
    "::", "::1", "fe80::1", "fc00::1", "fd00:ec2::254", "fec0::1", "ff02::1", "2001:db8::1", "2001::1", "100::1",
    "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::127.0.0.1", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::a00:1",
    "2002:7f00:1::", "2002:a9fe:a9fe::1", "2002:0808:0808::1", "2001:0:4136:e378:8000:63bf:3fff:fdd2",
    "2607:f8b0::5efe:10.0.0.1", "2607:f8b0::200:5efe:10.0.0.1", "5f00::1", "4000::1", "3fff::1",
]  # fmt: skip
OUTSIDE = [
    PUBLIC, "1.1.1.1", "8.8.8.8", "2606:4700:4700::1111", "2a00:1450:4001:81b::200e", "::ffff:8.8.8.8",
    "64:ff9b::808:808",
]  # fmt: skip


@pytest.mark.parametrize("address", INSIDE)
async def test_an_inside_address_is_refused_before_connecting(address: str) -> None:
    network = NoNetwork()
    literal = f"[{address}]" if ":" in address else address
    by_name = Guard(resolve=resolver([address]))
    beside_a_public_one = Guard(resolve=resolver([PUBLIC, address]))
    for guard, url in [
        (Guard(), f"http://{literal}/"),
        (Guard(), f"https://{literal}:8443/x"),
        (by_name, "http://innocent.example/"),
        (beside_a_public_one, "https://innocent.example/"),
    ]:
        text, artifact = await fetch(tool(guard=guard, network=network), url)
        assert artifact["error"]
        assert text.startswith("Refused: ")
    assert network.connected == []


@pytest.mark.parametrize("address", OUTSIDE)
async def test_a_public_address_is_what_is_connected_to(address: str) -> None:
    network = NoNetwork()
    guard = Guard(resolve=resolver([address]))
    text, _ = await fetch(tool(guard=guard, network=network), "https://innocent.example/")
    assert "can't be reached" in text
    assert network.connected == [(str(ipaddress.ip_address(address)), 443)]


@pytest.mark.parametrize(
    "url",
    [
        "http://2130706433/", "http://0x7f000001/", "http://0x7f.0.0.1/", "http://0177.0.0.1/", "http://017700000001/",
        "http://127.1/", "http://127.0.1/", "http://127.0.0.1./", "http://127.0.0.01/", "http://0/", "http://0x/",
        "http://0x08080808/", "http://134744072/", "http://[::ffff:7f00:1]/", "http://[::ffff:127.0.0.1]/",
        "http://[0:0:0:0:0:0:0:1]/", "http://[fe80::1%25eth0]/", "http://[fe80::1%eth0]/", "http://localhost/",
        "http://LOCALHOST./", "http://intranet/", "http://metadata/",
        "http://\uff11\uff12\uff17.\uff10.\uff10.\uff11/", "http://127\u30020\u30020\u30021/",
        "http://ⓛⓞⓒⓐⓛⓗⓞⓢⓣ/", "http://127%2e0%2e0%2e1/", "http://%31%32%37.0.0.1/", "http://user@127.0.0.1/",
        "http://example.com@127.0.0.1/", "http://127.0.0.1#@example.com/", "http://127.0.0.1\\@example.com/",
        "http://example.com\\@127.0.0.1/", "http://user:pass@example.com/", "http://@example.com/", "http://:@example.com/",
        "http://example.com:22/", "http://example.com:6379/", "http://example.com:0/", "http://example.com:99999/",
        "http://example.com:-1/", "http://example.com:80:80/", "http://", "http:///", "http://./", "http://../", "https://",
        "file:///etc/passwd", "ftp://example.com/", "gopher://example.com/", "javascript:alert(1)", "data:text/html,x",
        "unix:///var/run/docker.sock", "ws://example.com/", "//example.com/", "/etc/passwd", "", " ", "x" * 100_000,
        "http://exa mple.com/", "http://example.com/\r\nX: y", "http://example.com/\0", "http://exam\tple.com/",
        "http://[::1", "http://]/", "http://[]/", "http://a..b/", "http://-/", "http://xn--/",
        "http://" + "a" * 64 + ".com/", "localhost:8000/x", "127.0.0.1:8000", "10.0.0.1",
    ],
)  # fmt: skip
async def test_every_spelling_is_refused_without_asking_anybody(url: str) -> None:
    async def never(host: str, port: int) -> list[str]:
        if host in ("a..b", "xn--", "a" * 64 + ".com", "-"):
            raise UnicodeError("label empty or too long")  # as the system's resolver does
        raise AssertionError(f"resolved {host}")

    network = NoNetwork()
    text, artifact = await fetch(tool(guard=Guard(resolve=never), network=network), url)
    assert (artifact["error"], artifact["status"], artifact["sources"]) == (True, None, [])
    assert text.startswith("Refused: ")
    assert len(text) < 600
    assert network.connected == []


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**32 - 1).map(ipaddress.IPv4Address))
def test_what_is_public_is_global(address: ipaddress.IPv4Address) -> None:
    mapped = ipaddress.IPv6Address(f"::ffff:{address}")
    nat64 = ipaddress.IPv6Address(int(ipaddress.IPv6Address("64:ff9b::")) | int(address))
    assert is_public(mapped) == is_public(nat64) == is_public(address)
    if is_public(address):
        assert address.is_global
        assert not address.is_multicast
        assert not address.is_reserved


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60))
def test_no_text_gets_past_the_guard_by_an_exception(text: str) -> None:
    for url in (text, f"http://{text}", f"http://{text}@127.0.0.1/", f"http://127.0.0.1{text}"):
        try:
            checked = Guard().check_url(url)
        except Refused:
            continue
        assert checked.scheme in ("http", "https")
        assert checked.host not in ("127.0.0.1", "localhost")


async def test_a_name_that_changes_its_mind_is_connected_where_it_was_checked() -> None:
    network = NoNetwork()
    guard = Guard(resolve=resolver([PUBLIC], ["127.0.0.1"]))
    text, _ = await fetch(tool(guard=guard, network=network), "http://rebind.example/")
    assert "can't be reached" in text
    assert network.connected == [(PUBLIC, 80)]
    text, _ = await fetch(tool(guard=guard, network=network), "http://rebind.example/")
    assert text.startswith("Refused: rebind.example (127.0.0.1)")
    assert network.connected == [(PUBLIC, 80)]


async def test_a_name_that_changes_its_mind_between_redirects_is_refused() -> None:
    async with serving(http(status="302 Found", Location="/again", Connection="close")) as server:
        allow = frozenset({("127.0.0.1", server.port)})
        network = Recording()
        guard = Guard(allow=allow, resolve=resolver(["127.0.0.1"], ["127.0.0.2"]))
        text, _ = await fetch(tool(guard=guard, network=network), f"http://rebind.example:{server.port}/")
    assert text.startswith("Refused: ")
    assert network.connected == [("127.0.0.1", server.port)]


async def test_the_environments_proxy_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(http("from the proxy")) as proxy, serving(http(ARTICLE)) as server:
        for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
            monkeypatch.setenv(name, proxy.url)
        text, _ = await fetch(tool(server), server.url)
        assert text.startswith("Quokkas")
        assert proxy.asked == []


async def test_the_next_address_is_tried() -> None:
    async with serving(http(ARTICLE)) as server:
        allow = frozenset({("127.0.0.1", server.port), ("127.0.0.9", server.port)})
        guard = Guard(allow=allow, resolve=resolver(["127.0.0.9", "127.0.0.1"]))
        text, _ = await fetch(tool(guard=guard), f"http://two.example:{server.port}/")
    assert text.startswith("Quokkas")


async def test_an_unknown_host_is_said() -> None:
    async def unknown(host: str, port: int) -> list[str]:
        raise socket.gaierror(-2, "Name or service not known")

    text, _ = await fetch(tool(guard=Guard(resolve=unknown)), "quokka.example/page")
    assert text == ("https://quokka.example/page can't be reached: its host isn't known (Name or service not known).")


# -- TLS


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


def tls_of(authority: trustme.CA, name: str) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert(name).configure_cert(context)
    return context


def trust_in(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context


async def test_tls_asks_for_the_name_at_the_address_that_was_checked(authority: trustme.CA) -> None:
    names: list[str | None] = []
    tls = tls_of(authority, "quokka.example")
    tls.sni_callback = lambda _, name, __: names.append(name)  # type: ignore[assignment]
    async with serving(http(ARTICLE), tls) as server:
        guard = Guard(allow=frozenset({("127.0.0.1", server.port)}), resolve=resolver(["127.0.0.1"]))
        opener = tool(guard=guard, trust=trust_in(authority))
        text, artifact = await fetch(opener, f"https://quokka.example:{server.port}/")
    assert text.startswith("Quokkas")
    assert names == ["quokka.example"]
    assert f"host: quokka.example:{server.port}\r\n" in server.asked[0].lower()
    assert artifact["sources"][0]["url"] == f"https://quokka.example:{server.port}/"


@pytest.mark.parametrize("fault", ["another name", "unknown authority", "no TLS"])
async def test_broken_tls_is_said(authority: trustme.CA, fault: str) -> None:
    name = "other.example" if fault == "another name" else "quokka.example"
    async with serving(http(ARTICLE), None if fault == "no TLS" else tls_of(authority, name)) as server:
        server.waits = fault != "no TLS"
        guard = Guard(allow=frozenset({("127.0.0.1", server.port)}), resolve=resolver(["127.0.0.1"]))
        trust = None if fault == "unknown authority" else trust_in(authority)
        text, artifact = await fetch(tool(guard=guard, trust=trust), f"https://quokka.example:{server.port}/")
    assert artifact["error"]
    assert ("can't be reached" if fault == "no TLS" else "can't be trusted") in text
    assert all("GET" not in head for head in server.asked)


async def test_what_open_page_raises() -> None:
    async with serving(http(status="404 Not Found")) as server:
        guard = Guard(allow=frozenset({("127.0.0.1", server.port)}))
        with pytest.raises(PageError, match="answers 404 Not Found") as raised:
            await open_page(server.url, guard, timeout_s=5, max_bytes=1000)
    assert raised.value.status == 404
    with pytest.raises(Refused):
        await open_page("http://10.0.0.1/", Guard(), timeout_s=5, max_bytes=1000)


def test_the_tool_is_called_without_a_loop_too() -> None:
    assert tool().invoke({"url": "http://10.0.0.1/"}).startswith("Refused: 10.0.0.1")
