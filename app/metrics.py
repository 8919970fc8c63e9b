"""What Prometheus scrapes, under the names that vLLM and SGLang use, with `whetstone_` before them.

Each is counted as a client meets it, chat and endpoint alike, tool calls included. An answer under way costs a clock
reading and an addition an event; whatever has to be asked for (queue, engine) is asked for when a scrape comes.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

from serving.trajectory import AnswerText, Done, Event, Thinking, ToolResult

# From a GPU's milliseconds to a busy CPU's minutes.
_FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_BETWEEN = (0.002, 0.005, 0.01, 0.02, 0.035, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 10.0)
_WHOLE = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0)
_TOOL = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0)


class Metrics:
    """One registry a service, so that two in one process don't count together."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)

        def histogram(name: str, help: str, label: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"whetstone_{name}", help, [label], registry=registry, buckets=buckets)

        def counter(name: str, help: str, *labels: str) -> Counter:
            return Counter(f"whetstone_{name}", help, labels, registry=registry)

        self.first = histogram(
            "time_to_first_token_seconds", "From the question to the first text, thoughts included", "version", _FIRST
        )
        self.between = histogram(
            "inter_token_latency_seconds", "Between two pieces of text of one generation", "version", _BETWEEN
        )
        self.whole = histogram("e2e_request_latency_seconds", "Of an answer, its tools included", "version", _WHOLE)
        self.answers = counter("answers", "Ended answers; why is answer, no_answer, length, cancelled or error",
                               "version", "stop_reason")  # fmt: skip
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts", "version")
        self.generation_tokens = counter("generation_tokens", "Tokens that the policy wrote", "version")
        self.tool_calls = counter("tool_calls", "Tool calls that ended", "tool")
        self.tool_errors = counter("tool_errors", "Tool calls that failed", "tool")
        self.tool_seconds = histogram("tool_call_seconds", "Of a tool call", "tool", _TOOL)
        self.requests = counter("http_requests", "Requests to the endpoint", "method", "route", "status")
        self.running = Gauge("whetstone_num_requests_running", "Answers under way", registry=registry)
        self.queue = Gauge("whetstone_queue_tasks", "Tasks for training", ["state"], registry=registry)
        self.engine_up = Gauge("whetstone_engine_up", "1 while the engine answers", registry=registry)
        self.in_service = Gauge("whetstone_version_in_service", "1 for the one in service", ["version"],
                                registry=registry)  # fmt: skip

    @contextmanager
    def answer(self, tools: Collection[str]) -> Iterator[Watch]:
        """Around one answer, which may end in an error or be left. Tools that aren't of `tools` count as `unknown`:
        a policy can name anything, and each name would be a series of its own."""
        watch = Watch(self, tools)
        try:
            yield watch
        except Exception:
            watch.ended = "error"
            raise
        finally:
            watch.close()


class Watch:
    """One answer, from the question on."""

    def __init__(self, metrics: Metrics, tools: Collection[str]) -> None:
        self._metrics = metrics
        self._tools = tools
        self._began = time.perf_counter()
        self._last: float | None = None  # when the last text of this generation came
        self._first = True
        self._version: str | None = None
        self.ended = "cancelled"  # unless it is heard to end otherwise

    def started(self, version: str, prompt_tokens: int) -> None:
        self._version = version
        self._metrics.prompt_tokens.labels(version).inc(prompt_tokens)

    def see(self, event: Event) -> None:
        match event:
            case Thinking() | AnswerText():
                now = time.perf_counter()
                if self._first:
                    self._first = False
                    self._metrics.first.labels(self._version).observe(now - self._began)
                elif self._last is not None:
                    self._metrics.between.labels(self._version).observe(now - self._last)
                self._last = now
            case ToolResult(observation):
                self._last = None
                tool = observation.tool if observation.tool in self._tools else "unknown"
                self._metrics.tool_calls.labels(tool).inc()
                self._metrics.tool_seconds.labels(tool).observe(observation.seconds)
                if observation.error:
                    self._metrics.tool_errors.labels(tool).inc()
            case Done(trajectory):
                self.ended = trajectory.stop_reason
                for version, tokens in trajectory.drawn_by.items():
                    self._metrics.generation_tokens.labels(version).inc(tokens)

    def close(self) -> None:
        if self._version is not None:  # else it was refused, and no answer began
            self._metrics.answers.labels(self._version, self.ended).inc()
            self._metrics.whole.labels(self._version).observe(time.perf_counter() - self._began)
