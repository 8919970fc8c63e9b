"""The chat: what a person sees of an answer, and what becomes of a thumb and a correction."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from app.service import Finished, Service, Started
from app.settings import Settings
from app.web import verdicts
from app.web.page import Session, respond, status_line
from app.web.safe import as_code, as_markdown
from app.web.transcript import Transcript
from feedback_store import Store
from serving.model import BaseModel
from serving.trajectory import AnswerText, Observation, Step, StepDone, Thinking, ToolCall, ToolResult, Trajectory
from tests.fakes import ScriptedEngine, make_service

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
    assert tool["metadata"]["title"] == "Python: print(6*7)"
    assert tool["metadata"]["duration"] == 0.25
    assert "```python\nprint(6*7)\n```" in tool["content"]
    assert "42" in tool["content"]
    assert text["content"] == "It is 42.\n\n*v0 · 1 tool call · 1.0 s*"


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
    corrected, thumb = store.outcomes(session.last_turn)
    assert (thumb.source, thumb.score) == ("person", 0.0)
    assert (corrected.source, corrected.verifier, corrected.gold, corrected.score) == ("person", "numeric", "41", 0.0)
    assert "1 question for tonight" in re.sub("<[^>]+>", "", await status_line(service))


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
