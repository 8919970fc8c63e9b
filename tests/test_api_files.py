"""Files over the endpoint: upload, ask, fetch what came of it; nobody else's, nothing that runs, nothing too large."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from app.api.app import create_app
from app.settings import Settings
from feedback_store import Store
from serving.model import BaseModel
from tests.artist import Artist, figure
from tests.fakes import make_service
from tools.python import PythonTool
from tools.workspace import Workspaces

SUM = {"model": "whetstone", "messages": [{"role": "user", "content": "What is 6 * 7?"}]}
KEYS = ["key-one", "key-two"]


@dataclass
class World:
    client: httpx.AsyncClient
    workspaces: Workspaces
    store: Store
    conversation: str

    @property
    def files(self) -> str:
        return f"/v1/conversations/{self.conversation}/files"

    async def upload(self, *files: tuple[str, bytes], to: str | None = None) -> httpx.Response:
        return await self.client.post(to or self.files, files=[("files", file) for file in files])


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "store.db") as opened:
        yield opened


@pytest.fixture
async def world(base: BaseModel, store: Store, tmp_path: Path) -> AsyncIterator[World]:
    """Two keys: `client` has the first. A conversation may have 1 MB and five files."""
    workspaces = Workspaces(tmp_path / "files", 1 << 20, max_files=5)
    service, _ = make_service(base, store, workspaces=workspaces, code=Artist(workspaces=workspaces))
    settings = Settings(home=tmp_path, api_keys=KEYS, files_mb=1, max_body_bytes=50_000)  # type: ignore[arg-type]
    transport = httpx.ASGITransport(create_app(service, settings), raise_app_exceptions=False)
    headers = {"Authorization": f"Bearer {KEYS[0]}"}
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000", headers=headers) as client:
        made = await client.post("/v1/conversations")
        yield World(client, workspaces, store, made.json()["id"])


def error_of(response: httpx.Response) -> dict[str, Any]:
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


async def test_files_are_uploaded_listed_fetched_and_deleted(world: World) -> None:
    kept = await world.upload(("sales.csv", b"20\n22\n"), ("Größe (1).txt", b""))
    assert kept.status_code == 200
    assert [file["name"] for file in kept.json()["data"]] == ["sales.csv", "Größe (1).txt"]
    listed = (await world.client.get(world.files)).json()["data"]
    assert [(file["name"], file["bytes"], file["media_type"]) for file in listed] == [
        ("Größe (1).txt", 0, "text/plain"),
        ("sales.csv", 6, "text/csv"),
    ]
    for file in listed:
        fetched = await world.client.get(file["path"])
        assert fetched.status_code == 200
        assert len(fetched.content) == file["bytes"] == int(fetched.headers["content-length"])
    gone = await world.client.delete(f"{world.files}/sales.csv")
    assert gone.json() == {"name": "sales.csv", "object": "whetstone.file", "deleted": True}
    again = await world.client.get(f"{world.files}/sales.csv")
    assert (again.status_code, error_of(again)["code"]) == (404, "file_not_found")


async def test_by_the_official_client_an_answer_brings_figures_files_and_sources(world: World) -> None:
    client = openai.AsyncOpenAI(base_url="http://127.0.0.1:8000/v1", api_key=KEYS[0], http_client=world.client)
    conversation = await client.conversations.create()
    await world.upload(("sales.csv", b"20\n22\n"), to=f"/v1/conversations/{conversation.id}/files")
    answer = await client.chat.completions.create(**SUM, metadata={"conversation_id": conversation.id})  # type: ignore[call-overload]
    told = answer.model_extra["whetstone"]
    assert answer.choices[0].message.content == "The result is 42."
    assert [file["name"] for file in told["files"]] == ["total.txt", "<img src=x onerror=alert(1)>.html"]
    assert (await world.client.get(told["files"][0]["path"])).text == "42"
    drawn = await world.client.get(told["images"][0]["path"])
    assert drawn.headers["content-type"] == "image/png"
    assert drawn.content == figure()
    assert [(source["number"], source["url"]) for source in told["sources"]] == [
        (1, "https://example.org/sales_%28a%29"),
        (2, ""),
    ]
    (cited,) = answer.choices[0].message.annotations
    assert cited.url_citation.url == "https://example.org/sales_%28a%29"
    assert cited.url_citation.start_index == cited.url_citation.end_index == len("The result is 42.")


async def test_a_stream_ends_with_the_same(world: World) -> None:
    response = await world.client.post("/v1/chat/completions", json={**SUM, "stream": True})
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
    last = json.loads(lines[-2])
    assert [source["title"] for source in last["whetstone"]["sources"]][1] == "Prices"
    assert last["whetstone"]["images"][0]["path"].startswith("/v1/conversations/conv_")
    (cited,) = last["choices"][0]["delta"]["annotations"]
    assert cited["url_citation"]["url"] == "https://example.org/sales_%28a%29"


async def test_a_response_cites_whole_streamed_and_when_it_is_read_back(world: World) -> None:
    client = openai.AsyncOpenAI(base_url="http://127.0.0.1:8000/v1", api_key=KEYS[0], http_client=world.client)
    asked: Any = {"model": "whetstone", "input": "What is 6 * 7?"}
    whole = await client.responses.create(**asked)
    events = [event async for event in await client.responses.create(**asked, stream=True)]
    kept = await client.responses.retrieve(whole.id)
    added = [event.annotation for event in events if event.type == "response.output_text.annotation.added"]
    for output in (whole.output, events[-1].response.output, kept.output):
        (cited,) = output[0].content[0].annotations
        assert (cited.type, cited.url) == ("url_citation", "https://example.org/sales_%28a%29")
        assert cited.start_index == cited.end_index == len(output[0].content[0].text)
        assert [cited.model_dump()] == [one.model_dump() for one in added]


async def test_a_question_with_files_is_judged_but_makes_no_task(world: World) -> None:
    """Training would ask it without the files. What the answer itself wrote is no reason."""
    asked = {**SUM, "metadata": {"conversation_id": world.conversation, "verifier": "numeric", "gold": "42"}}
    first = (await world.client.post("/v1/chat/completions", json=asked)).json()["whetstone"]
    assert [file["name"] for file in first["files"]]
    assert first["outcome"]["task_id"] is not None
    await world.upload(("sales.csv", b"20\n22\n"))
    second = (await world.client.post("/v1/chat/completions", json=asked)).json()["whetstone"]
    assert second["outcome"]["score"] == 1.0
    assert second["outcome"]["task_id"] is None
    assert "came with files" in second["outcome"]["note"]
    taught = {"turn_id": second["turn_id"], "verifier": "numeric", "gold": "43"}
    assert (await world.client.post("/v1/feedback", json=taught)).json()["task_id"] is None


async def test_an_answer_without_tools_has_no_sources_and_no_files(world: World) -> None:
    hello = {"model": "whetstone", "messages": [{"role": "user", "content": "hello"}]}
    body = (await world.client.post("/v1/chat/completions", json=hello)).json()
    assert body["choices"][0]["message"]["annotations"] == []
    assert [body["whetstone"][part] for part in ("sources", "files", "images")] == [[], [], []]


async def test_another_owners_conversation_is_not_there(world: World) -> None:
    await world.upload(("mine.txt", b"mine"))
    image = world.workspaces.write_image(world.conversation, figure())
    theirs = {"Authorization": f"Bearer {KEYS[1]}"}
    for method, path in [
        ("GET", world.files),
        ("GET", f"{world.files}/mine.txt"),
        ("DELETE", f"{world.files}/mine.txt"),
        ("GET", f"/v1/conversations/{world.conversation}/images/{image}"),
        ("POST", world.files),
    ]:
        asked = await world.client.request(method, path, headers=theirs)
        absent = await world.client.request(method, path.replace(world.conversation, "conv_none"), headers=theirs)
        assert asked.status_code == absent.status_code == 404
        assert asked.text.replace(world.conversation, "conv_none") == absent.text
    no_key = await world.client.get(world.files, headers={"Authorization": ""})
    assert no_key.status_code == 401
    assert world.workspaces.read(world.conversation, "mine.txt") == b"mine"


@pytest.mark.parametrize(
    "name", ["evil.svg", "evil.html", "evil.xhtml", "evil.xml", "evil.js", "evil.pdf", "evil", "evil.svgz", 'a".html']
)
async def test_what_a_browser_would_run_comes_as_bytes_to_be_saved(world: World, name: str) -> None:
    world.workspaces.write(world.conversation, name, b"<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>")
    listed = (await world.client.get(world.files)).json()["data"]
    fetched = await world.client.get(listed[0]["path"])
    assert fetched.headers["content-type"] == "application/octet-stream"
    assert fetched.headers["content-disposition"].startswith("attachment; filename=")
    assert fetched.headers["x-content-type-options"] == "nosniff"
    assert "sandbox" in fetched.headers["content-security-policy"]


async def test_a_name_from_anywhere_stays_within_its_header(world: World) -> None:
    world.workspaces.write(world.conversation, 'ä"; filename=x %41 漢.csv', b"1")
    fetched = await world.client.get((await world.client.get(world.files)).json()["data"][0]["path"])
    disposition = fetched.headers["content-disposition"]
    assert disposition.count('"') == 2
    assert "filename*=UTF-8''%C3%A4%22%3B%20filename%3Dx%20%2541%20%E6%BC%A2.csv" in disposition


@pytest.mark.parametrize("name", ["../up.txt", "..", ".hidden", "a\\b", "/etc/passwd", " ", "x" * 200])
async def test_a_bad_name_is_refused_and_nothing_kept(world: World, name: str) -> None:
    refused = await world.upload(("good.txt", b"1"), (name, b"2"))
    assert (refused.status_code, error_of(refused)["code"]) == (400, "invalid_name")
    assert (await world.client.get(world.files)).json()["data"] == []
    assert [path for path in world.workspaces.root.rglob("*") if path.is_file()] == []


async def test_letters_in_parts_are_composed(world: World) -> None:
    kept = await world.upload(("cafe\u0301.txt", b"1"))
    assert kept.json()["data"][0]["name"] == "caf\u00e9.txt"


async def test_too_much_is_refused_with_the_setting(world: World) -> None:
    many = await world.upload(*[(f"{number}.txt", b"") for number in range(200)])
    assert (many.status_code, error_of(many)["code"]) == (413, "workspace_full")
    assert "200 files, and may have 5" in error_of(many)["message"]
    large = await world.upload(("a", b"x" * 600_000), ("b", b"x" * 600_000))
    assert large.status_code == 413
    assert "WHETSTONE_FILES_MB" in error_of(large)["message"]
    larger = await world.upload(("a", b"x" * 2_200_000))
    assert larger.status_code == 413
    assert "WHETSTONE_FILES_MB" in error_of(larger)["message"]
    assert (await world.client.get(world.files)).json()["data"] == []
    fits = await world.upload(("a", b"x" * 900_000))
    assert fits.status_code == 200, "over max_body_bytes, which isn't for uploads"


async def test_a_flood_without_a_length_is_cut_off(world: World) -> None:
    async def flood() -> AsyncIterator[bytes]:
        yield b'--b\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\n'
        for _ in range(40):
            yield b"x" * 100_000

    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    refused = await world.client.post(world.files, content=flood(), headers=headers)
    assert refused.status_code == 413
    assert "WHETSTONE_FILES_MB" in error_of(refused)["message"]


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"{}", "application/json"),
        (b"", "multipart/form-data; boundary=b"),
        (b"nonsense", "multipart/form-data; boundary=b"),
        (b"x", "multipart/form-data"),
        (
            b'--b\r\nContent-Disposition: form-data; name="files"\r\n\r\ntext\r\n--b--\r\n',
            "multipart/form-data; boundary=b",
        ),
    ],
)
async def test_a_body_that_is_no_form_with_files_is_told(world: World, content: bytes, kind: str) -> None:
    refused = await world.client.post(world.files, content=content, headers={"Content-Type": kind})
    assert refused.status_code == 400
    assert error_of(refused)["message"]


@pytest.mark.parametrize("id_", ["a/b", "a%2Fb", "..%2f..", "%2e%2e%2ffiles", "conv_none", "%00", "x" * 300])
async def test_an_id_that_is_none_is_not_found(world: World, id_: str) -> None:
    url = httpx.URL("http://127.0.0.1:8000").copy_with(raw_path=f"/v1/conversations/{id_}/files".encode())
    for method in ("GET", "POST"):
        answered = await world.client.request(method, url)
        assert answered.status_code in (404, 405)
        error_of(answered)


@pytest.mark.parametrize("name", ["..%2fsecret", "%2e%2e%2f%2e%2e%2fstore.db", "a%00b", ".hidden"])
async def test_a_path_in_place_of_a_name_leads_nowhere(world: World, name: str) -> None:
    for kind in ("files", "images"):
        path = f"/v1/conversations/{world.conversation}/{kind}/{name}"
        url = httpx.URL("http://127.0.0.1:8000").copy_with(raw_path=path.encode())
        answered = await world.client.get(url)
        assert answered.status_code in (400, 404)
        error_of(answered)


async def test_an_empty_conversation_takes_no_items_that_would_be_lost(world: World) -> None:
    for body in ({"items": [{"role": "user"}]}, {"metadata": {"topic": "x"}}, {"title": "x"}):
        assert (await world.client.post("/v1/conversations", json=body)).status_code == 400
    for body in ({}, {"items": [], "metadata": {}}):
        assert (await world.client.post("/v1/conversations", json=body)).json()["object"] == "conversation"


async def test_without_files_the_server_says_so(base: BaseModel, store: Store, tmp_path: Path) -> None:
    service, _ = make_service(base, store)
    transport = httpx.ASGITransport(create_app(service, Settings(home=tmp_path)), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
        made = (await client.post("/v1/conversations")).json()["id"]
        answered = await client.get(f"/v1/conversations/{made}/files")
    assert (answered.status_code, error_of(answered)["code"]) == (503, "files_unavailable")


async def test_a_disk_that_fails_is_told(world: World) -> None:
    world.workspaces.root.write_text("in the way")
    refused = await world.upload(("a.txt", b"1"))
    assert (refused.status_code, error_of(refused)["code"]) == (503, "files_unavailable")


async def test_a_program_in_the_sandbox_reads_draws_and_writes(base: BaseModel, store: Store, tmp_path: Path) -> None:
    program = (
        "import pandas as pd\nimport matplotlib.pyplot as plt\n"
        "sales = pd.read_csv('sales.csv')\nsales.plot(x='month', y='sold')\nplt.show()\n"
        "sales.tail(1).to_csv('last.csv', index=False)\nprint(sales.sold.sum())"
    )
    workspaces = Workspaces(tmp_path / "files")
    service, engine = make_service(base, store, workspaces=workspaces, code=PythonTool(workspaces=workspaces))
    asked = engine.script
    engine.script = lambda text: asked(text).replace("print(6 * 7)", program)
    transport = httpx.ASGITransport(create_app(service, Settings(home=tmp_path)), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", timeout=120) as client:
        id_ = (await client.post("/v1/conversations")).json()["id"]
        sales = {"files": ("sales.csv", b"month,sold\n1,20\n2,22\n")}
        assert (await client.post(f"/v1/conversations/{id_}/files", files=sales)).status_code == 200
        told = (await client.post("/v1/chat/completions", json={**SUM, "metadata": {"conversation_id": id_}})).json()
        assert told["choices"][0]["message"]["content"].startswith("The result is 42")
        (written,), (drawn,) = told["whetstone"]["files"], told["whetstone"]["images"]
        assert written["name"] == "last.csv", "what it only read isn't among what it wrote"
        assert (await client.get(written["path"])).text == "month,sold\n2,22\n"
        assert (await client.get(drawn["path"])).content.startswith(b"\x89PNG")
