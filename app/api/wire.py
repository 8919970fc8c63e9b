"""The bytes of an answer: the official client's own response types, and one extra field `whetstone` in each.

The field is what other clients ignore: the version, the ids to send feedback with, the tool calls as they happen.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

from openai.types.chat import ChatCompletion, ChatCompletionChunk

from app.artifacts import Left, file_path, files_of, image_path, images_of
from app.citations import sources_of
from app.service import Finished, Started
from feedback_store import Outcome
from serving.trajectory import (
    AnswerText,
    Event,
    Observation,
    Step,
    StepDone,
    Thinking,
    ToolCall,
    ToolResult,
)

_FINISH = {"answer": "stop", "no_answer": "stop", "length": "length", "cancelled": "stop"}


def completion(finished: Finished) -> ChatCompletion:
    """The whole answer. Its `model` is the version that wrote it."""
    trajectory = finished.trajectory
    return ChatCompletion.model_validate(
        {
            "id": completion_id(finished.started),
            "object": "chat.completion",
            "created": int(time.time()),
            "model": finished.started.version,
            "choices": [
                {
                    "index": 0,
                    "message": {
                        "role": "assistant",
                        "content": trajectory.answer,
                        "refusal": None,
                        "annotations": url_citations(finished),
                    },
                    "logprobs": None,
                    "finish_reason": _FINISH[trajectory.stop_reason],
                }
            ],
            "usage": usage(finished),
            "whetstone": _ids(finished.started) | summary(finished),
        }
    )


class Chunks:
    """The chunks of one streamed answer, in order: `first`, one for each event, `last`, and `usage` if asked for."""

    def __init__(self, started: Started) -> None:
        self._started = started
        self._created = int(time.time())
        self._answered = False

    def first(self) -> ChatCompletionChunk:
        return self._chunk({"role": "assistant", "content": ""}, whetstone=_ids(self._started))

    def event(self, event: Event) -> ChatCompletionChunk | None:
        match event:
            case AnswerText(text):
                self._answered = self._answered or bool(text.strip())
                return self._chunk({"content": text})
            case Thinking(text):
                return self._chunk({"reasoning_content": text})
            case ToolCall(tool, text):
                return self._chunk({}, whetstone={"event": "tool_call", "tool": tool, "input": text})
            case ToolResult(observation):
                return self._chunk({}, whetstone={"event": "tool_result"} | _observation(observation))
            case StepDone(step):
                return self._chunk({}, whetstone={"event": "step", "index": step.index, "action": step.action})
        return None

    def last(self, finished: Finished) -> list[ChatCompletionChunk]:
        trajectory = finished.trajectory
        cited = url_citations(finished)
        delta = {"annotations": cited} if cited else {}
        end = self._chunk(delta, _FINISH[trajectory.stop_reason], _ids(finished.started) | summary(finished))
        if trajectory.answer.strip() and not self._answered:  # an answer that was only clear at the end
            return [self._chunk({"content": trajectory.answer}), end]
        return [end]

    def usage(self, finished: Finished) -> ChatCompletionChunk:
        return self._build([], usage=usage(finished))

    def _chunk(
        self, delta: dict[str, Any], finish_reason: str | None = None, whetstone: dict[str, Any] | None = None
    ) -> ChatCompletionChunk:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
        return self._build([choice], **({"whetstone": whetstone} if whetstone else {}))

    def _build(self, choices: list[dict[str, Any]], **extra: Any) -> ChatCompletionChunk:
        return ChatCompletionChunk.model_validate(
            {
                "id": completion_id(self._started),
                "object": "chat.completion.chunk",
                "created": self._created,
                "model": self._started.version,
                "choices": choices,
                **extra,
            }
        )


def completion_id(started: Started) -> str:
    return f"chatcmpl-{started.turn_id}"


def usage(finished: Finished) -> dict[str, int]:
    """Tokens of the prompt, and tokens that the policy wrote. What tools returned is in `whetstone` only."""
    prompt, own = finished.started.prompt_tokens, finished.trajectory.own_tokens
    return {"prompt_tokens": prompt, "completion_tokens": own, "total_tokens": prompt + own}


def summary(finished: Finished) -> dict[str, Any]:
    trajectory, outcome = finished.trajectory, finished.outcome
    conversation_id = finished.started.conversation_id
    return {
        "stop_reason": trajectory.stop_reason,
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
    return {"id": outcome.id, "score": outcome.score, "task_id": outcome.task_id, "note": outcome.note}


def _ids(started: Started) -> dict[str, Any]:
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
