"""Search of the web: it answers or gives up within its time, whatever a provider does, and spares the provider."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from ddgs.engines import ENGINES
from ddgs.exceptions import RatelimitException
from hypothesis import given
from hypothesis import strategies as st

import tools.search.ddgs as ddgs
import tools.search.searxng as searxng
from tools.search import (
    BackendUnavailable,
    Breaker,
    DdgsBackend,
    GuardedBackend,
    LocalIndex,
    SearchBackend,
    SearchHit,
    SearchOptions,
    SearchTool,
    SearxngBackend,
    open_library,
    open_search,
)
from tools.search.backend import NotAsked, Passing, RateLimited, TooSlow
from tools.search.rate import RateLimit
from tools.search.web import sendable, web_hit

DATA = Path(__file__).parent / "data" / "search"
PARIS = (DATA / "searxng.json").read_bytes()
NOTHING = json.dumps({"query": "x", "results": [], "answers": [], "infoboxes": [], "unresponsive_engines": []}).encode()


@dataclass
class Reply:
    """`delay_s`: before the first byte; `drip_s`: after each byte of the body."""

    body: bytes = PARIS
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    delay_s: float = 0.0
    drip_s: float = 0.0


class Site:
    """A web server on loopback. It gives `replies` in turn, the last one for good, and notes what it was asked.

    `by_path` has the replies of paths that always give the same.
    """

    def __init__(self, *replies: Reply) -> None:
        self.replies = list(replies) or [Reply()]
        self.by_path: dict[str, Reply] = {}
        self.asked: list[dict[str, str]] = []
        self.paths: list[str] = []
        self._closing = threading.Event()
        site = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                site._answer(self, urlsplit(self.path).query)

            def do_POST(self) -> None:
                site._answer(self, self.rfile.read(int(self.headers["Content-Length"])).decode())

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def _answer(self, request: BaseHTTPRequestHandler, form: str) -> None:
        self.asked.append({key: values[0] for key, values in parse_qs(form).items()})
        self.paths.append(urlsplit(request.path).path)
        reply = self.by_path.get(self.paths[-1])
        if reply is None:
            reply = self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]
        self._closing.wait(reply.delay_s)
        with contextlib.suppress(OSError):  # the client may have left
            request.send_response(reply.status)
            for name, value in {"Content-Length": str(len(reply.body)), **reply.headers}.items():
                request.send_header(name, value)
            request.end_headers()
            if not reply.drip_s:
                request.wfile.write(reply.body)
                return
            for byte in reply.body:
                request.wfile.write(bytes([byte]))
                self._closing.wait(reply.drip_s)

    def close(self) -> None:
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def site() -> Iterator[Site]:
    site = Site()
    yield site
    site.close()


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> LocalIndex:
    return open_library(tmp_path_factory.mktemp("home"))


def guarded(site: Site, budget_s: float = 3.0, **knobs: Any) -> GuardedBackend:
    return GuardedBackend(SearxngBackend(site.url, timeout_s=budget_s), budget_s, **knobs)


async def ask(tool: SearchTool, query: str) -> tuple[str, dict[str, Any]]:
    message = await tool.ainvoke({"type": "tool_call", "name": "search", "id": "1", "args": {"query": query}})
    return message.content, message.artifact


class Web:
    """Stands for ddgs: counts its calls, and fails or answers as told."""

    def __init__(self, *, error: Exception | None = None, rows: Any = 1, delay_s: float = 0.0) -> None:
        self.error, self.rows, self.delay_s, self.calls = error, rows, delay_s, 0

    def __call__(self, query: str, max_results: int, timeout_s: float) -> list[dict[str, Any]]:
        self.calls += 1
        time.sleep(self.delay_s)
        if self.error:
            raise self.error
        if not isinstance(self.rows, int):
            return self.rows  # type: ignore[no-any-return]
        return [
            {"title": f"Page {n}", "body": f"About\n{query}\x07", "href": f"https://www.x.org/{n}"}
            for n in range(self.rows)
        ]


def rested(web: Web, budget_s: float = 3.0, **knobs: Any) -> GuardedBackend:
    return GuardedBackend(DdgsBackend(budget_s, fetch=web), budget_s, **knobs)


# -- the tool


async def test_the_web_answers_first(library: LocalIndex) -> None:
    web = Web()
    text, artifact = await ask(SearchTool(backends=[rested(web), library]), "capital of France")
    assert text == "Page 0: About capital of France"
    assert (artifact["backend"], artifact["error"], artifact["tried"]) == ("ddgs", False, [])
    (source,) = artifact["sources"]
    assert {k: source[k] for k in ("title", "url", "source")} == {
        "title": "Page 0",
        "url": "https://www.x.org/0",
        "source": "x.org",
    }
    assert abs((datetime.now(UTC) - datetime.fromisoformat(source["retrieved_at"])).total_seconds()) < 60
    json.dumps(artifact)


async def test_backends_are_asked_in_order_until_one_finds_something(site: Site, library: LocalIndex) -> None:
    site.replies = [Reply(NOTHING)]
    tool = SearchTool(backends=[rested(Web(error=RateLimited("refused"))), guarded(site), library])
    text, artifact = await ask(tool, "capital of France")
    assert text.startswith("France: ")
    assert artifact["backend"] == "local"
    assert [(t["backend"], t["error"]) for t in artifact["tried"]] == [("ddgs", "refused"), ("searxng", "")]
    assert all(0 <= t["seconds"] < 5 for t in artifact["tried"])


async def test_without_any_backend_that_works_the_observation_says_why(site: Site) -> None:
    site.replies = [Reply(b"", 403)]
    text, artifact = await ask(SearchTool(backends=[rested(Web(error=OSError("down"))), guarded(site)]), "x")
    assert text.startswith("Search is unavailable. ddgs: OSError: down; searxng: HTTP 403: its JSON format is off.")
    assert "search.formats: json" in text
    assert artifact["error"]
    assert artifact["sources"] == []


async def test_nothing_on_the_web_asks_the_next_backend(library: LocalIndex) -> None:
    assert (await ask(SearchTool(backends=[rested(Web(rows=0)), library]), "gold"))[1]["backend"] == "local"


@pytest.mark.parametrize("query", ["", "   ", "\x00\x07"])
async def test_an_empty_query_is_told_so_without_a_look_up(site: Site, query: str) -> None:
    text, artifact = await ask(SearchTool(backends=[guarded(site)]), query)
    assert (text, artifact["error"], artifact["sources"]) == ("The query is empty.", True, [])
    assert site.asked == []


async def test_half_a_character_is_sent_as_the_replacement_character(site: Site) -> None:
    site.replies = [Reply(NOTHING)]
    text, artifact = await ask(SearchTool(backends=[guarded(site)]), "\ud800")
    assert text.startswith("Nothing found for:")
    assert not artifact["error"]
    assert [asked["q"] for asked in site.asked] == ["\N{REPLACEMENT CHARACTER}"]


async def test_a_query_of_100_kb_with_control_characters_is_sent_short_and_clean(site: Site) -> None:
    text, _ = await ask(SearchTool(backends=[guarded(site)]), "capital\x00 of\u202e\r\n\ud800 France " * 5_000)
    assert text.startswith("Paris - Wikipedia: ")
    (asked,) = site.asked
    assert 300 < len(asked["q"]) <= 400
    assert asked["q"].startswith("capital of \N{REPLACEMENT CHARACTER} France capital of")


async def test_a_hanging_provider_costs_its_time_once(site: Site, library: LocalIndex) -> None:
    site.replies = [Reply(delay_s=30)]
    tool = SearchTool(backends=[guarded(site, budget_s=0.3), library])
    began = time.monotonic()
    _, artifact = await ask(tool, "gold")
    assert 0.2 < time.monotonic() - began < 5
    assert artifact["backend"] == "local"
    assert artifact["tried"][0]["error"] == "no answer within 0.3 s"
    _, artifact = await ask(tool, "gold")
    assert re.fullmatch(r"rests for another (30|29) s after: no answer within 0\.3 s", artifact["tried"][0]["error"])
    assert len(site.asked) == 1


async def test_a_hanging_ddgs_costs_its_time_once(library: LocalIndex) -> None:
    web = Web(delay_s=1.0)
    tool = SearchTool(backends=[rested(web, budget_s=0.3), library])
    for _ in range(2):
        assert (await ask(tool, "gold"))[1]["backend"] == "local"
    assert web.calls == 1


# -- SearXNG


async def test_searxng_is_asked_for_what_the_options_say(site: Site) -> None:
    backend = SearxngBackend(f"{site.url}/searx/", region="de-de", safe="on", age="week", news=True)
    first, second, third = await backend.search("capital of France", 5)
    assert site.paths == ["/searx/search"]
    assert site.asked == [
        {
            "q": "capital of France",
            "format": "json",
            "language": "de-DE",
            "safesearch": "2",
            "categories": "news",
            "time_range": "week",
        }
    ]
    assert first == SearchHit(
        "Paris - Wikipedia",
        "Paris is the capital and\n most populous city of France.",
        "en.wikipedia.org",
        "https://en.wikipedia.org/wiki/Paris",
    )
    assert second.source == "example.org"
    assert (third.title, third.text) == ("Paris", "capital and largest city of France")  # the infobox
    assert len(await backend.search("capital of France", 1)) == 1


@pytest.mark.parametrize(
    ("region", "language"), [("us-en", "en-US"), ("wt-wt", "all"), ("cn-zh", "zh-CN"), ("xx", "all")]
)
async def test_a_region_is_translated_for_searxng(site: Site, region: str, language: str) -> None:
    await SearxngBackend(site.url, region=region).search("x", 1)
    assert site.asked[0]["language"] == language


async def test_a_query_can_t_choose_engines_or_leave_the_instance(site: Site) -> None:
    await SearxngBackend(site.url).search("!!g :fr <60 !images 5! cats: a < b", 1)
    assert site.asked[0]["q"] == "g fr 60 images 5! cats: a < b"


@pytest.mark.parametrize(
    ("url", "endpoint"),
    [
        ("http://h", "http://h/search"),
        ("https://h:8888/", "https://h:8888/search"),
        ("http://h/searx/search?q=x#y", "http://h/searx/search"),
        (" http://[::1]:80/ ", "http://[::1]:80/search"),
    ],
)
def test_any_address_of_an_instance_will_do(url: str, endpoint: str) -> None:
    assert searxng.endpoint(url) == endpoint


@pytest.mark.parametrize("url", ["", "example.org", "ftp://h", "http://", "http://h:99999", "file:///etc/passwd"])
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r"SearXNG.*Give the address"):
        SearxngBackend(url)


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (Reply(b"<!DOCTYPE html><html>hello</html>"), "isn't JSON: '<!DOCTYPE html>"),
        (Reply(b""), "isn't JSON"),
        (Reply(b"\xff\xfe\x00"), "isn't JSON"),
        (Reply(b"[" * 100_000), "isn't JSON"),
        (Reply(b"[]"), "without a list of results"),
        (Reply(b'{"results": {"title": "x"}}'), "without a list of results"),
        (Reply(b'{"results": null}'), "without a list of results"),
        (Reply(b" " * 5_000_000), "more than 2 MB"),
        (Reply(b'{"results": [], "unresponsive_engines": [["google", "timeout"], 3, null]}'), "google: timeout"),
        (Reply(b"", 403), "Enable `search.formats: json`"),
        (Reply(b"", 404), "is the address right"),
        (Reply(b"", 302, {"Location": "https://elsewhere.example/?q=x"}), "redirects to 'https://elsewhere.example/'"),
    ],
)
async def test_nonsense_is_told_by_its_kind_and_not_asked_for_again(site: Site, reply: Reply, said: str) -> None:
    site.replies = [reply]
    with pytest.raises(BackendUnavailable) as caught:
        await guarded(site).search("x", 1)
    assert said in str(caught.value)
    assert len(site.asked) == 1


async def test_rows_of_wrong_types_are_left_out(site: Site) -> None:
    rows = [None, 7, [], {}, {"title": 3, "content": None}, {"title": "Real", "url": ["x"]}, {"content": "\x00"}]
    site.replies = [Reply(json.dumps({"results": rows, "infoboxes": "?", "unresponsive_engines": {}}).encode())]
    assert await guarded(site).search("x", 9) == [SearchHit("Real", "", "web", "")]


async def test_a_body_that_drips_ends_with_the_budget(site: Site) -> None:
    site.replies = [Reply(drip_s=0.05)]
    began = time.monotonic()
    with pytest.raises(TooSlow):
        await guarded(site, budget_s=0.4).search("x", 1)
    assert time.monotonic() - began < 8


@pytest.mark.parametrize("status", [500, 502, 503])
async def test_a_moment_s_trouble_is_retried(site: Site, status: int) -> None:
    site.replies = [Reply(b"", status), Reply(PARIS)]
    assert len(await guarded(site).search("x", 1)) == 1
    assert len(site.asked) == 2


async def test_a_refused_connection_is_said_within_the_budget(site: Site) -> None:
    site.close()
    began = time.monotonic()
    with pytest.raises(Passing, match="ConnectError"):
        await guarded(site, budget_s=1.0).search("x", 1)
    assert time.monotonic() - began < 3


async def test_retry_after_is_honoured_when_there_is_time(site: Site) -> None:
    site.replies = [Reply(b"", 429, {"Retry-After": "1"}), Reply(PARIS)]
    began = time.monotonic()
    assert len(await guarded(site).search("x", 1)) == 1
    assert time.monotonic() - began >= 1


@pytest.mark.parametrize(
    ("headers", "rest"),
    [
        ({"Retry-After": "120"}, "1(20|19)"),
        ({"Retry-After": "99999999"}, "(3600|3599)"),
        ({"Retry-After": "soon"}, "(30|29)"),
        ({}, "(30|29)"),
    ],
)
async def test_a_provider_that_refuses_is_left_alone_as_long_as_it_says(
    site: Site, headers: dict[str, str], rest: str
) -> None:
    site.replies = [Reply(b"", 429, headers)]
    backend = guarded(site)
    with pytest.raises(RateLimited, match="429"):
        await backend.search("x", 1)
    with pytest.raises(NotAsked, match=f"rests for another {rest} s"):
        await backend.search("y", 1)
    assert len(site.asked) == 1


async def test_retry_after_may_be_a_date(site: Site) -> None:
    when = format_datetime(datetime.now(UTC) + timedelta(seconds=200), usegmt=True)
    site.replies = [Reply(b"", 503, {"Retry-After": when})]
    with pytest.raises(RateLimited) as caught:
        await guarded(site).search("x", 1)
    assert 150 < (caught.value.retry_after_s or 0) <= 200


# -- ddgs: the real library, its engines' addresses moved to loopback


@pytest.fixture
def engines(site: Site, monkeypatch: pytest.MonkeyPatch) -> Site:
    """DuckDuckGo first and Mojeek after it, both on `site`."""
    text = {name: ENGINES["text"][name] for name in ("duckduckgo", "mojeek")}
    news = {"bing": ENGINES["news"]["bing"]}
    monkeypatch.setitem(ENGINES, "text", text)
    monkeypatch.setitem(ENGINES, "news", news)
    for name, engine in [*text.items(), *news.items()]:
        monkeypatch.setattr(engine, "search_url", f"{site.url}/{name}")
    monkeypatch.setattr(text["duckduckgo"], "priority", 2)
    monkeypatch.setattr(ddgs, "has_network", lambda: True)
    site.replies = [Reply((DATA / "duckduckgo.html").read_bytes())]
    return site


async def test_ddgs_reads_its_engines_pages(engines: Site) -> None:
    hits = await DdgsBackend(region="au-en", age="month").search("capital of Australia", 3)
    assert hits[0] == SearchHit(
        "Canberra, the capital",
        "Canberra is the capital of Australia.",
        "canberra.example",
        "https://www.canberra.example/about",
    )
    assert len(hits) == 1  # the advertisement isn't a hit
    assert engines.asked[0] == {"q": "capital of Australia", "l": "au-en", "df": "m"}
    assert engines.paths == ["/duckduckgo"]  # Mojeek doesn't know how old a page is


async def test_ddgs_reads_news(engines: Site) -> None:
    engines.replies = [Reply((DATA / "bing_news.html").read_bytes())]
    (hit,) = await DdgsBackend(news=True, age="week").search("Mars", 1)
    assert hit == SearchHit(
        "Probe reaches Mars", "The probe has reached Mars.", "The Example", "https://news.example/probe"
    )
    assert engines.asked[0]["qft"] == 'interval="7"'


async def test_ddgs_falls_back_on_its_next_engine(engines: Site) -> None:
    page = b"<ul class='results'><li><h2><a href='https://m.example/'>Mojeek's</a></h2><p class='s'>found</p></li></ul>"
    engines.by_path = {"/duckduckgo": Reply(b"", 500), "/mojeek": Reply(page)}
    (hit,) = await DdgsBackend().search("x", 1)
    assert (hit.title, hit.text, hit.url) == ("Mojeek's", "found", "https://m.example/")
    assert sorted(engines.paths) == ["/duckduckgo", "/mojeek"]


@pytest.mark.parametrize(
    ("reply", "error", "said"),
    [
        (Reply(b"challenge", 202), RateLimited, "duckduckgo 202"),
        (Reply(b"", 429), RateLimited, "mojeek 429"),
        (Reply(b"", 500), Passing, "duckduckgo 500"),
        (Reply(delay_s=5), TooSlow, "time out"),
    ],
)
async def test_ddgs_tells_refusal_failure_and_silence_apart(
    engines: Site, reply: Reply, error: type[Exception], said: str
) -> None:
    engines.replies = [reply]
    with pytest.raises(error, match=said):
        await DdgsBackend(timeout_s=3.0).search("x", 1)


async def test_engines_that_can_t_be_reached_are_asked_once(engines: Site) -> None:
    engines.close()
    backend = GuardedBackend(DdgsBackend())
    began = time.monotonic()
    with pytest.raises(BackendUnavailable, match=r"^none of its engines can be reached \(\w+\)$") as caught:
        await backend.search("a secret", 1)
    assert type(caught.value) is BackendUnavailable
    assert time.monotonic() - began < 3


async def test_refused_by_one_engine_and_empty_at_another_is_empty(engines: Site) -> None:
    engines.by_path = {"/duckduckgo": Reply(b"", 429), "/mojeek": Reply(b"<html><body>none</body></html>")}
    assert await DdgsBackend().search("x", 1) == []


async def test_a_page_without_results_is_no_failure(engines: Site) -> None:
    engines.replies = [Reply(b"<html><body>No results</body></html>")]
    assert await DdgsBackend().search("x", 1) == []


async def test_without_a_network_nothing_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    class NoRoute(ddgs.socket.socket):
        def connect(self, address: object) -> None:
            raise OSError(101, "Network is unreachable")

    monkeypatch.delenv("DDGS_PROXY", raising=False)
    monkeypatch.setattr(ddgs.socket, "socket", NoRoute)
    backend = GuardedBackend(DdgsBackend())
    began = time.monotonic()
    for _ in range(5):  # and once there is one, it is used at once: this is no failure to rest after
        with pytest.raises(NotAsked, match="there is no network"):
            await backend.search("gold", 1)
    assert time.monotonic() - began < 3


@pytest.mark.parametrize("rows", ["<html>", {"a": 1}, None])
async def test_rows_that_are_none_are_a_failure(rows: Any) -> None:
    web = Web(rows=rows)
    with pytest.raises(BackendUnavailable, match="instead of a list"):
        await rested(web).search("x", 1)


# -- the guard


async def test_a_failure_is_an_error_once_and_then_a_rest() -> None:
    web = Web(error=RatelimitException("202 Ratelimit"))
    backend = rested(web, breaker=Breaker(tolerance=3, rest_s=60))
    for query in "abcde":
        with pytest.raises(BackendUnavailable, match="202 Ratelimit"):
            await backend.search(query, 1)
    assert web.calls == 3


async def test_a_rest_doubles_until_a_success() -> None:
    web = Web(error=ValueError("down"))
    backend = rested(web, breaker=Breaker(tolerance=1, rest_s=0.1))
    for calls, pause in ((1, 0.11), (2, 0.11), (2, 0.11), (3, 0.45)):
        with pytest.raises(BackendUnavailable):
            await backend.search("x", 1)
        assert web.calls == calls
        await asyncio.sleep(pause)
    web.error = None
    assert len(await backend.search("x", 1)) == 1


async def test_look_ups_that_fail_together_count_once() -> None:
    web = Web(error=ValueError("down"), delay_s=0.05)
    backend = rested(web, breaker=Breaker(tolerance=2, rest_s=60))
    await asyncio.gather(*(backend.search(query, 1) for query in "abcd"), return_exceptions=True)
    web.error = None
    assert len(await backend.search("x", 1)) == 1


async def test_one_look_up_tries_after_a_rest_while_others_go_elsewhere() -> None:
    web = Web(error=ValueError("down"))
    backend = rested(web, breaker=Breaker(tolerance=1, rest_s=0.05))
    with pytest.raises(BackendUnavailable):
        await backend.search("a", 1)
    await asyncio.sleep(0.06)
    web.error, web.delay_s = None, 0.2
    first = asyncio.create_task(backend.search("b", 1))
    await asyncio.sleep(0.05)
    with pytest.raises(NotAsked, match="is being tried again"):
        await backend.search("c", 1)
    assert len(await first) == 1
    assert len(await backend.search("d", 1)) == 1


async def test_a_cancelled_try_leaves_the_next_one_free() -> None:
    web = Web(error=ValueError("down"))
    backend = rested(web, breaker=Breaker(tolerance=1, rest_s=0.05))
    with pytest.raises(BackendUnavailable):
        await backend.search("a", 1)
    await asyncio.sleep(0.06)
    web.error, web.delay_s = None, 0.2
    first = asyncio.create_task(backend.search("b", 1))
    await asyncio.sleep(0.05)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    assert len(await backend.search("c", 1)) == 1


async def test_what_was_found_is_given_again_without_asking(site: Site) -> None:
    tool = SearchTool(backends=[guarded(site)])
    text, first = await ask(tool, "Capital of  France")
    again, second = await ask(tool, "capital of france\n")
    assert text == again
    assert (first["cached"], second["cached"]) == (False, True)
    assert first["sources"] == second["sources"]  # of the time when it was looked up
    assert len(site.asked) == 1
    await ask(tool, "capital of Spain")
    assert len(site.asked) == 2


async def test_what_was_found_is_forgotten_in_time(site: Site) -> None:
    backend = guarded(site, cache_s=0.1)
    await backend.search("x", 1)
    await asyncio.sleep(0.15)
    assert not (await backend.look_up("x", 1)).cached
    never = guarded(site, cache_s=0)
    await never.search("x", 1)
    assert not (await never.look_up("x", 1)).cached


async def test_failures_and_empty_answers_are_asked_again(site: Site) -> None:
    site.replies = [Reply(b"", 404), Reply(NOTHING), Reply(PARIS)]
    backend = guarded(site)
    with pytest.raises(BackendUnavailable):
        await backend.search("x", 1)
    assert await backend.search("x", 1) == []
    assert len(await backend.search("x", 1)) == 1


async def test_the_same_question_at_the_same_time_is_asked_once(site: Site) -> None:
    site.replies = [Reply(delay_s=0.2)]
    backend = guarded(site)
    found = await asyncio.gather(*(backend.search("x", 1) for _ in range(20)))
    assert all(hits == found[0] for hits in found)
    assert len(site.asked) == 1


async def test_who_leaves_takes_the_answer_from_nobody(site: Site) -> None:
    site.replies = [Reply(delay_s=0.3)]
    backend = guarded(site)
    first, second = (asyncio.create_task(backend.search("x", 1)) for _ in range(2))
    await asyncio.sleep(0.1)
    first.cancel()
    assert len(await second) == 1
    assert first.cancelled()
    assert len(site.asked) == 1


async def test_a_question_that_everybody_left_is_asked_anew(site: Site) -> None:
    site.replies = [Reply(delay_s=30), Reply()]
    backend = guarded(site, budget_s=5)
    first = asyncio.create_task(backend.search("x", 1))
    await asyncio.sleep(0.2)
    first.cancel()
    await asyncio.wait({first})
    assert len(await backend.search("x", 1)) == 1


async def test_a_provider_is_asked_no_oftener_than_agreed(library: LocalIndex) -> None:
    web = Web()
    tool = SearchTool(backends=[rested(web, per_minute=3), library])
    began = time.monotonic()
    backends = [(await ask(tool, f"gold {n}"))[1]["backend"] for n in range(6)]
    assert backends == ["ddgs"] * 3 + ["local"] * 3
    assert web.calls == 3
    assert time.monotonic() - began < 3  # a turn that is too far off isn't waited for
    _, artifact = await ask(tool, "gold 9")
    assert artifact["tried"][0]["error"].startswith("its 3 look-ups a minute are used up; the next is in")


async def test_a_turn_that_is_near_is_waited_for() -> None:
    limit = RateLimit(per_minute=120, window_s=0.5)
    await limit.turn(0.0)
    began = time.monotonic()
    await limit.turn(time.monotonic() + 5)
    assert 0.3 < time.monotonic() - began < 3


async def test_less_than_one_a_minute_is_one_in_several() -> None:
    limit = RateLimit(per_minute=0.5)
    await limit.turn(0.0)
    with pytest.raises(NotAsked, match=r"its 0.5 look-ups a minute are used up; the next is in 1[12]\d s"):
        await limit.turn(time.monotonic() + 60)


@pytest.mark.parametrize("rate", [0, -1, float("nan")])
def test_a_rate_that_allows_nothing_is_refused(rate: float) -> None:
    with pytest.raises(ValueError, match="number above 0"):
        RateLimit(rate)


def test_one_guard_serves_several_event_loops(site: Site) -> None:
    site.replies = [Reply(delay_s=0.1)]
    backend = guarded(site, per_minute=5)
    counts: list[int] = []

    async def several(loop: int) -> None:
        queries = [f"{loop} {n}" for n in range(3)]
        found = await asyncio.gather(*(backend.search(query, 1) for query in queries), return_exceptions=True)
        assert all(isinstance(f, list | NotAsked) for f in found), found
        counts.append(sum(isinstance(f, list) for f in found))

    threads = [threading.Thread(target=asyncio.run, args=(several(loop),)) for loop in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(counts) == 3
    assert sum(counts) == len(site.asked) == 5


async def test_a_backend_that_breaks_its_word_is_a_failure() -> None:
    class Liar:
        name = "liar"

        async def search(self, query: str, max_results: int) -> list[SearchHit]:
            return "<html>"  # type: ignore[return-value]

    backend: SearchBackend = GuardedBackend(Liar())
    with pytest.raises(BackendUnavailable, match="str instead of a list of hits"):
        await backend.search("x", 1)


# -- what is sent and what is taken

_JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(text=st.text(alphabet=st.characters(), max_size=1000))
def test_a_query_is_one_clean_line_of_at_most_400_characters(text: str) -> None:
    query = sendable(text)
    assert len(query) <= 400
    assert query == " ".join(query.split())
    query.encode()


@given(title=_JSON, text=st.text() | st.none(), url=_JSON, source=st.text() | st.integers())
def test_any_row_is_a_hit_or_none(title: Any, text: Any, url: Any, source: Any) -> None:
    hit = web_hit(title, text, url, source)
    if hit is not None:
        assert (hit.title + hit.text).strip()
        json.dumps([hit.title, hit.text, hit.source, hit.url]).encode()
        assert hit.source


@given(body=st.binary(max_size=200) | _JSON.map(lambda value: json.dumps({"results": value}).encode()))
def test_any_body_is_hits_or_a_failure(body: bytes) -> None:
    with contextlib.suppress(BackendUnavailable):
        assert all(isinstance(hit, SearchHit) for hit in searxng._hits(body))


@pytest.mark.parametrize(
    "url",
    [
        "javascript:alert(1)",
        "data:text/html,x",
        "//host/x",
        "http://",
        "http://[::1",
        'https://x/"onclick="y',
        "https://x/<script>",
        "https://x/ y",
        "https://x/" + "y" * 3000,
        None,
        7,
    ],
)
def test_only_an_address_of_a_page_becomes_a_link(url: Any) -> None:
    assert web_hit("Title", "text", url) == SearchHit("Title", "text", "web", "")


# -- options


async def test_the_tool_is_made_of_the_options(site: Site, tmp_path: Path) -> None:
    site.replies = [Reply(), Reply(b"", 404)]
    options = SearchOptions(("searxng", "local"), searxng_url=site.url, max_results=2, max_chars=90, safe="off")
    tool = open_search(tmp_path, options)
    text, artifact = await ask(tool, "capital of France")
    assert len(artifact["sources"]) == len(text.splitlines()) == 2
    assert len(text) <= 90
    assert site.asked[0]["safesearch"] == "0"
    assert (await ask(tool, "capital of Cuba"))[1]["backend"] == "local"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (SearchOptions(("bing",)), "no search backend 'bing'; use one or more of ddgs, searxng, local"),
        (SearchOptions(()), "No search backend is named"),
        (SearchOptions(("searxng",)), "set searxng_url"),
        (SearchOptions(("searxng",), searxng_url="localhost:80"), "isn't http or https"),
        (SearchOptions(("ddgs",), safe="maybe"), "'maybe'; use on, moderate, off"),
        (SearchOptions(("ddgs",), age="hour"), "'hour'; use day, week, month, year"),
        (SearchOptions(("ddgs",), region="Germany"), "'Germany' isn't country-language"),
        (SearchOptions(("ddgs",), timeout_s=0), "timeout_s is 0"),
        (SearchOptions(("ddgs",), per_minute=-1), "per_minute is -1"),
        (SearchOptions(("ddgs",), cache_s=-1), "cache_s is -1"),
    ],
)
def test_options_that_can_t_be_used_are_refused_with_the_way_out(
    tmp_path: Path, options: SearchOptions, said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        open_search(tmp_path, options)
