"""docs/endpoint.md says what the endpoint takes and refuses: each line of its tables is tried."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import test_api
from tests.test_api import World

store, settings, world = test_api.store, test_api.settings, test_api.world

_ROW = re.compile(r"\| `(\w+)` \| `(.+?)` \| (honoured|let pass|refused)")
_LEAST: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hello"}]},
    "/v1/responses": {"input": "hello"},
}


def rows() -> Iterator[tuple[str, str, Any, str]]:
    text = (Path(__file__).parents[1] / "docs" / "endpoint.md").read_text()
    for section in text.split("\n## ")[1:]:
        route = section.partition("\n")[0].removeprefix("POST ")
        for name, example, said in _ROW.findall(section):
            yield route, name, json.loads(example), said


def test_the_tables_are_there() -> None:
    found = [(route, said) for route, _, _, said in rows()]
    for route in _LEAST:
        assert found.count((route, "honoured")) > 8
        assert found.count((route, "refused")) > 4


@pytest.mark.parametrize("route", _LEAST)
async def test_each_parameter_is_taken_or_refused_as_it_says(world: World, route: str) -> None:
    world.engine.script = lambda context: "{}" if context.endswith("<answer>") else "<answer>Hello!</answer>"
    for at, name, example, said in rows():
        if at != route:
            continue
        body = {"model": "whetstone", **_LEAST[route], name: example}
        answered = await world.client.post(route, json=body)
        if said == "refused":
            assert (answered.status_code, answered.json()["error"]["param"]) == (400, name), answered.text
            assert answered.json()["error"]["code"] == "unsupported_parameter"
        else:
            assert answered.status_code == 200, (name, answered.text)
