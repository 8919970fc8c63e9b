"""What an answer cites: each source once, in order, and no address that a link shouldn't have."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from app.artifacts import files_of, images_of
from app.citations import MAX_SOURCES, sources_of, web_address
from app.commands.ask import _show
from app.service import Finished, Started
from app.web.safe import as_link, as_words
from serving.trajectory import Observation, Step, StopReason, Trajectory


def trajectory(*observations: Observation, stop_reason: StopReason = "answer") -> Trajectory:
    steps = [
        Step(number, [1], [0.0], [1], "v0", "", "search", "", observation=observation)
        for number, observation in enumerate(observations)
    ]
    return Trajectory([1], steps, "Ulaanbaatar", stop_reason, "v0")


def seen(*sources: Any, error: bool = False, tool: str = "search") -> Observation:
    return Observation(tool, "text", error, {"sources": list(sources)})


WIKI = {"title": "Mongolia", "url": "https://example.org/Mongolia", "source": "Wikipedia", "retrieved_at": "2026-01-02"}
LOCAL = {"title": "Countries", "url": "", "source": "GeoNames", "retrieved_at": "2026-01-02"}


def test_each_source_once_in_the_order_of_use() -> None:
    found = sources_of(
        trajectory(
            seen(WIKI, LOCAL),
            seen({**WIKI, "title": "Mongolia again", "url": WIKI["url"] + "#history"}, {**LOCAL, "title": "COUNTRIES"}),
            seen({**LOCAL, "title": "Cities"}, {"url": "https://example.org/other"}, tool="fetch"),
        )
    )
    assert [(source.number, source.title, source.url) for source in found] == [
        (1, "Mongolia", "https://example.org/Mongolia"),
        (2, "Countries", ""),
        (3, "Cities", ""),
        (4, "example.org", "https://example.org/other"),
    ]
    assert found[0].source == "Wikipedia"
    assert found[0].retrieved_at == "2026-01-02"


def test_a_tool_that_failed_and_an_answer_that_never_came_cite_nothing() -> None:
    assert sources_of(trajectory(seen(WIKI, error=True), Observation("code", "42"))) == []
    assert sources_of(trajectory(seen(WIKI), stop_reason="no_answer")) == []
    assert sources_of(trajectory()) == []


def test_a_terminal_shows_them_too(capsys: pytest.CaptureFixture[str]) -> None:
    started = Started("turn_1", "conv_1", "v0", 1)
    _show(Finished(started, trajectory(seen(WIKI, {**LOCAL, "title": "[bold]Countries"})), None), as_json=False)
    shown = capsys.readouterr().out
    assert "1. Mongolia (https://example.org/Mongolia)" in shown
    assert "2. [bold]Countries (GeoNames)" in shown


@pytest.mark.parametrize("listed", [None, "x", 7, {"title": "x"}, [None, "x", 7, [], {}, {"title": 3, "url": []}]])
def test_an_artifact_of_any_shape_is_borne(listed: Any) -> None:
    artifact = {"sources": listed, "files": listed, "images": listed}
    answered = trajectory(Observation("mine", "text", False, artifact))
    assert sources_of(answered) == []
    assert files_of(answered) == []
    assert images_of(answered) == []


def test_very_many_and_very_long_sources_are_cut() -> None:
    found = sources_of(trajectory(seen(*[{"title": f"{number} " + "x" * 500} for number in range(100)])))
    assert len(found) == MAX_SOURCES
    assert all(len(source.title) == 160 for source in found)


@pytest.mark.parametrize(
    "given_",
    [
        "javascript:alert(1)",
        "JaVaScRiPt:alert(1)",
        "java\nscript:alert(1)",
        "data:text/html,<script>alert(1)</script>",
        "file:///etc/passwd",
        "//example.org/x",
        "/v1/conversations",
        "example.org",
        "https://",
        "https://:80/",
        "https://bank.example@evil.example/",
        "https://evil.example\\@bank.example/",
        "https://exa mple.org/",
        "https://example.org/\u202egpj",
        "https://[::1/",
        "https://example.org:port/",
        "https://example.org/" + "x" * 2_000,
        "",
        None,
        7,
    ],
)
def test_what_is_no_web_address_gets_no_link(given_: object) -> None:
    assert web_address(given_) == ""


def test_an_address_keeps_its_meaning() -> None:
    assert web_address(" https://example.org/a?b=c&d=%20#e ") == "https://example.org/a?b=c&d=%20#e"
    assert web_address("https://example.org/Caf\u00e9_(x)") == "https://example.org/Caf%C3%A9_%28x%29"
    assert web_address('http://example.org/"><script>') == "http://example.org/%22%3E%3Cscript%3E"


HOSTILE = [
    "](javascript:alert(1))",
    "<img src=x onerror=alert(1)>",
    "![x](https://evil.example/beacon.png)",
    "[click](https://evil.example)",
    "https://evil.example/",
    "www.evil.example",
    "`code` **bold** _it_ ~~no~~ $$x$$ | a | b |",
    "&lt;b&gt; &amp; \\] \\",
    "# heading",
    "1. list",
    "x\n\n---\n<b>",
]


@pytest.mark.parametrize("title", HOSTILE)
def test_a_title_is_shown_as_it_is_and_does_nothing(title: str) -> None:
    check(title)


@given(st.text(min_size=1, max_size=60))
def test_any_title_is_shown_as_it_is(title: str) -> None:
    check(title)


def check(title: str) -> None:
    markdown = MarkdownIt("gfm-like", {"html": True, "linkify": False})
    shown = " ".join(title.split())
    if not shown or not shown.isprintable():
        return
    words, link = [
        markdown.parseInline(text)[0].children or [] for text in (as_words(title), as_link(title, "https://a.example/"))
    ]
    assert [token.type for token in words if token.type not in ("text", "text_special")] == []
    assert "".join(token.content for token in words) == shown
    assert [token.type for token in link if token.type not in ("text", "text_special")] == ["link_open", "link_close"]
    assert link[0].attrs == {"href": "https://a.example/"}


def test_files_and_figures_are_listed_once_and_never_by_a_bad_name() -> None:
    first = {"files": [{"name": "a.csv", "bytes": 1, "media_type": "text/csv"}], "images": [{"name": "f.png"}]}
    again = {"files": [{"name": "a.csv", "bytes": 2, "media_type": "text/csv"}, {"name": "../x"}], "images": []}
    answered = trajectory(*[Observation("code", "", False, artifact) for artifact in (first, again)])
    assert [(left.name, left.bytes) for left in files_of(answered)] == [("a.csv", 2)]
    assert [left.name for left in images_of(answered)] == ["f.png"]
