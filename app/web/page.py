"""The chat page: questions, answers with their panels, thumbs, and "the right answer is…"."""

from __future__ import annotations

import asyncio
import html
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gradio as gr

from app.api.errors import ApiError
from app.service import Message, Question, Service
from app.settings import Settings
from app.web import files, verdicts
from app.web.owner import owner_of_request
from app.web.transcript import ChatMessage, Transcript
from feedback_store import StoreError
from serving.engines.base import Sampling
from tools.workspace import WorkspaceError

Asked = tuple[str, list[str]]  # a question, and the names of the files that came with it

STYLE = Path(__file__).with_name("style.css")
REFRESH_SECONDS = 4.0
FRAME_SECONDS = 0.06  # the page is redrawn at most this often while text streams
UPLOAD_SECONDS = 3600  # a file that was attached and not sent is kept this long
HEADER = """<div class="top"><div><h1>Whetstone</h1><p>Gets better overnight from its own verified answers.</p></div>
<div class="status">{status}</div></div>"""
# gradio's chips show no names. This runs in the browser alone, at each change of the box.
NAME_CHIPS = """(given) => requestAnimationFrame(() =>
  document.querySelectorAll("#question .thumbnail-item").forEach((chip, at) => {
    const file = given.files[at];
    chip.dataset.name = chip.title = file ? file.orig_name || "" : "";
  }))"""
EXAMPLES = (  # Python, search, Python after some thought, no tool
    "What is 4827 * 391?",
    "What is the capital of Mongolia?",
    "A shop has 17 boxes of 24 pencils. How many pencils is that?",
    "Good morning! How are you?",
)


@dataclass
class Session:
    """One browser tab: its conversation, what its page shows, and which messages there belong to which turn.

    What is shown is kept here and not asked of the browser, which could send messages of any kind.
    """

    conversation_id: str | None = None
    turns: list[tuple[int, int, str]] = field(default_factory=list)  # first and last message, turn id
    shown: list[ChatMessage] = field(default_factory=list)

    @property
    def last_turn(self) -> str | None:
        return self.turns[-1][2] if self.turns else None

    def turn_at(self, index: int) -> str | None:
        """The turn that the message at `index` of the page belongs to."""
        return next((turn for first, last, turn in self.turns if first <= index <= last), None)


async def respond(
    service: Service,
    settings: Settings,
    owner: str,
    text: str,
    shown: list[ChatMessage],
    session: Session,
    attached: Sequence[str] = (),
) -> AsyncGenerator[list[ChatMessage]]:
    """The page's messages, again and again, while the question `text` is answered after what is `shown`.

    `attached` are names of files that were put into the conversation with this question.
    """
    before = [*shown, {"role": "user", "content": files.shown_with(text, attached)}]
    transcript = Transcript()
    drawn = 0.0
    yield before
    try:
        messages: list[Message] = []
        if session.conversation_id is not None:
            messages = await service.call(service.store.history, session.conversation_id)
        messages = await service.fit(
            [*messages, {"role": "user", "content": files.asked_with(text, attached)}], settings.max_tokens
        )
        sampling = Sampling(settings.temperature, settings.top_p, settings.max_tokens)
        question = Question(owner, messages, sampling, session.conversation_id)
        async with aclosing(service.answer(question)) as events:
            async for event in events:
                if transcript.feed(event) or time.monotonic() - drawn > FRAME_SECONDS:
                    drawn = time.monotonic()
                    yield [*before, *transcript.messages]
    except (asyncio.CancelledError, GeneratorExit):
        transcript.stop()
        raise
    except Exception as error:
        transcript.fail(str(error))
        yield [*before, *transcript.messages]
    finally:
        if transcript.started is not None:
            last = len(before) + len(transcript.messages) - 1
            session.conversation_id = transcript.started.conversation_id
            session.turns.append((len(before), last, transcript.started.turn_id))


async def status_line(service: Service) -> str:
    """The version in service and what waits for the night, as one line of HTML."""
    healthy, _ = await service.health()
    if not healthy:
        return '<div class="line down"><span class="dot"></span>Not answering: see <b>whetstone doctor</b></div>'
    waiting = (await service.call(service.store.queue_stats))["pending"]
    noun = "question" if waiting == 1 else "questions"
    version = html.escape(service.router.current)
    return (
        f'<div class="line"><span class="dot"></span><b>{version}</b> in service · {waiting} {noun} for tonight</div>'
    )


def build(service: Service, settings: Settings) -> gr.Blocks:
    """The page. One tab holds one conversation; everything said is in the store."""
    page: gr.Blocks
    with gr.Blocks(
        title="Whetstone", analytics_enabled=False, fill_height=True, delete_cache=(UPLOAD_SECONDS, UPLOAD_SECONDS)
    ) as page:
        session = gr.State(Session())
        header = gr.HTML(HEADER.format(status=""), elem_id="header")
        chat = gr.Chatbot(
            elem_id="chat",
            show_label=False,
            height="calc(100dvh - 258px)",
            min_height=300,
            layout="bubble",
            sanitize_html=True,
            allow_tags=False,
            buttons=["copy"],
            feedback_options=("Like", "Dislike"),
            placeholder="### Ask something\nIt works sums out in Python and looks facts up. Open a step to see how.",
            examples=[{"text": text, "display_text": text} for text in EXAMPLES],
        )
        with gr.Row(elem_id="ask"):
            box = gr.MultimodalTextbox(
                placeholder="Ask anything…", show_label=False, container=False, lines=1, max_lines=6, scale=8,
                autofocus=True, elem_id="question", submit_btn=False, file_count="multiple",
                sources=["upload"] if service.workspaces else [], max_plain_text_length=settings.max_body_bytes,
            )  # fmt: skip
            send = gr.Button("Send", variant="primary", scale=1, elem_id="send")
            stop = gr.Button("Stop", variant="stop", scale=1, visible=False, elem_id="stop")
            new = gr.Button("New chat", scale=1, elem_id="new")
        with gr.Row(elem_id="verdict", visible=False) as verdict:
            right = gr.Textbox(
                placeholder="The right answer is…", show_label=False, label="The right answer", container=False,
                scale=6, elem_id="right",
            )  # fmt: skip
            kind = gr.Dropdown(
                list(verdicts.KINDS), value=verdicts.AUTO, show_label=False, label="Compared as", container=False,
                scale=2, min_width=130, elem_id="kind",
            )  # fmt: skip
            teach = gr.Button("Teach", scale=1, min_width=92, elem_id="teach")
        line = gr.Markdown("", elem_id="verdict-line", sanitize_html=True)

        async def on_ask(question: Asked, tab: Session, request: gr.Request) -> AsyncGenerator[list[ChatMessage]]:
            owner, (text, names) = owner_of_request(request), question
            async with aclosing(respond(service, settings, owner, text, tab.shown, tab, names)) as frames:
                async for frame in frames:
                    tab.shown = frame
                    yield frame

        async def on_teach(gold: str, chosen: str, tab: Session, request: gr.Request) -> tuple[str, str]:
            said = await verdicts.correct(service, owner_of_request(request), tab.last_turn, gold, chosen)
            return said, "" if said.startswith(verdicts.TAKEN) else gold

        async def on_like(tab: Session, request: gr.Request, like: gr.LikeData) -> str:
            index = like.index if isinstance(like.index, int) else like.index[0]
            return await verdicts.thumb(service, owner_of_request(request), tab.turn_at(index), like.liked is True)

        async def take(given: dict[str, Any], tab: Session, request: gr.Request) -> tuple[Asked, None]:
            text, uploads = given["text"], given["files"]
            if not text.strip():
                raise gr.Error("Write a question first.", duration=4, print_exception=False)
            if not uploads:
                return (text, []), None
            try:
                tab.conversation_id, names = await files.attach(
                    service, owner_of_request(request), tab.conversation_id, uploads
                )
            except FileNotFoundError:
                raise gr.Error("A file is there no more: attach it again.", print_exception=False) from None
            except (WorkspaceError, StoreError, ApiError, OSError) as error:
                raise gr.Error(html.escape(str(error)), duration=12, print_exception=False) from None
            return (text, names), None

        def pick(example: gr.SelectData) -> Asked:
            return str(example.value["text"]), []

        def busy() -> list[Any]:
            return [gr.update(visible=False), gr.update(visible=True), gr.update(interactive=False), ""]

        def idle(tab: Session) -> list[Any]:
            done = bool(tab.turns)
            return [
                gr.update(visible=True),
                gr.update(visible=False),
                gr.update(interactive=True),
                gr.update(visible=done),
            ]

        private: dict[str, Any] = {"api_visibility": "private"}
        asked = gr.State(("", []))
        started = gr.on([box.submit, send.click], take, [box, session], [asked, box], show_progress="hidden", **private)
        chosen = chat.example_select(pick, None, asked, show_progress="hidden", **private)
        for trigger in (started, chosen):
            running = trigger.success(busy, None, [send, stop, new, line], show_progress="hidden", **private)
            answering = running.then(
                on_ask, [asked, session], chat, show_progress="hidden",
                concurrency_limit=settings.max_answers, concurrency_id="answers", **private,
            )  # fmt: skip
            answering.then(idle, session, [send, stop, new, verdict], show_progress="hidden", **private)
            stop.click(
                idle, session, [send, stop, new, verdict], cancels=[answering], show_progress="hidden", **private
            )
        gr.on(
            [new.click, chat.clear],
            lambda: ([], Session(), "", gr.update(visible=False)),
            None,
            [chat, session, line, verdict],
            **private,
        )
        box.change(None, box, None, js=NAME_CHIPS, **private)
        gr.on([teach.click, right.submit], on_teach, [right, kind, session], [line, right], **private)
        chat.like(on_like, session, line, **private)

        async def refresh() -> str:
            return HEADER.format(status=await status_line(service))

        page.load(refresh, None, header, show_progress="hidden", **private)
        gr.Timer(REFRESH_SECONDS).tick(refresh, None, header, show_progress="hidden", **private)
    page.queue(default_concurrency_limit=None, max_size=4 * settings.max_answers, api_open=False)
    return page
