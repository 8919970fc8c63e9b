"""The one agent loop: prompt, generate until an action closes, run the tool, append what it returned, and again.

Chat, endpoint, evaluation and training rollouts all run this. Tokens come from the engine and go back as they came.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import partial

from serving.dialects.base import Dialect, MalformedCall, Parsed, read_input
from serving.engines.base import Engine, GenerateRequest, PromptTooLong, Sampling
from serving.trajectory import (
    AnswerText,
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
from tools.context import NOBODY, ToolContext
from tools.toolbox import Budget, Toolbox

CallTool = Callable[[str, str], Awaitable[Observation]]
"""`await call(tool, input)`: the input is a program, a query, or any other tool's arguments as JSON."""

_ROOM_FOR_AN_ANSWER = 64  # tokens that a prompt must leave free
_CHARS_PER_TOKEN = 8  # more than English text has: only what is far too long is cut by characters


@dataclass(frozen=True)
class Limits:
    """`max_turns`: tool turns before the last generation, with tools off (4 in the paper). `answer_tokens`: the
    policy's own tokens in one answer, over all its generations."""

    max_turns: int = 4
    observation_tokens: int = 256
    tool_seconds: float = 15.0
    answer_tokens: int = 1024


class Agent:
    """Several answers may be under way at once; an agent holds no state between them.

    The toolbox is held to the agent's limits, and its texts are cut by the dialect: what an observation says is what
    the policy reads.
    """

    def __init__(self, engine: Engine, dialect: Dialect, toolbox: Toolbox, limits: Limits | None = None) -> None:
        self.engine = engine
        self.dialect = dialect
        self.limits = limits or Limits()
        tokens = self.limits.observation_tokens
        self._fit = partial(dialect.fit, max_tokens=tokens)
        self.toolbox = toolbox.within(Budget(self.limits.tool_seconds, _CHARS_PER_TOKEN * tokens, self._fit))

    def render(self, messages: Sequence[dict[str, str]], allowed: Collection[str] | None = None) -> list[int]:
        """The prompt's ids, with the tools that are allowed (None: all). Raises PromptTooLong when it leaves no room
        for an answer."""
        ids = self.dialect.render(messages, self.toolbox.schemas(allowed))
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
        context: ToolContext = NOBODY,
        allowed: Collection[str] | None = None,
    ) -> AsyncGenerator[Event, None]:
        """Answer the conversation, as events. Closing the generator cancels, and aborts the engine's request.

        `call` replaces the running of tools (training replays results within a group); None runs them for real, for
        the owner and the conversation of `context`. `allowed` are the tools that the prompt lists and the policy may
        use, None for all. `sampling.max_tokens` bounds each generation.
        """
        sampling = sampling or Sampling()
        if allowed is None:
            allowed = self.toolbox.names()  # tools may come and go; an answer keeps to its prompt's
        run = call or partial(self.run_tool, context=context, allowed=allowed)
        prompt_ids = self.render(messages, allowed)
        ids_so_far = list(prompt_ids)
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
            request = GenerateRequest(ids_so_far, version, drawn, self.dialect.stops(last))
            async with aclosing(self.engine.generate(request)) as chunks:  # type: ignore[type-var]
                async for chunk in chunks:
                    ids += chunk.token_ids
                    logprobs += chunk.logprobs
                    reason = chunk.finish_reason
                    for event in parser.feed(chunk.token_ids):
                        yield event
            spent += len(ids)
            parsed = parser.finish(stopped=reason == "stop", ended=reason == "eos")
            if last and parsed.action != "answer":
                parsed = replace(parsed, action="invalid", input="", well_formed=False)  # tools are off: nothing ran
            cut = reason == "length" and parser.answering
            if parsed.unshown and (parsed.action == "answer" or last or cut):
                yield AnswerText(parsed.unshown)
            if parsed.action == "answer" or last or cut:
                steps.append(_step(index, parsed, ids, logprobs, version, began))
                yield StepDone(steps[-1])
                answer = parsed.input.strip() if parsed.action == "answer" else self.dialect.bare(parsed.text)
                stop_reason = "answer" if parsed.action == "answer" else "length" if cut else "no_answer"
                break
            if parsed.action == "invalid":
                told = parsed.problem or self.dialect.invalid(self.toolbox.schemas(allowed))
                observation = Observation("invalid", told, error=True)
            else:
                yield ToolCall(parsed.tool, parsed.tool_input)
                observation = await run(parsed.tool, parsed.tool_input)
                if call is not None:  # a record may have been made under another limit
                    observation = replace(observation, text=self._fit(observation.text))
                yield ToolResult(observation)
            room = self.engine.context_length - len(ids_so_far) - len(ids) - _ROOM_FOR_AN_ANSWER
            no_more = index + 1 == self.limits.max_turns
            observed = self.dialect.encode_observation(observation.text, last=no_more, after=ids)
            full = len(observed) > room or spent >= self.limits.answer_tokens
            if full:
                observed = []
            steps.append(_step(index, parsed, ids, logprobs, version, began, observation, observed))
            yield StepDone(steps[-1])
            if full:
                answer, stop_reason = self.dialect.bare(parsed.text), "length"
                break
            ids_so_far = ids_so_far + ids + observed
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

    async def run_tool(
        self,
        name: str,
        text: str,
        context: ToolContext = NOBODY,
        allowed: Collection[str] | None = None,
    ) -> Observation:
        """Run one tool within its limits. A failure is an observation, never an exception."""
        try:
            arguments = read_input(name, text)
        except MalformedCall as error:
            return Observation(name, str(error), error=True)
        outcome = await self.toolbox.call(name, arguments, context, allowed)
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
        tool_input=parsed.tool_input,
    )
