"""The shape of an answer: the official client's own response types, and one extra field `whetstone` in each.

The field is what other clients ignore: the version, the ids to send feedback with, the tool calls as they happen.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from openai.types.chat import ChatCompletion

from app.artifacts import Left, file_path, files_of, image_path, images_of
from app.citations import sources_of
from app.service import Finished, ServiceEvent, Started
from feedback_store import Outcome
from serving.trajectory import (
    AnswerText,
    ClientCall,
    Event,
    Observation,
    Step,
    StepDone,
    Thinking,
    TokenLogprob,
    ToolCall,
    ToolResult,
)

Chunk = dict[str, Any]
_FINISH = {"answer": "stop", "no_answer": "stop", "length": "length", "cancelled": "stop", "tool_calls": "tool_calls"}


class Answered:
    """One answer of a request that isn't streamed: what its events leave behind."""

    def __init__(self, logprobs: bool) -> None:
        self._logprobs: list[dict[str, Any]] | None = [] if logprobs else None
        self.finished: Finished | None = None

    def feed(self, event: ServiceEvent) -> None:
        if isinstance(event, Finished):
            self.finished = event
        elif isinstance(event, AnswerText) and self._logprobs is not None:
            self._logprobs += [token_logprob(token) for token in event.tokens]

    def choice(self, index: int) -> dict[str, Any]:
        assert self.finished is not None, "an answer ends with Finished or an error"
        trajectory = self.finished.trajectory
        called = trajectory.client_call
        message: dict[str, Any] = {
            "role": "assistant",
            "content": None if called else trajectory.answer,
            "refusal": None,
            "annotations": url_citations(self.finished),
        }
        if called:
            message["tool_calls"] = [tool_call(self.finished.started.turn_id, called)]
        return {
            "index": index,
            "message": message,
            "logprobs": None if self._logprobs is None else {"content": self._logprobs, "refusal": None},
            "finish_reason": _FINISH[trajectory.stop_reason],
        }


def completion(answers: Sequence[Answered]) -> ChatCompletion:
    """The whole answers. `model` is the version that wrote the first; several tell each their own ids."""
    finished = [answer.finished for answer in answers if answer.finished is not None]
    told = [ids(one.started) | summary(one) for one in finished]
    made = [answer.choice(index) for index, answer in enumerate(answers)]
    return ChatCompletion.model_validate(
        {
            "id": completion_id(finished[0].started),
            "object": "chat.completion",
            "created": int(time.time()),
            "model": finished[0].started.version,
            "choices": [c | {"whetstone": w} for c, w in zip(made, told, strict=True)] if len(made) > 1 else made,
            "usage": usage(finished),
            "whetstone": told[0],
        }
    )


class Chunks:
    """The chunks of one streamed answer, in order: `first`, one for each event, `last`, and `usage` if asked for.

    `index` counts the answers of a request, whose chunks all bear the id of the `leading` one. A chunk is plain JSON
    of the official client's `ChatCompletionChunk`, as the tests see to, since there may be one a token.
    """

    def __init__(self, started: Started, index: int, leading: Started, created: int) -> None:
        self._started = started
        self._index = index
        self._id = completion_id(leading)
        self._created = created
        self._answered = False

    def first(self) -> Chunk:
        return self._chunk({"role": "assistant", "content": ""}, whetstone=ids(self._started))

    def event(self, event: Event) -> Chunk | None:
        match event:
            case AnswerText(text, tokens):
                self._answered = self._answered or bool(text.strip())
                return self._chunk({"content": text}, tokens=tokens)
            case Thinking(text):
                return self._chunk({"reasoning_content": text})
            case ToolCall(tool, text):
                return self._chunk({}, whetstone={"event": "tool_call", "tool": tool, "input": text})
            case ToolResult(observation):
                return self._chunk({}, whetstone={"event": "tool_result"} | _observation(observation))
            case ClientCall():
                return self._chunk({"tool_calls": [{"index": 0} | tool_call(self._started.turn_id, event)]})
            case StepDone(step):
                return self._chunk({}, whetstone={"event": "step", "index": step.index, "action": step.action})
        return None

    def last(self, finished: Finished) -> list[Chunk]:
        trajectory = finished.trajectory
        cited = url_citations(finished)
        delta = {"annotations": cited} if cited else {}
        end = self._chunk(delta, _FINISH[trajectory.stop_reason], ids(finished.started) | summary(finished))
        if trajectory.answer.strip() and not self._answered:  # an answer that was only clear at the end
            return [self._chunk({"content": trajectory.answer}), end]
        return [end]

    def usage(self, finished: Sequence[Finished]) -> Chunk:
        return self._build([], usage=usage(finished))

    def _chunk(
        self,
        delta: dict[str, Any],
        finish_reason: str | None = None,
        whetstone: dict[str, Any] | None = None,
        tokens: Sequence[TokenLogprob] = (),
    ) -> Chunk:
        choice: dict[str, Any] = {"index": self._index, "delta": delta, "finish_reason": finish_reason}
        if tokens:
            choice["logprobs"] = {"content": [token_logprob(token) for token in tokens], "refusal": None}
        return self._build([choice], **({"whetstone": whetstone} if whetstone else {}))

    def _build(self, choices: list[dict[str, Any]], **extra: Any) -> Chunk:
        return {
            "id": self._id,
            "object": "chat.completion.chunk",
            "created": self._created,
            "model": self._started.version,
            "choices": choices,
            **extra,
        }


def token_logprob(token: TokenLogprob) -> dict[str, Any]:
    """In OpenAI's shape. A token that holds part of a character shows a replacement, and its bytes are exact."""
    top = [_spelt(spelling, logprob) for spelling, logprob in token.top]
    return _spelt(token.spelling, token.logprob) | {"top_logprobs": top}


def _spelt(spelling: bytes, logprob: float) -> dict[str, Any]:
    least = max(logprob, -9999.0)  # as OpenAI writes what is next to impossible; JSON has no infinity
    return {"token": spelling.decode(errors="replace"), "bytes": list(spelling), "logprob": least}


def tool_call(turn_id: str, call: ClientCall) -> dict[str, Any]:
    return {
        "id": f"call_{turn_id.removeprefix('turn_')}",
        "type": "function",
        "function": {"name": call.tool, "arguments": call.arguments},
    }


def completion_id(started: Started) -> str:
    return f"chatcmpl-{started.turn_id}"


def usage(finished: Sequence[Finished]) -> dict[str, int]:
    """Tokens of the prompt, which is one, and tokens that the policy wrote. What tools returned is in `whetstone`."""
    prompt = finished[0].started.prompt_tokens
    own = sum(one.trajectory.own_tokens for one in finished)
    return {"prompt_tokens": prompt, "completion_tokens": own, "total_tokens": prompt + own}


def summary(finished: Finished) -> dict[str, Any]:
    trajectory, outcome = finished.trajectory, finished.outcome
    conversation_id = finished.started.conversation_id
    return {
        "stop_reason": trajectory.stop_reason,
        "versions": [*trajectory.drawn_by],
        "tool_tokens": len(trajectory.mask) - trajectory.own_tokens,
        "steps": [step_summary(step) for step in trajectory.steps],
        "outcome": outcome_summary(outcome) if outcome else None,
        "sources": [asdict(source) for source in sources_of(trajectory)],
        "files": [_left(left, file_path(conversation_id, left.name)) for left in files_of(trajectory)],
        "images": [_left(left, image_path(conversation_id, left.name)) for left in images_of(trajectory)],
    }


def url_citations(finished: Finished) -> list[dict[str, Any]]:
    """The sources that have an address, as OpenAI tells citations. Which words rest on which isn't known."""
    end = len(finished.trajectory.answer)
    return [
        {
            "type": "url_citation",
            "url_citation": {"start_index": end, "end_index": end, "title": source.title, "url": source.url},
        }
        for source in sources_of(finished.trajectory)
        if source.url
    ]


def step_summary(step: Step) -> dict[str, Any]:
    return {
        "thought": step.thought,
        "action": step.action,
        "input": step.input,
        "observation": _observation(step.observation) if step.observation else None,
    }


def outcome_summary(outcome: Outcome) -> dict[str, Any]:
    """`became`: queued, known, reopened, review, rejected, quarantined, done, dead; null where no task came of it."""
    return {
        "id": outcome.id,
        "score": outcome.score,
        "task_id": outcome.task_id,
        "became": outcome.became or None,
        "note": outcome.note,
    }


def ids(started: Started) -> dict[str, Any]:
    return {
        "turn_id": started.turn_id,
        "conversation_id": started.conversation_id,
        "version": started.version,
    }


def _left(left: Left, path: str) -> dict[str, Any]:
    return asdict(left) | {"path": f"/v1/{path}"}


def _observation(observation: Observation) -> dict[str, Any]:
    return {
        "tool": observation.tool,
        "text": observation.text,
        "error": observation.error,
        "artifact": observation.artifact,
        "seconds": round(observation.seconds, 3),
    }
