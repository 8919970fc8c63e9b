"""One answer as the chat shows it: thinking and tool calls as panels, what they drew, the text, its sources."""

from __future__ import annotations

from typing import Any

from app.citations import Source, sources_of
from app.service import Finished, ServiceEvent, Started
from app.web.files import left_behind
from app.web.safe import as_code, as_link, as_markdown, as_words
from serving.trajectory import AnswerText, Observation, StepDone, Thinking, ToolCall, ToolResult

ChatMessage = dict[str, Any]  # gradio's: role, content, metadata

_TITLES = {"code": "Python", "search": "Search"}


class Transcript:
    """Feed it a turn's events; `messages` is what to show so far. `finished` is set by the last event."""

    def __init__(self) -> None:
        self.started: Started | None = None
        self.finished: Finished | None = None
        self._panels: list[ChatMessage] = []
        self._thinking: list[str] = []
        self._call: ToolCall | None = None
        self._answer = ""
        self._error: str | None = None

    @property
    def messages(self) -> list[ChatMessage]:
        shown = list(self._panels)
        if self._thinking:
            shown.append(_panel("Thinking", as_markdown("".join(self._thinking)), pending=not self._answer))
        if text := self._text():
            shown.append({"role": "assistant", "content": text})
        return shown

    def feed(self, event: ServiceEvent) -> bool:
        """Take an event in; True when something beside more text happened, so that it's shown at once."""
        match event:
            case Started():
                self.started = event
            case Thinking(text):
                self._thinking.append(text)
                return False
            case AnswerText(text):
                self._answer += text
                return False
            case ToolCall():
                self._end_thinking()
                self._call = event
                self._panels.append(_panel(_call_title(event), _call_body(event), pending=True))
            case ToolResult(observation):
                assert self._call is not None, "a result follows its call"
                self._panels[-1] = _result_panel(self._call, observation)
                self._call = None
                if self.started and (left := left_behind(observation, self.started.conversation_id)):
                    self._panels.append({"role": "assistant", "content": left})
            case StepDone(step):
                self._end_thinking()
                if step.action == "invalid" and step.observation is not None:
                    self._answer = ""
                    body = f"{as_code(step.text)}\n{as_markdown(step.observation.text)}"
                    self._panels.append(_panel("Unclear action, asked to try again", body))
            case Finished():
                self.finished = event
                self._answer = event.trajectory.answer
        return True

    def fail(self, message: str) -> None:
        """The answer ended with an error that the person should read."""
        self._end_thinking()
        self._error = message

    def stop(self) -> None:
        """The person stopped the answer."""
        self._end_thinking()
        if self._call is not None:
            self._panels[-1] = _panel(_call_title(self._call), _call_body(self._call))

    def _end_thinking(self) -> None:
        if "".join(self._thinking).strip():
            self._panels.append(_panel("Thinking", as_markdown("".join(self._thinking))))
        self._thinking = []

    def _text(self) -> str:
        parts = [as_markdown(self._answer.strip())] if self._answer.strip() else []
        if self._error is not None:
            parts.append(f"**No answer:** {as_markdown(self._error)}")
        if self.finished is not None:
            parts = parts or ["*The model gave no answer.*"]
            if cited := sources_of(self.finished.trajectory):
                parts.append("\n".join(["###### Sources", *map(_cited, cited)]))
            parts.append(f"*{as_markdown(_stamp(self.finished))}*")
        return "\n\n".join(parts)


def _cited(source: Source) -> str:
    title = as_link(source.title, source.url) if source.url else as_words(source.title)
    whose = f" ({as_words(source.source)})" if source.source not in ("", source.title) else ""
    return f"{source.number}. {title}{whose}"


def _stamp(finished: Finished) -> str:
    trajectory = finished.trajectory
    calls = trajectory.tool_calls
    seconds = sum(step.seconds for step in trajectory.steps)
    parts = [", then ".join(finished.trajectory.drawn_by), f"{seconds:.1f} s"]
    if calls:
        parts.insert(1, f"{calls} tool call{'s' if calls > 1 else ''}")
    return " · ".join(parts)


def _panel(title: str, content: str, pending: bool = False, **metadata: Any) -> ChatMessage:
    status = "pending" if pending else "done"
    return {"role": "assistant", "content": content, "metadata": {"title": title, "status": status, **metadata}}


def _call_title(call: ToolCall) -> str:
    """The first line, shown as it is: a panel's title is Markdown too."""
    first = call.input.strip().splitlines()[0] if call.input.strip() else ""
    return f"{_TITLES.get(call.tool, as_words(call.tool))}: {as_words(first[:60])}{'…' if len(first) > 60 else ''}"


def _call_body(call: ToolCall) -> str:
    return as_code(call.input, "python" if call.tool == "code" else "text")


def _result_panel(call: ToolCall, observation: Observation) -> ChatMessage:
    label = "Error" if observation.error else "Result"
    backend = observation.artifact.get("backend")
    if backend:
        label += f" from {backend}"
    body = f"{_call_body(call)}\n\n**{as_markdown(label)}**\n{as_code(observation.text or '(nothing)', 'text')}"
    title = _call_title(call) + (" (failed)" if observation.error else "")
    return _panel(title, body, duration=round(observation.seconds, 2))
