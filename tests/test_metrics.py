"""What Prometheus reads after some answers, and that the dashboard asks for nothing else."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from app.api.app import create_app
from app.metrics import Metrics
from app.settings import Settings
from feedback_store import Store
from serving.model import BaseModel
from serving.trajectory import Observation, ToolResult
from tests.fakes import ScriptedEngine, make_service

ROOT = Path(__file__).parents[1]
SUM = {"model": "whetstone", "messages": [{"role": "user", "content": "What is 6 * 7?"}]}
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


@pytest.fixture
async def served(base: BaseModel, tmp_path: Path) -> AsyncIterator[tuple[httpx.AsyncClient, ScriptedEngine]]:
    with Store.open(tmp_path / "store.db") as store:
        service, engine = make_service(base, store)
        transport = httpx.ASGITransport(create_app(service, Settings(home=tmp_path)), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as client:
            yield client, engine


async def scraped(client: httpx.AsyncClient) -> Samples:
    response = await client.get("/metrics")
    assert response.status_code == 200
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples[f"whetstone_{name}", frozenset(labels.items())]


async def test_answers_tools_and_tokens_are_counted(served: tuple[httpx.AsyncClient, ScriptedEngine]) -> None:
    client, engine = served
    usage = (await client.post("/v1/chat/completions", json=SUM)).json()["usage"]
    taught = SUM | {"stream": True, "metadata": {"verifier": "numeric", "gold": "42"}}
    await client.post("/v1/chat/completions", json=taught)
    engine.dies_after = 2
    await client.post("/v1/chat/completions", json=SUM)
    assert (await client.get("/v1/made-up")).status_code == 404
    samples = await scraped(client)
    assert value(samples, "answers_total", version="v0", stop_reason="answer") == 2
    assert value(samples, "answers_total", version="v0", stop_reason="error") == 1
    assert value(samples, "prompt_tokens_total", version="v0") == 3 * usage["prompt_tokens"]
    assert value(samples, "generation_tokens_total", version="v0") == 2 * usage["completion_tokens"]
    assert value(samples, "tool_calls_total", tool="code") == 2
    assert value(samples, "time_to_first_token_seconds_count", version="v0") >= 2
    assert value(samples, "inter_token_latency_seconds_count", version="v0") > 2
    assert value(samples, "e2e_request_latency_seconds_count", version="v0") == 3
    assert value(samples, "queue_tasks", state="pending") == 1
    assert value(samples, "num_requests_running") == 0
    assert value(samples, "version_in_service", version="v0") == 1
    assert value(samples, "engine_up") == 1
    assert value(samples, "http_requests_total", method="POST", route="/v1/chat/completions", status="503") == 1
    assert not [labels for _, labels in samples if any("made-up" in text for _, text in labels)]
    engine.dead = True
    assert value(await scraped(client), "engine_up") == 0


def test_a_tool_that_a_policy_made_up_makes_no_series() -> None:
    metrics = Metrics()
    with metrics.answer(["code"]) as watch:
        watch.started("v0", 1)
        watch.see(ToolResult(Observation("rm -rf", "no such tool", error=True)))
    assert metrics.registry.get_sample_value("whetstone_tool_errors_total", {"tool": "unknown"}) == 1
    assert metrics.registry.get_sample_value("whetstone_tool_errors_total", {"tool": "rm -rf"}) is None
    assert (
        metrics.registry.get_sample_value("whetstone_answers_total", {"version": "v0", "stop_reason": "cancelled"}) == 1
    ), "left before its end"


async def test_a_key_for_metrics_reads_them_and_nothing_else(base: BaseModel, tmp_path: Path) -> None:
    with Store.open(tmp_path / "store.db") as store:
        _, secret = store.add_key("prometheus", ["metrics"])
        _, chat = store.add_key("chat", ["chat"])
        service, _ = make_service(base, store)
        transport = httpx.ASGITransport(create_app(service, Settings(home=tmp_path)))
        async with httpx.AsyncClient(transport=transport, base_url="http://any.host") as client:
            for key, path, status in (
                (secret, "/metrics", 200),
                (secret, "/v1/models", 403),
                (chat, "/metrics", 403),
                ("wrong", "/metrics", 401),
            ):
                answer = await client.get(path, headers={"Authorization": f"Bearer {key}"})
                assert answer.status_code == status


def test_the_dashboard_asks_for_metrics_that_exist() -> None:
    dashboard = json.loads((ROOT / "deploy/grafana/whetstone.json").read_text())
    asked = {
        name
        for panel in dashboard["panels"]
        for target in panel["targets"]
        for name in re.findall(r"whetstone_\w+", target["expr"])
    }
    registry: CollectorRegistry = Metrics().registry
    there = set()
    for family in registry.collect():
        suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}.get(family.type, [""])
        there |= {family.name + suffix for suffix in suffixes}
    assert asked <= there
    shown = {re.sub(r"_(total|bucket)$", "", name) for name in asked}
    assert shown == {family.name for family in registry.collect() if family.name.startswith("whetstone_")}


def test_every_metric_that_operators_look_for_is_there() -> None:
    """vLLM's and SGLang's names, behind our prefix."""
    there = {family.name.removeprefix("whetstone_") for family in Metrics().registry.collect()}
    assert {
        "time_to_first_token_seconds", "inter_token_latency_seconds", "e2e_request_latency_seconds", "prompt_tokens",
        "generation_tokens", "num_requests_running", "tool_calls", "tool_errors", "tool_call_seconds", "queue_tasks",
        "http_requests", "answers", "version_in_service", "engine_up",
    } <= there  # fmt: skip


@pytest.mark.skipif(not shutil.which("promtool"), reason="promtool isn't installed (Debian: prometheus)")
def test_prometheus_reads_its_file_and_the_dashboards_queries(tmp_path: Path) -> None:
    dashboard = json.loads((ROOT / "deploy/grafana/whetstone.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    rules = [
        {"record": f"query_{number}", "expr": re.sub(r"\$__\w+", "5m", query).replace("$version", ".*")}
        for number, query in enumerate(queries)
    ]
    file = tmp_path / "rules.yml"
    file.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))  # JSON is YAML
    for command in (["config", str(ROOT / "deploy/prometheus.yml")], ["rules", str(file)]):
        checked = subprocess.run(["promtool", "check", *command], capture_output=True, text=True, check=False)
        assert checked.returncode == 0, checked.stdout + checked.stderr
