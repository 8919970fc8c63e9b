"""The chat: what a person sees of an answer, and what becomes of a thumb and a correction."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from app.owners import owner_of
from app.service import Finished, Service, Started
from app.settings import Settings
from app.web import verdicts
from app.web.files import attach
from app.web.page import Session, respond, status_line
from app.web.safe import as_code, as_markdown
from app.web.transcript import Transcript
from feedback_store import NotFound, Store
from serving.model import BaseModel
from serving.trajectory import AnswerText, Observation, Step, StepDone, Thinking, ToolCall, ToolResult, Trajectory
from tests.artist import figure
from tests.fakes import ScriptedEngine, make_service
from tools.workspace import WorkspaceFull, Workspaces

STARTED = Started("turn_1", "conv_1", "v0", 10)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "store.db") as opened:
        yield opened


@pytest.fixture
def chat(base: BaseModel, store: Store, tmp_path: Path) -> tuple[Service, ScriptedEngine]:
    return make_service(base, store)


async def say(service: Service, tmp_path: Path, text: str, shown: list[Any], session: Session) -> list[Any]:
    frames = [frame async for frame in respond(service, Settings(home=tmp_path), "local", text, shown, session)]
    return frames[-1]


def step(action: Any, text: str = "", observation: Observation | None = None) -> Step:
    return Step(0, [1], [0.0], [1], "v0", text, action, text, observation=observation, seconds=0.5)


def test_the_panels_of_an_answer() -> None:
    transcript = Transcript()
    call = step("code", "print(6*7)", Observation("code", "42", seconds=0.25))
    answer = step("answer", "It is 42.")
    transcript.feed(STARTED)
    transcript.feed(Thinking("I will multiply."))
    assert transcript.messages[0]["metadata"] == {"title": "Thinking", "status": "pending"}
    transcript.feed(ToolCall("code", "print(6*7)"))
    assert [panel["metadata"]["status"] for panel in transcript.messages] == ["done", "pending"]
    transcript.feed(ToolResult(Observation("code", "42", artifact={"exit_code": 0}, seconds=0.25)))
    transcript.feed(StepDone(call))
    transcript.feed(AnswerText("It is "))
    transcript.feed(Finished(STARTED, Trajectory([1], [call, answer], "It is 42.", "answer", "v0"), None))
    thought, tool, text = transcript.messages
    assert thought["content"] == "I will multiply."
    assert unescape(tool["metadata"]["title"]) == "Python: print(6*7)"
    assert tool["metadata"]["duration"] == 0.25
    assert "```python\nprint(6*7)\n```" in tool["content"]
    assert "42" in tool["content"]
    assert text["content"] == "It is 42.\n\n*v0 · 1 tool call · 1.0 s*"


SALES = {"title": "Sales](javascript:alert(1))", "url": "https://example.org/sales", "source": "Example"}
PRICES = {"title": "Prices", "url": "javascript:alert(1)", "source": "Price <b>list</b>"}


def test_figures_and_files_stand_under_their_panel_and_sources_under_the_answer() -> None:
    left = {
        "images": [{"name": "ab.png", "media_type": "image/png"}, {"name": "../x.png", "media_type": "image/png"}],
        "files": [{"name": "<b>](x) ![y](z).csv", "bytes": 1234, "media_type": "text/csv"}],
        "sources": [SALES, PRICES],
    }
    observation = Observation("code", "42", artifact=left)
    transcript = Transcript()
    transcript.feed(STARTED)
    transcript.feed(ToolCall("code", "plot()"))
    transcript.feed(ToolResult(observation))
    transcript.feed(StepDone(step("code", "plot()", observation)))
    transcript.feed(
        Finished(STARTED, Trajectory([1], [step("code", "plot()", observation)], "Done.", "answer", "v0"), None)
    )
    panel, shown, answer = transcript.messages
    assert unescape(panel["metadata"]["title"]) == "Python: plot()"
    assert "metadata" not in shown, "what is shown without opening a panel"
    html = MarkdownIt().render(shown["content"])
    assert '<img src="conversations/conv_1/images/ab.png" alt="Figure 1"' in html
    assert html.count("<img") == 1
    assert html.count("<a ") == 1
    assert ">&lt;b&gt;](x) ![y](z).csv</a> 1.2 kB" in html
    html = MarkdownIt().render(answer["content"])
    assert '<a href="https://example.org/sales">Sales](javascript:alert(1))</a> (Example)' in html
    assert "Prices (Price &lt;b&gt;list&lt;/b&gt;)" in html
    assert html.count("<a ") == 1
    assert html.rstrip().endswith("<em>v0 · 1 tool call · 0.5 s</em></p>")


def test_any_tool_has_a_panel() -> None:
    transcript = Transcript()
    transcript.feed(ToolCall("weather", '{"city": "Ulm"}'))
    transcript.feed(ToolResult(Observation("weather", "rain")))
    assert unescape(transcript.messages[0]["metadata"]["title"]) == 'weather: {"city": "Ulm"}'


@pytest.mark.parametrize(
    "line", ["__import__('os') * 2 * 3", "<img src=x onerror=alert(1)>", "![a](https://b.example)"]
)
def test_a_panels_title_is_shown_as_it_is(line: str) -> None:
    transcript = Transcript()
    transcript.feed(ToolCall("code", line))
    shown = MarkdownIt().render(transcript.messages[0]["metadata"]["title"])
    assert shown.count("<") == 2, shown
    assert unescape(shown).strip() == f"<p>Python: {line}</p>"


async def test_attached_files_reach_the_conversation_and_the_question(
    base: BaseModel, store: Store, tmp_path: Path
) -> None:
    service, engine = make_service(base, store, workspaces=Workspaces(tmp_path / "files"))
    upload = tmp_path / "cafe\u0301.csv"
    upload.write_bytes(b"1")
    conversation, names = await attach(service, "local", None, [str(upload)])
    assert names == ["caf\u00e9.csv"]
    assert not upload.exists()
    read: list[str] = []
    engine.script = lambda context: read.append(context) or "<think>x</think><answer>Yes.</answer>"  # type: ignore[func-returns-value]
    session = Session(conversation)
    frames = [
        frame async for frame in respond(service, Settings(home=tmp_path), "local", "Read it", [], session, names)
    ]
    assert "Attached files: caf\u00e9.csv" in read[0]
    assert "Attached:" in frames[-1][0]["content"]
    assert [turn.conversation_id for turn in store.turns()] == [conversation]
    with pytest.raises(NotFound):
        await attach(service, "key-other", conversation, [])


async def test_a_refused_attachment_is_still_there(base: BaseModel, store: Store, tmp_path: Path) -> None:
    service, _ = make_service(base, store, workspaces=Workspaces(tmp_path / "files", max_bytes=3))
    small, big = tmp_path / "small", tmp_path / "big"
    small.write_bytes(b"1")
    big.write_bytes(b"1234")
    with pytest.raises(WorkspaceFull, match="FILES_MB"):
        await attach(service, "local", None, [str(small), str(big)])
    assert small.exists()
    assert big.exists()
    with pytest.raises(FileNotFoundError):
        await attach(service, "local", None, [str(tmp_path / "gone")])


@pytest.fixture
def two_logins(base: BaseModel, store: Store, tmp_path: Path) -> tuple[str, list[str], httpx.ASGITransport]:
    """A file and a figure of the first key's owner, as paths of the chat, and the chat behind a login."""
    from app.web.app import create_web

    workspaces = Workspaces(tmp_path / "files")
    service, _ = make_service(base, store, workspaces=workspaces)
    conversation = store.create_conversation(owner_of(b"one"))
    workspaces.write(conversation, "page.html", b"<script>alert(1)</script>")
    drawn = workspaces.write_image(conversation, figure())
    paths = [f"/conversations/{conversation}/files/page.html", f"/conversations/{conversation}/images/{drawn}"]
    settings = Settings(home=tmp_path, api_keys=["one", "two"])  # type: ignore[arg-type]
    return conversation, paths, httpx.ASGITransport(create_web(service, settings))


async def test_only_the_owner_fetches_files_and_figures(
    two_logins: tuple[str, list[str], httpx.ASGITransport],
) -> None:
    conversation, paths, transport = two_logins
    for key, status in (("one", 200), ("two", 404), (None, 401)):
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            if key is not None:
                login = {"username": owner_of(key.encode()), "password": key}
                assert (await client.post("/login", data=login)).status_code == 200
            answers = [await client.get(path) for path in paths]
            assert [answer.status_code for answer in answers] == [status, status]
            if status == 200:
                page, drawn = answers
                assert page.headers["content-type"] == "application/octet-stream"
                assert page.headers["content-disposition"].startswith("attachment")
                assert "sandbox" in page.headers["content-security-policy"]
                assert drawn.headers["content-type"] == "image/png"
                assert (await client.get(f"/conversations/{conversation}/files/none")).status_code == 404
                traversal = await client.get(f"/conversations/{conversation}/files/..%2f..%2fstore.db")
                assert traversal.status_code == 404


async def test_a_key_of_the_store_logs_in_until_it_is_revoked(
    base: BaseModel, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from app.web.app import create_web

    monkeypatch.setattr("app.keys.REFRESH_SECONDS", 0.0)
    service, _ = make_service(base, store)
    open_page = httpx.ASGITransport(create_web(service, Settings(home=tmp_path)))
    async with httpx.AsyncClient(transport=open_page, base_url="http://127.0.0.1") as client:
        assert (await client.get("/config")).status_code == 200
        key, secret = store.add_key("laptop", ["chat"])
        _, judge = store.add_key("judge", ["feedback"])
        assert (await client.get("/config")).status_code == 503, "a page without a login is open no longer"
    transport = httpx.ASGITransport(create_web(service, Settings(home=tmp_path)))
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
        for password in (judge, "wsk-none"):
            refused = await client.post("/login", data={"username": key.owner, "password": password})
            assert refused.status_code == 400
        assert (await client.post("/login", data={"username": key.owner, "password": secret})).status_code == 200
        assert (await client.get("/config")).status_code == 200
        store.revoke_key("laptop")
        assert (await client.get("/config")).status_code == 401


def test_a_failed_tool_and_an_unclear_action_say_so() -> None:
    transcript = Transcript()
    transcript.feed(ToolCall("search", "x"))
    transcript.feed(ToolResult(Observation("search", "no network", error=True, artifact={"backend": "ddgs"})))
    transcript.feed(StepDone(replace(step("invalid", "<code>"), observation=Observation("invalid", "Try again."))))
    failed, unclear = transcript.messages
    assert failed["metadata"]["title"] == "Search: x (failed)"
    assert "Error from ddgs" in failed["content"]
    assert "Try again." in unclear["content"]


@given(st.text(alphabet="<>&`![]()ab \n\"'=/:", max_size=60) | st.text(max_size=60))
def test_no_text_becomes_html_or_a_picture(text: str) -> None:
    reader = MarkdownIt("commonmark")
    for written in (as_markdown(text), as_code(text)):
        tokens = [token for block in reader.parse(written) for token in [block, *(block.children or [])]]
        assert not [token for token in tokens if token.type in ("html_block", "html_inline", "image")], written
    (block,) = [token for token in reader.parse(as_code(text)) if token.type != "text"]
    assert block.type == "fence"


async def test_a_conversation_remembers_and_maps_its_messages(
    chat: tuple[Service, ScriptedEngine], store: Store, tmp_path: Path
) -> None:
    service, _ = chat
    session = Session()
    shown = await say(service, tmp_path, "What is 6 * 7?", [], session)
    assert shown[0] == {"role": "user", "content": "What is 6 * 7?"}
    assert shown[-1]["content"].startswith("The result is 42.\n\n*v0 · 1 tool call")
    first = session.last_turn
    shown = await say(service, tmp_path, "hello", shown, session)
    assert session.conversation_id is not None
    assert len(store.history(session.conversation_id)) == 4
    assert [said["content"] for said in store.turns()[0].messages][:2] == ["What is 6 * 7?", "The result is 42."]
    assert session.turn_at(0) is None
    assert session.turn_at(1) == first
    assert session.turn_at(len(shown) - 1) == session.last_turn != first


async def test_an_old_conversation_is_cut_to_what_fits(
    chat: tuple[Service, ScriptedEngine], store: Store, tmp_path: Path
) -> None:
    service, _ = chat
    session = Session()
    shown: list[Any] = []
    for number in range(4):
        shown = await say(service, tmp_path, f"hello {number} " + "and more " * 300, shown, session)
    newest = store.turns()[0]
    assert newest.status == "done"
    assert len(newest.messages) < 7
    assert newest.messages[-1]["content"].startswith("hello 3")


async def test_an_error_is_shown_in_place_of_the_answer(
    chat: tuple[Service, ScriptedEngine], store: Store, tmp_path: Path
) -> None:
    service, engine = chat
    engine.dead = True
    shown = await say(service, tmp_path, "hello", [], Session())
    assert shown[-1]["content"].startswith("**No answer:** The engine has stopped")
    assert "Not answering" in await status_line(service)
    assert store.turns()[0].status == "error"


async def test_a_thumb_and_a_correction_are_recorded(
    chat: tuple[Service, ScriptedEngine], store: Store, tmp_path: Path
) -> None:
    service, _ = chat
    session = Session()
    await say(service, tmp_path, "What is 6 * 7?", [], session)
    assert session.last_turn is not None
    assert "bad" in await verdicts.thumb(service, "local", session.last_turn, up=False)
    said = await verdicts.correct(service, "local", session.last_turn, "41")
    assert "queued for tonight" in said
    assert "1 question for tonight" in re.sub("<[^>]+>", "", await status_line(service))
    store.add_task([{"role": "user", "content": "What is 6 * 7?"}], "numeric", "42", "numeric", "person", "key-other")
    contested = await verdicts.correct(service, "local", session.last_turn, "41")
    assert "queued" not in contested
    assert "It trains nothing until a person has decided" in contested
    _, corrected, thumb = store.outcomes(session.last_turn)
    assert (thumb.source, thumb.score) == ("person", 0.0)
    assert (corrected.source, corrected.verifier, corrected.gold, corrected.score) == ("person", "numeric", "41", 0.0)


@pytest.mark.parametrize(("turn", "gold"), [(None, "42"), ("last", "  "), ("turn_none", "42")])
async def test_verdicts_without_a_turn_or_an_answer_are_told(
    chat: tuple[Service, ScriptedEngine], tmp_path: Path, turn: str | None, gold: str
) -> None:
    service, _ = chat
    session = Session()
    await say(service, tmp_path, "hello", [], session)
    said = await verdicts.correct(service, "local", session.last_turn if turn == "last" else turn, gold)
    assert not said.startswith(verdicts.TAKEN)


@pytest.mark.parametrize(
    ("gold", "verifier"),
    [("42", "numeric"), ("1,887,357", "numeric"), ("-3.5", "numeric"), ("Paris", "exact"), ("42 apples", "exact")],
)
def test_the_verifier_is_chosen_by_the_right_answer(gold: str, verifier: str) -> None:
    assert verdicts.verifier_for(gold) == verifier
    assert verdicts.verifier_for(gold, "maths") == "math"
