"""The one agent loop: prompt, generate until an action closes, run the tool, append what it returned, and again.

Chat, endpoint, evaluation and training rollouts all run this. Tokens come from the engine and go back as they came.
"""

from __future__ import annotations

import re
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace

from langchain_core.tools import BaseTool

from serving.dialects.tapo import INVALID, Parsed, TapoDialect
from serving.engines.base import Engine, GenerateRequest, PromptTooLong, Sampling
from serving.trajectory import (
    Done,
    Event,
    Observation,
    Step,
    StepDone,
    StopReason,
    ToolCall,
    ToolResult,
    Trajectory,
)
from tools.registry import call_tool

CallTool = Callable[[str, str], Awaitable[Observation]]
_ROOM_FOR_AN_ANSWER = 64  # tokens that a prompt must leave free


@dataclass(frozen=True)
class Limits:
    """`max_turns`: tool turns before the last generation, with tools off (4 in the paper). `answer_tokens`: the
    policy's own tokens in one answer, over all its generations."""

    max_turns: int = 4
    observation_tokens: int = 256
    tool_seconds: float = 15.0
    answer_tokens: int = 1024


class Agent:
    """`tools` by action name. Several answers may be under way at once; an agent holds no state between them."""

    def __init__(
        self, engine: Engine, dialect: TapoDialect, tools: Mapping[str, BaseTool], limits: Limits | None = None
    ) -> None:
        self.engine = engine
        self.dialect = dialect
        self.tools = tools
        self.limits = limits or Limits()

    def render(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """The prompt's ids. Raises PromptTooLong when it leaves no room for an answer."""
        ids = self.dialect.render(messages, self.tools)
        room = self.engine.context_length - _ROOM_FOR_AN_ANSWER
        if len(ids) > room:
            raise PromptTooLong(
                f"The conversation has {len(ids)} tokens; the model reads at most {room}. Shorten it or start anew."
            )
        return ids

    async def answer(
        self,
        messages: Sequence[dict[str, str]],
        version: str,
        sampling: Sampling | None = None,
        call: CallTool | None = None,
    ) -> AsyncGenerator[Event, None]:
        """Answer the conversation, as events. Closing the generator cancels, and aborts the engine's request.

        `call` replaces the running of tools (training replays results within a group); None runs them for real.
        `sampling.max_tokens` bounds each generation.
        """
        sampling = sampling or Sampling()
        prompt_ids = self.render(messages)
        context = list(prompt_ids)
        steps: list[Step] = []
        spent = 0  # own tokens so far
        answer = ""
        stop_reason: StopReason = "no_answer"
        for index in range(self.limits.max_turns + 1):
            last = index == self.limits.max_turns
            began = time.monotonic()
            parser = self.dialect.parser()
            ids: list[int] = []
            logprobs: list[float] = []
            reason = None
            drawn = replace(
                sampling,
                seed=None if sampling.seed is None else sampling.seed + index,
                max_tokens=min(sampling.max_tokens, self.limits.answer_tokens - spent),
            )
            request = GenerateRequest(context, version, drawn, self.dialect.stops(last))
            async with aclosing(self.engine.generate(request)) as chunks:  # type: ignore[type-var]
                async for chunk in chunks:
                    ids += chunk.token_ids
                    logprobs += chunk.logprobs
                    reason = chunk.finish_reason
                    for event in parser.feed(chunk.token_ids):
                        yield event
            spent += len(ids)
            parsed = parser.finish(stopped=reason == "stop")
            if last and parsed.action != "answer":
                parsed = replace(parsed, action="invalid", input="", well_formed=False)  # tools are off: nothing ran
            cut = reason == "length" and parser.answering
            if parsed.action == "answer" or last or cut:
                steps.append(_step(index, parsed, ids, logprobs, version, began))
                yield StepDone(steps[-1])
                answer = parsed.input.strip() if parsed.action == "answer" else _bare(parsed.text)
                stop_reason = "answer" if parsed.action == "answer" else "length" if cut else "no_answer"
                break
            if parsed.action == "invalid":
                observation = Observation("invalid", INVALID, error=True)
            else:
                yield ToolCall(parsed.action, parsed.input.strip())
                observation = await (call or self.run_tool)(parsed.action, parsed.input.strip())
                yield ToolResult(observation)
            room = self.engine.context_length - len(context) - len(ids) - _ROOM_FOR_AN_ANSWER
            observed = self.dialect.encode_observation(
                observation.text, self.limits.observation_tokens, last=index + 1 == self.limits.max_turns
            )
            full = len(observed) > room or spent >= self.limits.answer_tokens
            if full:
                observed = []
            steps.append(_step(index, parsed, ids, logprobs, version, began, observation, observed))
            yield StepDone(steps[-1])
            if full:
                answer, stop_reason = _bare(parsed.text), "length"
                break
            context = context + ids + observed
        yield Done(Trajectory(prompt_ids, steps, answer, stop_reason, version))

    async def roll_out(
        self,
        messages: Sequence[dict[str, str]],
        version: str,
        sampling: Sampling | None = None,
        call: CallTool | None = None,
    ) -> Trajectory:
        """The whole trajectory of one answer, for training and evaluation."""
        async with aclosing(self.answer(messages, version, sampling, call)) as events:
            async for event in events:
                if isinstance(event, Done):
                    return event.trajectory
        raise RuntimeError("The agent ended without a trajectory.")

    async def run_tool(self, name: str, text: str) -> Observation:
        """Run one tool within its limits. A failure is an observation, never an exception."""
        tool = self.tools.get(name)
        if tool is None:
            return Observation(name, f"The tool {name} is off.", error=True)
        characters = 8 * self.limits.observation_tokens
        outcome = await call_tool(tool, text, self.limits.tool_seconds, characters)
        return Observation(name, outcome.text, outcome.error, outcome.artifact, outcome.seconds)


def _step(
    index: int,
    parsed: Parsed,
    ids: list[int],
    logprobs: list[float],
    version: str,
    began: float,
    observation: Observation | None = None,
    observed: Sequence[int] = (),
) -> Step:
    return Step(
        index=index,
        token_ids=[*ids, *observed],
        logprobs=[*logprobs, *(0.0 for _ in observed)],
        mask=[1] * len(ids) + [0] * len(observed),
        version=version,
        text=parsed.text,
        action=parsed.action,
        input=parsed.input.strip(),
        thought=parsed.thought.strip(),
        observation=observation,
        well_formed=parsed.well_formed,
        seconds=time.monotonic() - began,
    )


def _bare(text: str) -> str:
    """What an unfinished generation said, without its markup: better than nothing for the reader."""
    return re.sub(r"</?(?:think|code|search|answer|response)>|<\|[^|>]*\|>", " ", text).strip()
