"""OpenTelemetry traces of the endpoint and of every answer, by the semantic conventions for generative AI.

Off unless `otlp_endpoint` is set; OpenTelemetry is imported only then. A trace has the request (the client's
`traceparent` is its parent), in it the answer (`invoke_agent`), and in that each generation (`chat`) and each call of
a tool of the server's (`execute_tool`). Spans are made of the agent's own events, so an answer costs a few objects a
step and none a token. They are sent in batches by a thread of their own: a collector that is slow or gone costs spans,
never an answer. What was said stays out of them unless `otlp_content` says otherwise.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.logs import trace_ids
from app.settings import Settings
from serving.engines.base import trace_headers
from serving.trajectory import ClientCall, Done, Event, Step, StepDone, ToolCall, ToolResult, calls_a_tool

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor
    from opentelemetry.trace import Span, Tracer

    from app.service import Question, Started

AGENT = "whetstone"
_FINISH = {"answer": "stop", "no_answer": "stop", "length": "length", "tool_calls": "tool_calls"}
_EXPORT_SECONDS = 5.0  # of one batch, tries again included; what is waiting at the end gets no longer either
_METHODS = frozenset({"GET", "POST", "DELETE", "OPTIONS", "HEAD", "PUT", "PATCH"})


class TracingUnavailable(ValueError):
    """Traces are wanted, and OpenTelemetry isn't installed."""


class AnswerTrace(Protocol):
    """What an answer tells of itself while it is written."""

    def started(self, started: Started) -> None: ...

    def go_on(self) -> None: ...

    def see(self, event: Event) -> None: ...


class Untraced:
    """Of a process that sends no traces."""

    on = False

    @contextmanager
    def answer(self, question: Question) -> Iterator[AnswerTrace]:
        yield self

    def started(self, started: Started) -> None:
        pass

    def go_on(self) -> None:
        pass

    def see(self, event: Event) -> None:
        pass

    def close(self) -> None:
        pass


class Tracing:
    """`tracer`: where spans are begun. `model_name`: what the version in service is asked for by. `content`: record
    messages, arguments and results too. `close`: sends what is left, for a few seconds at most; blocks."""

    on = True

    def __init__(
        self, tracer: Tracer, model_name: str, content: bool = False, close: Callable[[], None] = lambda: None
    ) -> None:
        self.tracer = tracer
        self.model_name = model_name
        self.content = content
        self.close = close

    @contextmanager
    def answer(self, question: Question) -> Iterator[AnswerTrace]:
        """Around one answer, which may be refused, end in an error or be left."""
        trace = _Answer(self, question)
        try:
            yield trace
        except Exception as error:
            trace.failed(error)
            raise
        finally:
            trace.close()

    def middleware(self, app: ASGIApp) -> ASGIApp:
        return _Requests(app, self.tracer)


def open_tracing(settings: Settings) -> Tracing | Untraced:
    """What the settings ask for. OpenTelemetry's own variables (OTEL_SERVICE_NAME, OTEL_RESOURCE_ATTRIBUTES,
    OTEL_TRACES_SAMPLER, OTEL_EXPORTER_OTLP_HEADERS) hold too. Raises TracingUnavailable."""
    if settings.otlp_endpoint is None:
        return Untraced()
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise TracingUnavailable(
            f"otlp_endpoint is set, and OpenTelemetry is missing ({error.name}): pip install 'whetstone[otel]'"
        ) from error
    address = f"{settings.otlp_endpoint.rstrip('/')}/v1/traces"
    exporter = OTLPSpanExporter(endpoint=address, timeout=_EXPORT_SECONDS)
    return tracing_to(BatchSpanProcessor(exporter), settings)


def tracing_to(processor: SpanProcessor, settings: Settings) -> Tracing:
    """A provider of its own, which isn't made the process's: another library's spans aren't ours to send."""
    import importlib.metadata

    from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
    from opentelemetry.sdk.trace import TracerProvider

    resource = Resource.create({SERVICE_VERSION: importlib.metadata.version("whetstone")})
    if str(resource.attributes[SERVICE_NAME]).startswith("unknown_service"):
        resource = resource.merge(Resource({SERVICE_NAME: AGENT}))
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(processor)
    return Tracing(provider.get_tracer("whetstone"), settings.model_name, settings.otlp_content, provider.shutdown)


@dataclass
class _Open:
    """A generation's span: what it read, and when its text was whole, if it is."""

    span: Span
    input_tokens: int
    ended_ns: int | None = None
    step: Step | None = None


class _Answer:
    """The spans of one answer. `chat` spans overlap no tool's: a generation ends where its action closes."""

    def __init__(self, tracing: Tracing, question: Question) -> None:
        from opentelemetry import trace

        self._trace = trace
        self._tracer = tracing.tracer
        self._content = tracing.content
        self._question = question
        sampling = question.sampling
        self._request: dict[str, Any] = {
            "gen_ai.provider.name": AGENT,
            "gen_ai.request.model": question.version or tracing.model_name,
            "gen_ai.request.max_tokens": sampling.max_tokens,
            "gen_ai.request.temperature": sampling.temperature,
            "gen_ai.request.top_p": sampling.top_p,
        }
        if sampling.seed is not None:
            self._request["gen_ai.request.seed"] = sampling.seed
        if question.terms.stop:
            self._request["gen_ai.request.stop_sequences"] = list(question.terms.stop)
        own = {
            "gen_ai.operation.name": "invoke_agent",
            "gen_ai.agent.name": AGENT,
            "gen_ai.output.type": "text" if question.terms.schema is None else "json",
            "whetstone.request_id": question.request_id,
        }
        self._agent = self._tracer.start_span(f"invoke_agent {AGENT}", attributes=self._request | own)
        self._inside = trace.set_span_in_context(self._agent)
        self._generation: _Open | None = None
        self._tool: Span | None = None
        self._read = 0  # tokens of the next generation's prompt
        self._calls = 0
        self._text = ""
        if self._content:
            self._agent.set_attribute("gen_ai.input.messages", _messages(question.messages))

    def started(self, started: Started) -> None:
        told = {
            "gen_ai.response.id": started.turn_id,
            "gen_ai.response.model": started.version,
            "gen_ai.agent.version": started.version,
            "gen_ai.conversation.id": started.conversation_id,
            "whetstone.turn_id": started.turn_id,
        }
        self._agent.set_attributes(told)
        self._request |= {name: told[name] for name in ("gen_ai.response.model", "gen_ai.conversation.id")}
        self._request["whetstone.turn_id"] = started.turn_id
        self._read = started.prompt_tokens

    def go_on(self) -> None:
        """The next generation begins now. An engine that is asked from here on gets its context."""
        named = {"gen_ai.operation.name": "chat", "gen_ai.request.stream": True}
        name = f"chat {self._request['gen_ai.request.model']}"
        span = self._tracer.start_span(name, self._inside, attributes=self._request | named)
        self._generation = _Open(span, self._read)
        trace_headers.set(_headers(self._trace.set_span_in_context(span)))

    def see(self, event: Event) -> None:
        match event:
            case ToolCall(tool, text):
                if self._generation is not None:
                    self._generation.ended_ns = time.time_ns()
                self._begin_tool(tool, text)
            case ToolResult(observation) if self._tool is not None:
                if observation.error:
                    self._fail(self._tool, "tool_error")
                if self._content:
                    self._tool.set_attribute("gen_ai.tool.call.result", observation.text)
                self._tool.end()
                self._tool = None
            case ClientCall(tool, arguments) if self._content:
                self._text = json.dumps({"tool": tool, "arguments": arguments}, ensure_ascii=False)
            case StepDone(step):
                if self._generation is not None:
                    self._generation.step = step
                    self._generation.ended_ns = self._generation.ended_ns or time.time_ns()
                self._read += len(step.token_ids)
                if step.observation is not None:  # else this was the last, and what it ended for comes with Done
                    self._end_generation("tool_calls" if calls_a_tool(step.action) else "stop")
            case Done(trajectory):
                reason = _FINISH.get(trajectory.stop_reason, trajectory.stop_reason)
                if self._generation is not None and self._generation.step is None:
                    self._generation = None  # there was no room for another: a span that doesn't end isn't sent
                self._end_generation(reason)
                self._agent.set_attributes(
                    {
                        "gen_ai.response.finish_reasons": [reason],
                        "gen_ai.usage.input_tokens": len(trajectory.prompt_ids),
                        "gen_ai.usage.output_tokens": trajectory.own_tokens,
                        "whetstone.stop_reason": trajectory.stop_reason,
                        "whetstone.tool_calls": trajectory.tool_calls,
                    }
                )
                if self._content:
                    text = trajectory.answer or self._text
                    said = [{"role": "assistant", "content": text, "finish_reason": reason}]
                    self._agent.set_attribute("gen_ai.output.messages", _messages(said))

    def failed(self, error: Exception) -> None:
        kind = type(error).__name__
        if self._generation is not None:
            self._fail(self._generation.span, kind)
        self._fail(self._agent, kind, str(error))

    def close(self) -> None:
        """What is still open ends here: the answer failed, or its client left."""
        if self._tool is not None:
            self._tool.end()
        self._end_generation(None)
        self._agent.end()

    def _begin_tool(self, tool: str, text: str) -> None:
        self._calls += 1
        attributes = {
            "gen_ai.operation.name": "execute_tool",
            "gen_ai.tool.name": tool[:100],  # a policy can name anything
            "gen_ai.tool.type": "extension",
            "gen_ai.tool.call.id": f"{self._request['whetstone.turn_id']}.{self._calls}",
            "gen_ai.conversation.id": self._request["gen_ai.conversation.id"],
            "whetstone.turn_id": self._request["whetstone.turn_id"],
        }
        if self._content:
            attributes["gen_ai.tool.call.arguments"] = text
        self._tool = self._tracer.start_span(f"execute_tool {tool[:100]}", self._inside, attributes=attributes)
        trace_headers.set(_headers(self._trace.set_span_in_context(self._tool)))

    def _end_generation(self, finish: str | None) -> None:
        generation, self._generation = self._generation, None
        if generation is None:
            return
        span, step = generation.span, generation.step
        span.set_attribute("gen_ai.usage.input_tokens", generation.input_tokens)
        if step is not None:
            span.set_attribute("gen_ai.usage.output_tokens", sum(step.mask))
            span.set_attribute("whetstone.action", step.action)
        if finish is not None:
            span.set_attribute("gen_ai.response.finish_reasons", [finish])
        span.end(generation.ended_ns)

    def _fail(self, span: Span, kind: str, told: str = "") -> None:
        span.set_attribute("error.type", kind)
        span.set_status(self._trace.StatusCode.ERROR, told if self._content else None)


class _Requests:
    """ASGI middleware: the server's span of each request, under the client's `traceparent` if it sent one."""

    def __init__(self, app: ASGIApp, tracer: Tracer) -> None:
        from opentelemetry import context, trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self.app = app
        self._tracer = tracer
        self._context, self._trace = context, trace
        self._propagator = TraceContextTextMapPropagator()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        method = scope["method"] if scope["method"] in _METHODS else "_OTHER"
        span = self._tracer.start_span(
            method,
            self._propagator.extract(dict(Headers(scope=scope))),
            self._trace.SpanKind.SERVER,
            {"http.request.method": method, "url.path": scope["path"], "url.scheme": scope["scheme"]},
        )
        inside = span.get_span_context()
        ids = trace_ids.set((format(inside.trace_id, "032x"), format(inside.span_id, "016x")))
        token = self._context.attach(self._trace.set_span_in_context(span))
        status = 500

        async def send_and_see(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                span.set_attribute("http.response.status_code", status)
            await send(message)

        try:
            await self.app(scope, receive, send_and_see)
        finally:
            self._context.detach(token)
            trace_ids.reset(ids)
            if route := getattr(scope.get("route"), "path", ""):
                span.update_name(f"{method} {route}")
                span.set_attribute("http.route", route)
            if id_ := scope.get("state", {}).get("request_id"):
                span.set_attribute("whetstone.request_id", id_)
            if status >= 500:
                span.set_attribute("error.type", str(status))
                span.set_status(self._trace.StatusCode.ERROR)
            span.end()


def _headers(context: Any) -> dict[str, str]:
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier, context)
    return carrier


def _messages(messages: Sequence[dict[str, Any]]) -> str:
    """In the conventions' shape, as JSON: attributes of spans hold no objects."""
    told = []
    for message in messages:
        part = {"type": "text", "content": message.get("content") or ""}
        finish = {"finish_reason": message["finish_reason"]} if "finish_reason" in message else {}
        told.append({"role": message["role"], "parts": [part]} | finish)
    return json.dumps(told, ensure_ascii=False)
