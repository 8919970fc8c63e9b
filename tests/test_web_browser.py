"""The chat in a real browser: a streamed answer, its panels, a correction, and nothing fetched from elsewhere."""

from __future__ import annotations

import asyncio
import shutil
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import uvicorn
from playwright.async_api import Page, async_playwright, expect

from app.settings import Settings
from feedback_store import Store
from serving.model import BaseModel
from tests.fakes import make_service, until

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


@pytest.fixture
async def page(base: BaseModel, store: Store, tmp_path: Path) -> AsyncIterator[Page]:
    from app.web.app import create_web

    service, engine = make_service(base, store, documents=tmp_path)
    engine.delay = 0.03
    listening = socket.create_server(("127.0.0.1", 0))
    port = listening.getsockname()[1]
    app = create_web(service, Settings(home=tmp_path, web_port=port))
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
