"""Requests made from the endpoint's own description, sound and unsound: none of them is an error of the server's."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode

from app.api.app import create_app
from app.settings import Settings
from feedback_store import Store
from serving.model import BaseModel
from tests.fakes import make_service
from tools.workspace import Workspaces

LOOPBACK = {"Host": "127.0.0.1:8000"}  # the only one that is served without keys
SEARCH = settings(
    max_examples=4,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture
def described(base: BaseModel, tmp_path: Path) -> Iterator[Any]:
    with Store.open(tmp_path / "store.db") as store:
        service, engine = make_service(base, store, workspaces=Workspaces(tmp_path / "files", 1 << 20))
        engine.script = lambda _: "<think>A greeting.</think><answer>Hello!</answer>"
        app = create_app(service, Settings(home=tmp_path))
        yield schemathesis.openapi.from_asgi("/openapi.json", app, headers=LOOPBACK)


def test_no_request_is_an_error_of_the_servers(described: Any) -> None:
    seen = set()
    for operation in (result.ok() for result in described.get_all_operations()):
        for mode in GenerationMode:

            @SEARCH
            @given(case=operation.as_strategy(generation_mode=mode))
            def check(case: Any) -> None:
                if isinstance(case.body, dict) and case.body.get("messages"):  # get past the first checks
                    case.body |= {"model": "whetstone", "messages": [{"role": "user", "content": "hello"}]}
                if isinstance(case.body, dict) and case.body.get("input"):
                    case.body |= {"model": "whetstone", "input": "hello"}
                response = case.call(headers=LOOPBACK)
                assert response.status_code < 500, (response.text, case.as_curl_command())
                seen.add(case.operation.label)

            with contextlib.suppress(Unsatisfiable):  # a route without parameters has no unsound requests
                check()
    assert {"POST /v1/chat/completions", "POST /v1/responses", "POST /v1/feedback", "GET /v1/models"} <= seen
    assert {f"{method} /v1/responses/{{response_id}}" for method in ("GET", "DELETE")} <= seen
