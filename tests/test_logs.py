"""A request's id, from the client's header to the record, the answer and the log."""

from __future__ import annotations

import io
import json
import logging
from pathlib import Path

import httpx
import pytest

from app.api.app import create_app
from app.logs import JsonLines, access
from app.settings import Settings
from feedback_store import Store
from serving.model import BaseModel
from tests.fakes import make_service

HELLO = {"model": "whetstone", "messages": [{"role": "user", "content": "hello"}]}


async def test_a_request_keeps_its_id_everywhere(
    base: BaseModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    written = io.StringIO()
    handler = logging.StreamHandler(written)
    handler.setFormatter(JsonLines())
    access.addHandler(handler)
    caplog.set_level(logging.INFO, access.name)
    try:
        with Store.open(tmp_path / "store.db") as store:
            service, engine = make_service(base, store)
            transport = httpx.ASGITransport(create_app(service, Settings(home=tmp_path)), raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as client:
                mine = {"X-Request-Id": "order-42"}
                answer = await client.post("/v1/chat/completions", json=HELLO, headers=mine)
                assert answer.headers["x-request-id"] == "order-42"
                assert store.turn(answer.json()["whetstone"]["turn_id"]).request_id == "order-42"
                forged = await client.get("/v1/none%0A{x}", headers={"X-Request-Id": 'a" \\u007b b'})
                assert forged.status_code == 404
                assert len(forged.headers["x-request-id"]) == 32, "what isn't plain is replaced"
                engine.dead = True
                assert (await client.post("/v1/chat/completions", json=HELLO)).headers["x-request-id"]
    finally:
        access.removeHandler(handler)
    first, second, third = [json.loads(line) for line in written.getvalue().splitlines()]
    assert (first["request_id"], first["status"], first["owner"]) == ("order-42", 200, "local")
    assert (second["status"], second["path"]) == (404, "/v1/none\n{x}")
    assert third["status"] == 503
    assert "hello" not in written.getvalue()
