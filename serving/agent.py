"""The one agent loop: prompt, generate until an action closes, run the tool, append what it returned, and again.

Chat, endpoint, evaluation and training rollouts all run this. Tokens come from the engine and go back as they came.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import Any

from serving.dialects.base import Dialect, MalformedCall, Parsed, read_input
from serving.engines.base import Engine, GenerateRequest, GrammarFailed, PromptTooLong, Sampling
from serving.generation import Generation
from serving.json_schema import holds
from serving.terms import ANY_OBJECT, Terms
from serving.token_bytes import TokenBytes
from serving.trajectory import (
    AnswerText,
    ClientCall,
    Done,
    Event,
    Observation,
    Step,
    StepDone,
    StopReason,
    Thinking,
    ToolCall,
    ToolResult,
    Trajectory,
)
from tools.arguments import BadArguments, check_against_schema
from tools.context import NOBODY, ToolContext
from tools.toolbox import Budget, Toolbox

CallTool = Callable[[str, str], Awaitable[Observation]]
"""`await call(tool, input)`: the input is a program, a query, or any other tool's arguments as JSON."""

_ROOM_FOR_AN_ANSWER = 64  # tokens that a prompt must leave free
_NO_TERMS = Terms()
_CHARS_PER_TOKEN = 8  # more than English text has: only what is far too long is cut by characters


@dataclass(frozen=True)
class Limits:
    """`max_turns`: tool turns before the last generation, with tools off (4 in the paper). `answer_tokens`: the
    policy's own tokens in one answer, over all its generations. `context`: tokens of prompt and answer together, where
    that should be fewer than the engine holds."""

    max_turns: int = 4
    observation_tokens: int = 256
    tool_seconds: float = 15.0
    answer_tokens: int = 1024
    context: int | None = None


class ToolsTooLong(PromptTooLong):
    """The client's tools don't fit beside the conversation."""


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
        self._token_bytes = TokenBytes(dialect.tokenizer)
        self._fit = partial(dialect.fit, max_tokens=tokens)
        self.toolbox = toolbox.within(Budget(self.limits.tool_seconds, _CHARS_PER_TOKEN * tokens, self._fit))

    @property
    def context(self) -> int:
        """Tokens of prompt and answer together."""
        held = self.engine.context_length
        return held if self.limits.context is None else min(held, self.limits.context)

    def render(
        self,
        messages: Sequence[dict[str, Any]],
        allowed: Collection[str] | None = None,
        terms: Terms = _NO_TERMS,
    ) -> list[int]:
        """The prompt's ids, with the tools that are allowed (None: all) and the client's own.

        Raises PromptTooLong when it leaves no room for an answer, ToolsTooLong when the client's tools are why.
        """
        if terms.schema is not None:
            messages = [*messages, {"role": "system", "content": _as_json(terms.schema)}]
        server = self.toolbox.schemas(allowed)
        room = self.context - _ROOM_FOR_AN_ANSWER
        far_too_long = sum(len(message["content"]) for message in messages) > _CHARS_PER_TOKEN * room
        if far_too_long and (least := self.dialect.at_least(messages)) > room:  # encoding it would take a second
            raise PromptTooLong(
                f"The conversation has {least} tokens or more; the model reads at most {room}. Shorten it or start "
                "anew."
            )
        ids = self.dialect.render(messages, [*server, *terms.tools])
        if len(ids) > room:
            without = len(self.dialect.render(messages, server)) if terms.tools else len(ids)
            if without <= room:
                raise ToolsTooLong(
                    f"The {len(terms.tools)} tools take {len(ids) - without} tokens, and the conversation leaves "
                    f"{room - without} of the {room} that the model reads. Bring fewer tools, or describe them shorter."
                )
            raise PromptTooLong(
                f"The conversation has {len(ids)} tokens; the model reads at most {room}. Shorten it or start anew."
            )
        return ids

    async def answer(
        self,
        messages: Sequence[dict[str, Any]],
        version: str,
        sampling: Sampling | None = None,
        call: CallTool | None = None,
        context: ToolContext = NOBODY,
        allowed: Collection[str] | None = None,
        terms: Terms = _NO_TERMS,
        prompt_ids: list[int] | None = None,
    ) -> AsyncGenerator[Event, None]:
        """Answer the conversation, as events. Closing the generator cancels, and aborts the engine's request.

        `call` replaces the running of tools (training replays results within a group); None runs them for real, for
        the owner and the conversation of `context`. `allowed` are the tools that the prompt lists and the policy may
        use, None for all. `sampling.max_tokens` bounds each generation. `terms`: what else the client asks.
        `prompt_ids`: what `render` has made of the same, where that was done already.
        """
        sampling = sampling or Sampling()
        if allowed is None:
            allowed = self.toolbox.names()  # tools may come and go; an answer keeps to its prompt's
        run = call or partial(self.run_tool, context=context, allowed=allowed)
        if prompt_ids is None:
            prompt_ids = self.render(messages, allowed, terms)
        ids_so_far = list(prompt_ids)
        steps: list[Step] = []
        most = min(self.limits.answer_tokens, terms.own_tokens or self.limits.answer_tokens)
        spent = 0  # own tokens so far
        answer = ""
        stop_reason: StopReason = "no_answer"
        for index in range(self.limits.max_turns + 1):
            last = index == self.limits.max_turns
            began = time.monotonic()
            written = Generation(self.dialect, self._token_bytes, terms)
            drawn = replace(
                sampling,
                seed=None if sampling.seed is None else sampling.seed + index,
                max_tokens=min(sampling.max_tokens, most - spent, self.context - len(ids_so_far)),
            )
            request = GenerateRequest(ids_so_far, version, drawn, self.dialect.stops(last), terms.top_logprobs)
            async with aclosing(self._write(written, request, terms, last)) as shown:
                async for event in shown:
                    yield event
            spent += written.own_tokens
            parsed = written.finish()
            client_call = self._client_call(parsed, terms)
            if isinstance(client_call, ClientCall):
                steps.append(_step(index, parsed, written, version, began))
                yield client_call
                yield StepDone(steps[-1])
                yield Done(Trajectory(prompt_ids, steps, "", "tool_calls", version, client_call))
                return
            if last and parsed.action != "answer":
                parsed = replace(parsed, action="invalid", input="", well_formed=False)  # tools are off: nothing ran
            if parsed.action == "answer" or last or written.cut or written.stopped:
                for event in written.rest(parsed.unshown):
                    yield event
                if written.stopped:
                    parsed = replace(parsed, action="answer", input=written.shown, well_formed=False)
                elif terms.schema is not None and parsed.action == "answer" and not holds(terms.schema, parsed.input):
                    raise GrammarFailed("The answer didn't hold to the JSON schema: make it simpler, and try again.")
                steps.append(_step(index, parsed, written, version, began))
                yield StepDone(steps[-1])
                answered = parsed.action == "answer"
                answer = parsed.input if answered else written.shown
                if not answer and terms.forced is None:
                    answer = terms.until_stop(self.dialect.bare(parsed.text))
                answer = answer.strip()
                stop_reason = "answer" if answered else "length" if written.cut else "no_answer"
                break
            if parsed.action == "invalid":
                told = parsed.problem or self.dialect.invalid([*self.toolbox.schemas(allowed), *terms.tools])
                observation = Observation("invalid", told, error=True)
            elif client_call is not None:
                observation = client_call
            else:
                yield ToolCall(parsed.tool, parsed.tool_input)
                observation = await run(parsed.tool, parsed.tool_input)
                if call is not None:  # a record may have been made under another limit
                    observation = replace(observation, text=self._fit(observation.text))
                yield ToolResult(observation)
            room = self.context - len(ids_so_far) - len(written.ids) - _ROOM_FOR_AN_ANSWER
            no_more = index + 1 == self.limits.max_turns
            observed = self.dialect.encode_observation(observation.text, last=no_more, after=written.ids)
            full = len(observed) > room or spent >= most
            if full:
                observed = []
            steps.append(_step(index, parsed, written, version, began, observation, observed))
            yield StepDone(steps[-1])
            if full:
                answer, stop_reason = self.dialect.bare(parsed.text), "length"
                break
            ids_so_far = ids_so_far + written.ids + observed
        yield Done(Trajectory(prompt_ids, steps, answer, stop_reason, version))

    async def _write(
        self, written: Generation, request: GenerateRequest, terms: Terms, last: bool
    ) -> AsyncGenerator[Thinking | AnswerText, None]:
        """One generation. Where a grammar makes the answer, or a call, the policy is free until it begins to answer."""
        forced = terms.forced
        if forced is not None and (opening := self.dialect.around("answer")[0]):
            request = replace(request, stop=(*request.stop, opening))
        async with aclosing(self.engine.generate(request)) as chunks:  # type: ignore[type-var]
            async for chunk in chunks:
                for event in written.feed(chunk):
                    yield event
                if written.stopped or written.committed:
                    break
        if forced is None or not written.begin_forced(forced[0], last):
            return
        left = request.sampling.max_tokens - len(written.ids)
        if left < 1:
            written.reason = "length"
            return
        request = replace(
            request,
            token_ids=request.token_ids + written.ids,
            sampling=replace(request.sampling, max_tokens=left),
            stop=(),
            json_schema=forced[1],
        )
        async with aclosing(self.engine.generate(request)) as chunks:  # type: ignore[type-var]
            async for chunk in chunks:
                for event in written.feed_forced(chunk):
                    yield event
                if written.stopped:
                    break
        written.end_forced()

    def _client_call(self, parsed: Parsed, terms: Terms) -> ClientCall | Observation | None:
        """The call of a client's tool, or what the policy is told of its arguments; None for anything else."""
        tool = terms.tool(parsed.tool) if parsed.action == "call" else None
        if tool is None:
            return None
        try:
            check_against_schema(tool, json.loads(parsed.tool_input))
        except BadArguments as error:
            return Observation(tool.name, self._fit(str(error)), error=True)
        return ClientCall(tool.name, parsed.tool_input)

    async def roll_out(
        self,
        messages: Sequence[dict[str, Any]],
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


def _as_json(schema: Mapping[str, Any]) -> str:
    told = json.dumps(dict(schema), ensure_ascii=False, separators=(",", ":"))
    return "Write the answer as a JSON object." if schema == ANY_OBJECT else f"Write the answer as JSON of: {told}"


def _step(
    index: int,
    parsed: Parsed,
    written: Generation,
    version: str,
    began: float,
    observation: Observation | None = None,
    observed: Sequence[int] = (),
) -> Step:
    drew = [(name, sum(1 for _ in of)) for name, of in groupby(filter(None, written.versions))]
    return Step(
        index=index,
        token_ids=[*written.ids, *observed],
        logprobs=[*written.logprobs, *(0.0 for _ in observed)],
        mask=[*written.mask, *(0 for _ in observed)],
        version=drew[-1][0] if drew else version,
        drawn_by=tuple(drew) if len(drew) > 1 else (),
        text=parsed.text,
        action=parsed.action,
        input=parsed.input.strip(),
        thought=parsed.thought.strip(),
        observation=observation,
        well_formed=parsed.well_formed,
        seconds=time.monotonic() - began,
        tool_input=parsed.tool_input,
    )
