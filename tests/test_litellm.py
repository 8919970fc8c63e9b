"""litellm against the endpoint, from an environment of its own: `make test-litellm` makes it (about 400 MB)."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path

import pytest

from tests import test_api_client
from tests.fakes import calculator
from tests.test_api_client import Served
from tests.test_openai_clients import forecaster

PYTHON = os.environ.get("WHETSTONE_LITELLM_PYTHON", "")
pytestmark = pytest.mark.skipif(not PYTHON, reason="WHETSTONE_LITELLM_PYTHON names no interpreter with litellm")
served = test_api_client.served


async def test_chat_streams_tools_and_responses_by_litellm(served: Served) -> None:
    served.engine.script = lambda context: (calculator if "6 * 7" in context else forecaster)(context)
    client = Path(__file__).with_name("litellm_client.py")
    process = await asyncio.create_subprocess_exec(
        PYTHON, str(client), served.url, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, err = await process.communicate()
    assert process.returncode == 0, err.decode()[-2000:]
    told = json.loads(out.splitlines()[-1])
    assert told["whole"] == told["streamed"] == told["response"] == "The result is 42."
    assert told["model"] == "v0"
    assert told["call"] == ["weather", {"city": "Rome"}]
    assert (told["told"], told["streamed_call"]) == ("It is 21 degrees.", {"city": "Rome"})
    assert told["on"] == "completed"
    assert len(served.store.turns()[1].messages) == 3, "by previous_response_id"
    official = [kind for kind in told["events"] if not kind.startswith("whetstone.")]
    assert (official[0], official[-1]) == ("response.created", "response.completed")
    assert "logit_bias" in told["refused"]
    assert told["asked_for"] == ["127.0.0.1"], "it called nobody else"
