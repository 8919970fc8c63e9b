"""Traces: which spans a request leaves and what they tell, read in memory and from a collector of the test's own."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import aclosing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from app.api.app import create_app
from app.logs import JsonLines, access
from app.service import Question
from app.settings import Settings, SettingsError, load
from app.tracing import Tracing, TracingUnavailable, Untraced, open_tracing, tracing_to
from feedback_store import Store
from serving.engines.base import GenerateRequest, Sampling, TokenChunk, trace_headers
from serving.model import BaseModel
from tests.fakes import ScriptedEngine, make_service, until

SUM = {"model": "whetstone", "messages": [{"role": "user", "content": "What is 6 * 7?"}]}
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
CLIENTS = {"traceparent": f"00-{TRACE}-{PARENT}-01", "X-Request-Id": "order-42"}


class World:
    """The endpoint with traces that go to `exporter`, or where `tracing` sends them."""

    def __init__(
        self, base: BaseModel, store: Store, home: Path, content: bool, tracing: Tracing | None = None
    ) -> None:
        self.exporter = InMemorySpanExporter()
        settings = Settings(home=home, otlp_content=content)
        self.store = store
        self.tracing = tracing or tracing_to(SimpleSpanProcessor(self.exporter), settings)
        self.service, self.engine = make_service(base, store, tracing=self.tracing)
        self.app = create_app(self.service, settings)

    def client(self) -> httpx.AsyncClient:
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        return httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000")

    async def chat(self, body: dict[str, Any], **headers: str) -> httpx.Response:
        async with self.client() as client:
            return await client.post("/v1/chat/completions", json=body, headers=headers)

    def spans(self) -> list[ReadableSpan]:
        """In the order in which they began."""
        return sorted(self.exporter.get_finished_spans(), key=lambda span: span.start_time or 0)


@pytest.fixture
def world(base: BaseModel, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[World]:
    with Store.open(tmp_path / "store.db") as store:
        yield World(base, store, tmp_path, content=getattr(request, "param", False))


def told(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_a_request_an_answer_its_generations_and_its_tools(world: World, stream: bool) -> None:
    response = await world.chat({**SUM, "stream": stream, "seed": 5, "stop": ["\n\n\n"]}, **CLIENTS)
    assert response.status_code == 200
    turn = world.store.turn(world.store.turns()[0].id)
    assert turn.request_id == "order-42"
    server, agent, first, tool, second = world.spans()
    assert [span.name for span in (server, agent, first, tool, second)] == [
        "POST /v1/chat/completions", "invoke_agent whetstone", "chat whetstone", "execute_tool code", "chat whetstone",
    ]  # fmt: skip
    assert {format(span.context.trace_id, "032x") for span in world.spans()} == {TRACE}, "the client's trace goes on"
    assert server.parent is not None
    assert format(server.parent.span_id, "016x") == PARENT
    assert server.kind == SpanKind.SERVER
    parents = [span.parent.span_id for span in (agent, first, tool, second) if span.parent]
    assert parents == [server.context.span_id] + [agent.context.span_id] * 3
    assert first.end_time is not None
    assert tool.start_time is not None
    assert tool.end_time is not None
    assert second.start_time is not None
    assert first.end_time <= tool.start_time <= tool.end_time <= second.start_time

    seen = told(server)
    assert (seen["http.request.method"], seen["http.route"], seen["http.response.status_code"]) == (
        "POST", "/v1/chat/completions", 200,
    )  # fmt: skip
    assert seen["whetstone.request_id"] == told(agent)["whetstone.request_id"] == "order-42"
    of_agent = told(agent)
    assert of_agent["gen_ai.operation.name"] == "invoke_agent"
    assert of_agent["gen_ai.provider.name"] == "whetstone"
    assert of_agent["gen_ai.request.model"] == "whetstone"
    assert of_agent["gen_ai.request.seed"] == 5
    assert of_agent["gen_ai.request.stop_sequences"] == ("\n\n\n",)
    assert of_agent["gen_ai.response.model"] == "v0"
    assert of_agent["gen_ai.response.id"] == of_agent["whetstone.turn_id"] == turn.id
    assert of_agent["gen_ai.conversation.id"] == turn.conversation_id
    assert of_agent["gen_ai.response.finish_reasons"] == ("stop",)
    assert of_agent["gen_ai.usage.input_tokens"] == len(turn.prompt_ids)
    assert of_agent["gen_ai.usage.output_tokens"] == sum(sum(step.mask) for step in turn.steps)
    for span, step, read, finish in (
        (first, turn.steps[0], len(turn.prompt_ids), "tool_calls"),
        (second, turn.steps[1], len(turn.prompt_ids) + len(turn.steps[0].token_ids), "stop"),
    ):
        assert told(span)["gen_ai.operation.name"] == "chat"
        assert told(span)["gen_ai.usage.input_tokens"] == read
        assert told(span)["gen_ai.usage.output_tokens"] == sum(step.mask)
        assert told(span)["gen_ai.response.finish_reasons"] == (finish,)
        assert told(span)["gen_ai.conversation.id"] == turn.conversation_id
    of_tool = told(tool)
    assert of_tool["gen_ai.operation.name"] == "execute_tool"
    assert of_tool["gen_ai.tool.name"] == "code"
    assert of_tool["gen_ai.tool.call.id"] == f"{turn.id}.1"
    everything = json.dumps([told(span) for span in world.spans()])
    assert "6 * 7" not in everything, "what was said stays out"
    assert "42." not in everything


@pytest.mark.parametrize("world", [True], indirect=True)
async def test_by_a_second_option_what_was_said_is_recorded(world: World) -> None:
    await world.chat(SUM)
    _, agent, _, tool, _ = map(told, world.spans())
    assert json.loads(agent["gen_ai.input.messages"]) == [
        {"role": "user", "parts": [{"type": "text", "content": "What is 6 * 7?"}]}
    ]
    assert json.loads(agent["gen_ai.output.messages"]) == [
        {"role": "assistant", "parts": [{"type": "text", "content": "The result is 42."}], "finish_reason": "stop"}
    ]
    assert (tool["gen_ai.tool.call.arguments"], tool["gen_ai.tool.call.result"]) == ("print(6 * 7)", "42")


async def test_an_error_is_on_every_span_that_it_ended(world: World) -> None:
    world.engine.dies_after = 2
    assert (await world.chat(SUM)).status_code == 503
    server, agent, generation = world.spans()
    assert all(span.status.status_code == StatusCode.ERROR for span in (server, agent, generation))
    assert told(server)["error.type"] == "503"
    assert told(agent)["error.type"] == told(generation)["error.type"] == "EngineError"
    world.exporter.clear()
    assert (await world.chat({**SUM, "model": "v9"})).status_code == 404
    server, agent = world.spans()
    assert told(agent)["error.type"] == "UnknownVersion"
    assert server.status.status_code == StatusCode.UNSET, "a client's mistake is no error of the server's"


async def test_answers_side_by_side_and_one_that_is_left(world: World) -> None:
    await world.chat({**SUM, "n": 3})
    agents = [span for span in world.spans() if span.name.startswith("invoke_agent")]
    assert len({told(agent)["whetstone.turn_id"] for agent in agents}) == 3
    for agent in agents:
        inside = [span for span in world.spans() if span.parent and span.parent.span_id == agent.context.span_id]
        assert [span.name.split()[0] for span in inside] == ["chat", "execute_tool", "chat"]
    world.exporter.clear()
    world.engine.chunks = 0
    question = Question("me", [{"role": "user", "content": "slow, please"}], Sampling())
    async with aclosing(world.service.answer(question)) as events:
        async for _ in events:
            if world.engine.chunks > 5:
                break
    agent, generation = world.spans()
    assert agent.parent is None, "the chat has no request of the endpoint's"
    assert agent.status.status_code == generation.status.status_code == StatusCode.UNSET
    assert "gen_ai.response.finish_reasons" not in told(agent)


async def test_an_engine_is_handed_the_context_of_the_generation_that_asks_it(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    handed: list[str] = []
    generate = ScriptedEngine.generate

    def noting(engine: ScriptedEngine, request: GenerateRequest) -> Any:
        async def chunks() -> Any:
            handed.append((trace_headers.get() or {})["traceparent"])
            chunk: TokenChunk
            async for chunk in generate(engine, request):
                yield chunk

        return chunks()

    monkeypatch.setattr(ScriptedEngine, "generate", noting)
    await world.chat(SUM)
    chats = [span.context for span in world.spans() if span.name.startswith("chat")]
    asked = [line.rsplit("-", 1)[0] for line in handed]  # what follows are flags
    assert asked == [f"00-{c.trace_id:032x}-{c.span_id:016x}" for c in chats]


async def test_log_lines_carry_the_trace(world: World, caplog: pytest.LogCaptureFixture) -> None:
    lines: list[dict[str, Any]] = []

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(json.loads(JsonLines().format(record)))

    handler = Kept()
    access.addHandler(handler)
    caplog.set_level(logging.INFO, access.name)
    try:
        await world.chat(SUM, **CLIENTS)
    finally:
        access.removeHandler(handler)
    (line,) = lines
    server = world.spans()[0]
    assert (line["trace_id"], line["span_id"]) == (TRACE, format(server.context.span_id, "016x"))


@contextmanager
def collector() -> Iterator[tuple[str, list[ExportTraceServiceRequest]]]:
    """An OTLP receiver over HTTP: its address, and what it was sent."""
    got: list[ExportTraceServiceRequest] = []

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/traces"
            assert self.headers["Content-Type"] == "application/x-protobuf"
            got.append(ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", got
    finally:
        server.shutdown()
        server.server_close()


async def test_spans_reach_a_collector(base: BaseModel, tmp_path: Path) -> None:
    with collector() as (url, got), Store.open(tmp_path / "store.db") as store:
        tracing = open_tracing(Settings(home=tmp_path, otlp_endpoint=f"{url}/"))
        assert isinstance(tracing, Tracing)
        await World(base, store, tmp_path, False, tracing).chat(SUM, **CLIENTS)
        await asyncio.to_thread(tracing.close)
    (resource,) = [spans for request in got for spans in request.resource_spans]
    about = {pair.key: pair.value.string_value for pair in resource.resource.attributes}
    assert about["service.name"] == "whetstone"
    assert about["service.version"]
    spans = [span for scope in resource.scope_spans for span in scope.spans]
    assert sorted(span.name.split()[0] for span in spans) == ["POST", "chat", "chat", "execute_tool", "invoke_agent"]
    assert {span.trace_id.hex() for span in spans} == {TRACE}
    agent = next(span for span in spans if span.name.startswith("invoke_agent"))
    values = {pair.key: pair.value for pair in agent.attributes}
    assert values["gen_ai.response.model"].string_value == "v0"
    assert values["gen_ai.usage.output_tokens"].int_value > 0


@pytest.mark.parametrize("answers", [True, False], ids=["hangs", "is gone"])
async def test_a_collector_that_is_slow_or_gone_costs_no_answer(base: BaseModel, tmp_path: Path, answers: bool) -> None:
    """One port takes connections and says nothing, the other takes none; spans go there after ten milliseconds."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    listening = socket.create_server(("127.0.0.1", 0))
    address = f"http://127.0.0.1:{listening.getsockname()[1]}/v1/traces"
    if not answers:
        listening.close()
    exporter = OTLPSpanExporter(endpoint=address, timeout=1)
    tried = threading.Event()
    export = exporter.export

    def noting(spans: Any) -> Any:
        tried.set()
        return export(spans)

    exporter.export = noting  # type: ignore[method-assign]
    processor = BatchSpanProcessor(exporter, max_queue_size=8, max_export_batch_size=4, schedule_delay_millis=10)
    tracing = tracing_to(processor, Settings(home=tmp_path))
    with Store.open(tmp_path / "store.db") as store:
        world = World(base, store, tmp_path, False, tracing)
        await world.chat(SUM)
        await until(tried.is_set)
        for _ in range(4):  # more spans than the queue holds, while the exporter is at it
            assert (await world.chat(SUM)).status_code == 200
        assert store.stats()["turns"] == {"done": 5}
    began = time.monotonic()
    await asyncio.to_thread(tracing.close)
    assert time.monotonic() - began < 20, "nor does it hold up the end"
    listening.close()


def test_settings_and_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(open_tracing(Settings(home=tmp_path)), Untraced)
    with pytest.raises(SettingsError, match="otlp_endpoint is 'collector:4318'"):
        load(otlp_endpoint="collector:4318")
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace.export", None)
    with pytest.raises(TracingUnavailable, match=r"whetstone\[otel\]"):
        open_tracing(Settings(home=tmp_path, otlp_endpoint="http://127.0.0.1:4318"))
