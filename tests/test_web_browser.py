"""The chat in a real browser: a streamed answer, its panels, a correction, and nothing fetched from elsewhere."""

from __future__ import annotations

import asyncio
import re
import shutil
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import uvicorn
from playwright.async_api import Download, FilePayload, Page, async_playwright, expect

from app.service import Service
from app.settings import Settings
from feedback_store import Store
from serving.model import BaseModel
from tests.artist import Artist
from tests.fakes import make_service, until
from tools.workspace import Workspaces

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-dev-shm-usage",
    "--no-first-run",
]

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium"),
]


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    with Store.open(tmp_path / "store.db") as opened:
        yield opened


@asynccontextmanager
async def chat_of(service: Service, home: Path) -> AsyncIterator[Page]:
    """The chat of `service` in a browser."""
    from app.web.app import create_web

    listening = socket.create_server(("127.0.0.1", 0))
    port = listening.getsockname()[1]
    app = create_web(service, Settings(home=home, web_port=port))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
    serving = asyncio.create_task(server.serve([listening]))
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        opened = await browser.new_page(viewport={"width": 1100, "height": 820})
        opened.set_default_timeout(60_000)
        await opened.goto(f"http://127.0.0.1:{port}/")
        yield opened
        await browser.close()
    server.should_exit = True
    await serving


@pytest.fixture
async def page(base: BaseModel, store: Store, tmp_path: Path) -> AsyncIterator[Page]:
    service, engine = make_service(base, store, documents=tmp_path)
    engine.delay = 0.03
    async with chat_of(service, tmp_path) as opened:
        yield opened


@pytest.fixture
def workspaces(tmp_path: Path) -> Workspaces:
    return Workspaces(tmp_path / "files", max_bytes=100_000)


@pytest.fixture
async def drawing(base: BaseModel, store: Store, workspaces: Workspaces, tmp_path: Path) -> AsyncIterator[Page]:
    """A chat whose programs draw a figure and write files."""
    service, _ = make_service(base, store, workspaces=workspaces, code=Artist(workspaces=workspaces))
    async with chat_of(service, tmp_path) as opened:
        yield opened


async def test_a_conversation(page: Page, store: Store, tmp_path: Path) -> None:
    elsewhere: list[str] = []
    alerts: list[str] = []
    own = page.url
    page.on("request", lambda r: None if r.url.startswith((own, "data:", "blob:")) else elsewhere.append(r.url))
    page.on("dialog", lambda dialog: alerts.append(dialog.message))
    await page.reload()
    question = page.locator("#question textarea")
    chat = page.locator("#chat")

    await question.fill("What is 6 * 7?")
    await question.press("Enter")
    await expect(chat).to_contain_text("The result is 42.", timeout=60_000)
    await expect(chat).to_contain_text("v0 · 1 tool call")
    await chat.get_by_text("Python: print(6 * 7)").click()
    await expect(chat.locator("pre").first).to_contain_text("print(6 * 7)")

    await question.fill("What is the capital of Mongolia?")
    await question.press("Enter")
    await expect(chat).to_contain_text("Ulaanbaatar <img src=x onerror=alert(1)>", timeout=60_000)
    assert await chat.locator("img[src=x]").count() == 0
    await expect(chat).to_contain_text("Search: capital of Mongolia")

    await page.get_by_label("Dislike").last.click()
    await expect(page.locator("#verdict-line")).to_contain_text("recorded as bad")
    await page.locator("#right textarea, #right input").first.fill("Ulaanbaatar")
    await page.locator("#teach").click()
    await expect(page.locator("#verdict-line")).to_contain_text("queued for tonight")
    await expect(page.locator("#header")).to_contain_text("1 question for tonight", timeout=20_000)
    await page.screenshot(path=tmp_path / "chat.png")
    assert [outcome.source for outcome in store.outcomes()] == ["person", "person"]
    assert elsewhere == []
    assert alerts == []


async def test_stop_and_a_new_chat(page: Page, store: Store) -> None:
    question = page.locator("#question textarea")
    await question.fill("slow, please")
    await question.press("Enter")
    await expect(page.locator("#chat")).to_contain_text("one two three", timeout=60_000)
    await page.locator("#stop").click()
    await until(lambda: store.turns()[0].status == "cancelled")
    await page.locator("#new").click()
    await page.get_by_text("Good morning! How are you?").click()
    await expect(page.locator("#chat")).to_contain_text("How can I help?", timeout=60_000)
    await until(lambda: len(store.conversations()) == 2)


def upload(name: str, data: bytes) -> FilePayload:
    return {"name": name, "mimeType": "text/csv", "buffer": data}


async def text_of(download: Download) -> str:
    return await asyncio.to_thread(Path(await download.path()).read_text)


async def test_a_file_is_attached_and_what_comes_of_it_is_shown_and_fetched(
    drawing: Page, store: Store, workspaces: Workspaces
) -> None:
    wrong: list[str] = []
    own = drawing.url
    drawing.on("dialog", lambda dialog: wrong.append(dialog.message))
    drawing.on("request", lambda r: None if r.url.startswith((own, "data:", "blob:")) else wrong.append(r.url))
    question, chat = drawing.locator("#question textarea"), drawing.locator("#chat")
    chips = drawing.locator("#question .thumbnail-item")
    hostile = "<img src=x onerror=alert(2)>.csv"

    await drawing.locator("#question input[type=file]").set_input_files(
        [upload("sales.csv", b"20\n22\n"), upload("unwanted.csv", b"1"), upload(hostile, b"")]
    )
    await expect(chips).to_have_count(3)
    await expect(chips.nth(1)).to_have_attribute("data-name", "unwanted.csv")
    await chips.nth(1).get_by_label("Remove file").click()
    await expect(chips).to_have_count(2)
    await question.fill("What is 6 * 7?")
    await question.press("Enter")
    await expect(chat).to_contain_text("The result is 42.")
    await expect(chips).to_have_count(0)
    await expect(chat).to_contain_text("Attached: sales.csv, ")
    (conversation,) = store.conversations()
    assert {file.name for file in workspaces.files(conversation.id)} >= {"sales.csv", "total.txt"}
    assert "unwanted.csv" not in {file.name for file in workspaces.files(conversation.id)}

    figure = chat.get_by_alt_text("Figure 1")
    await expect(figure).to_be_visible()
    assert await figure.evaluate("image => image.naturalWidth") == 480
    async with drawing.expect_download() as download:
        await chat.get_by_role("link", name="total.txt").click()
    fetched = await download.value
    assert fetched.suggested_filename == "total.txt"
    assert await text_of(fetched) == "42"
    async with drawing.expect_download() as download:
        await chat.get_by_role("link", name="alert(1)").first.click()
    assert await text_of(await download.value) == "<script>alert(1)</script>"

    source = chat.get_by_role("link", name="Sales <b>2024</b>")
    await expect(source).to_have_attribute("href", "https://example.org/sales_%28a%29")
    await expect(source).to_have_attribute("rel", re.compile("noopener"))
    await expect(chat).to_contain_text("Prices (Price list)")
    assert await chat.locator("a[href^='javascript']").count() == 0
    assert await drawing.locator("img[src=x]").count() == 0

    await drawing.locator("#new").click()
    await expect(figure).to_have_count(0)
    await drawing.reload()
    await expect(chat).to_contain_text("Ask something")
    assert "total.txt" not in await drawing.content()
    assert wrong == []


async def test_a_refused_file_is_told_and_the_question_kept(
    drawing: Page, store: Store, workspaces: Workspaces
) -> None:
    await drawing.locator("#question input[type=file]").set_input_files([upload("big.csv", b"1" * 200_000)])
    await expect(drawing.locator("#question .thumbnail-item")).to_have_count(1)
    question = drawing.locator("#question textarea")
    await question.fill("What is 6 * 7?")
    await drawing.locator("#send").click()
    await expect(drawing.get_by_text("WHETSTONE_FILES_MB")).to_be_visible()
    await expect(question).to_have_value("What is 6 * 7?")
    await expect(drawing.locator("#question .thumbnail-item")).to_have_count(1)
    assert store.turns() == []
    await drawing.get_by_label("Remove file").click()
    await drawing.locator("#send").click()
    await expect(drawing.locator("#chat")).to_contain_text("The result is 0.")
