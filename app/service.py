"""The one path from a question to a recorded answer, which the endpoint, the chat and the command line share.

A turn is written before its first token, each step as it ends, and the verdict after the last one; a client that goes
away or an engine that dies still leaves a closed turn behind.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, Callable, Collection, Iterator, Mapping
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, TypeVar

import anyio

from app.metrics import Metrics
from app.tracing import Tracing, Untraced
from app.unclosed import Unclosed
from feedback_store import Conversation, NotFound, Outcome, Store, StoreError
from feedback_store.records import FinalStatus, Turn
from online_rl import verifiers
from serving.engines.base import EngineError, PromptTooLong, Sampling
from serving.prompts import PromptRenderer
from serving.terms import Terms
from serving.trajectory import AnswerText, Done, Event, StepDone, StopReason, Trajectory, calls_a_tool
from tools.context import ToolContext

if TYPE_CHECKING:
    from serving.agent import Agent
    from serving.engines.base import Engine
    from serving.versions import VersionRouter
    from tools.workspace import Workspaces

P = ParamSpec("P")
T = TypeVar("T")
Message = dict[str, Any]

_STATUS: dict[StopReason, FinalStatus] = {
    "answer": "done",
    "no_answer": "no_answer",
    "length": "length",
    "cancelled": "cancelled",
    "tool_calls": "tool_calls",
}


def new_request_id() -> str:
    return uuid.uuid4().hex


class Overloaded(RuntimeError):
    """As many answers are in flight as may be. The message says so; the same request can be sent again later."""


class ToolClash(ValueError):
    """A client's tool has the name of one that runs here."""


@dataclass(frozen=True)
class Question:
    """What is asked. `messages`: OpenAI's chat shape, text only, the whole context, ending with the user's or with
    what a tool of the client's returned. `terms`: what else the client asks. `server_tools`: False for none of ours.

    `version`: a published version's id, which this answer alone is written with, or None for the one that the
    conversation stays on or, new, begins with. `verifier` and `gold` come together: the answer is
    then judged as soon as it is there; from `gold_expires_at` on the gold trains nothing. `conversation_id`: the
    conversation that the turn belongs to, or a new one.
    """

    owner: str
    messages: list[Message]
    sampling: Sampling
    conversation_id: str | None = None
    version: str | None = None
    verifier: str | None = None
    gold: str | None = None
    gold_expires_at: datetime | None = None
    terms: Terms = field(default_factory=Terms)
    server_tools: bool = True
    response: Mapping[str, Any] | None = None  # kept with the turn: see `app.api.responses`
    request_id: str = field(default_factory=new_request_id)


@dataclass(frozen=True)
class Started:
    """The turn is in the store; tokens follow."""

    turn_id: str
    conversation_id: str
    version: str
    prompt_tokens: int


@dataclass(frozen=True)
class Finished:
    """The turn is closed in the store, and judged if the question named a verifier."""

    started: Started
    trajectory: Trajectory
    outcome: Outcome | None


ServiceEvent = Started | Event | Finished


class Service:
    """Answers questions with the version in service and records everything. One per process, used from one loop."""

    def __init__(
        self,
        store: Store,
        router: VersionRouter,
        agent: Agent,
        engine: Engine,
        max_answers: int = 64,
        workspaces: Workspaces | None = None,
        key_tools: Mapping[str, Collection[str]] | None = None,
        tracing: Tracing | Untraced | None = None,
        unclosed: Unclosed | None = None,
    ) -> None:
        """`key_tools`: the tools that an owner's answers may use; an owner who isn't named has all of them.
        `unclosed`: closes turns; whoever gives it calls its `retry` now and again."""
        self._key_tools = dict(key_tools or {})
        self.workspaces = workspaces
        self.store = store
        self.router = router
        self.engine = engine
        self._agent = agent
        self._prompts = PromptRenderer(agent)
        self._max_answers = max_answers
        self.metrics = Metrics()
        self.tracing = tracing or Untraced()
        self.unclosed = unclosed if unclosed is not None else Unclosed(store)
        self._in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def in_flight(self) -> int:
        """Answers under way."""
        return self._in_flight

    async def answer(self, question: Question) -> AsyncGenerator[ServiceEvent]:
        """`Started`, the agent's events but `Done`, then `Finished`. Closing the generator cancels the answer.

        Raises Overloaded, UnknownVerifier, BadGold, ToolClash, PromptTooLong, UnknownVersion, NotFound (the
        conversation) before `Started`; EngineError and StoreError at any time, once the turn is closed as `error`. One
        that the store can't close then is closed when it can: see `unclosed`.
        """
        if question.verifier is not None:
            await self.call(verifiers.check_gold, question.verifier, question.gold or "")
        async with _ShieldedExitStack() as stack:
            trace = stack.enter_context(self.tracing.answer(question))
            stack.enter_context(self._place())
            allowed = self._agent.toolbox.names(self._key_tools.get(question.owner) if question.server_tools else ())
            if clash := set(allowed) & {tool.name for tool in question.terms.tools}:
                raise ToolClash(
                    f"{min(clash)!r} is a tool of the server's own: give yours another name, or turn the server's off "
                    'with metadata {"server_tools": "none"}.'
                )
            watch = stack.enter_context(self.metrics.answer(allowed))
            prompt_ids = await self._prompts.render(question.messages, allowed, question.terms)
            lease = self.router.lease(question.version, question.owner, question.conversation_id)
            version = await stack.enter_async_context(lease)
            started = await self._begin(question, version, prompt_ids)
            recording = _Recording(self.unclosed, started.turn_id)
            stack.push_async_exit(recording.close)
            context = ToolContext(question.owner, started.conversation_id, started.turn_id)
            events = self._agent.answer(
                question.messages, version, question.sampling, None, context, allowed, question.terms, prompt_ids
            )
            stack.push_async_callback(events.aclose)
            watch.started(version, started.prompt_tokens)
            trace.started(started)
            yield started
            trace.go_on()
            async for event in events:
                watch.see(event)
                trace.see(event)
                if isinstance(event, Done):
                    recording.trajectory = event.trajectory
                    break
                if isinstance(event, AnswerText):
                    recording.text += event.text
                elif isinstance(event, StepDone):
                    await self.call(self.store.append_step, started.turn_id, event.step)
                    if event.step.observation is not None:
                        trace.go_on()
                yield event
            else:
                raise EngineError(f"the answer of version {version} ended without a last event: this is a bug.")
            with anyio.CancelScope(shield=True):  # the client may leave with the last token; the verdict stays
                trajectory = await recording.finish()
                outcome = await self._verify(question, started, trajectory)
            yield Finished(started, trajectory, outcome)

    async def feedback(
        self,
        turn_id: str,
        owner: str,
        source: Literal["client", "person"],
        score: float | None = None,
        verifier: str | None = None,
        gold: str | None = None,
        reason: str = "",
        expires_at: datetime | None = None,
    ) -> Outcome:
        """A verdict on a finished turn: a score in [0, 1], or a verifier and the right answer, which then score it.
        From `expires_at` on that answer trains nothing.

        Raises NotFound for a turn that doesn't exist or is another owner's, UnknownVerifier, BadGold, StoreError.
        """

        def judge() -> Outcome:
            turn = self.store.turn(turn_id)
            if self.store.conversation(turn.conversation_id).owner != owner:
                raise NotFound("turn", turn_id)
            no_task = self._no_task(turn)
            value, why, key = score, reason, None
            if verifier is not None and gold is not None:
                verifiers.check_gold(verifier, gold)
                calls = sum(calls_a_tool(step.action) for step in turn.steps)
                judged = verifiers.get(verifier).score(gold, turn.answer, tool_calls=calls)
                value, why, key = judged.value, reason or judged.reason, verifiers.gold_key(verifier, gold)
            return self.store.add_outcome(
                turn_id, source, value, verifier or "", gold or "", why, owner, no_task, key, expires_at
            )

        return await self.call(judge)

    def own_conversation(self, conversation_id: str, owner: str) -> Conversation:
        """Blocks. Raises NotFound for another owner's too: nobody may tell it apart from none."""
        found = self.store.conversation(conversation_id)
        if found.owner != owner:
            raise NotFound("conversation", conversation_id)
        return found

    async def health(self) -> tuple[bool, dict[str, object]]:
        """Whether answers can be given and recorded, and a report with a line for each part."""
        report: dict[str, object] = {"version": None, "answers_in_flight": self._in_flight}
        healthy = True
        try:
            report["engine"] = engine = await self.engine.health()
            report["version"] = self.router.current
            healthy = engine.get("ok") is True
        except EngineError as error:
            healthy, report["engine"] = False, {"error": str(error)}
        try:
            report["store"] = {"queue": await self.call(self.store.queue_stats)}
        except StoreError as error:
            healthy, report["store"] = False, {"error": str(error)}
        return healthy, {"status": "ok" if healthy else "unhealthy"} | report

    async def fit(self, messages: list[Message], room: int) -> list[Message]:
        """`messages` without as many of the oldest exchanges as it takes to leave `room` tokens for the answer.

        The last message always stays; if it is too long by itself, `answer` says so.
        """
        limit = self.engine.context_length - room
        fitted = list(messages)
        while len(fitted) > 1:
            try:
                if len(await self._prompts.render(fitted)) <= limit:
                    break
            except PromptTooLong:
                pass  # the same answer, given earlier
            del fitted[: 2 if fitted[0]["role"] == "user" else 1]
        return fitted

    async def call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """A blocking function, off the event loop."""
        return await asyncio.to_thread(function, *args, **kwargs)

    async def drain(self, seconds: float) -> int:
        """Wait for the answers in flight to end; returns how many are left."""
        with anyio.move_on_after(seconds):
            await self._idle.wait()
        return self._in_flight

    @contextmanager
    def _place(self) -> Iterator[None]:
        if self._in_flight >= self._max_answers:
            raise Overloaded(f"{self._in_flight} answers are in flight, which is the limit: try again in a moment.")
        self._in_flight += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._in_flight -= 1
            if not self._in_flight:
                self._idle.set()

    async def _begin(self, question: Question, version: str, prompt_ids: list[int]) -> Started:
        asked: dict[str, Any] = {}
        if question.terms.tools:
            asked["tools"] = [tool.name for tool in question.terms.tools]
        if question.response is not None:
            asked["response"] = dict(question.response)

        def begin() -> tuple[str, str]:
            conversation_id = question.conversation_id
            if conversation_id is None:
                conversation_id = self.store.create_conversation(question.owner)
            else:
                self.own_conversation(conversation_id, question.owner)
            turn_id = self.store.begin_turn(
                conversation_id,
                question.messages,
                version,
                prompt_ids,
                question.request_id,
                stays=question.version is None,
                asked=asked,
            )
            return conversation_id, turn_id

        conversation_id, turn_id = await self.call(begin)
        return Started(turn_id, conversation_id, version, len(prompt_ids))

    def _no_task(self, turn: Turn) -> str:
        """Why this question can't be practised, if it can't."""
        files = self.workspaces.files(turn.conversation_id) if self.workspaces is not None else []
        if any(file.modified_at < turn.created_at for file in files):
            return "the question came with files, which training doesn't have."
        if turn.asked.get("tools") or any(message["role"] == "tool" for message in turn.messages):
            return "the question rests on the client's own tools, which training doesn't have."
        return ""

    async def _verify(self, question: Question, started: Started, trajectory: Trajectory) -> Outcome | None:
        if question.verifier is None or question.gold is None or trajectory.stop_reason == "tool_calls":
            return None  # a call of the client's tool is no answer yet
        name, gold = question.verifier, question.gold

        def verify() -> Outcome:
            answer = trajectory.answer if trajectory.stop_reason == "answer" else ""  # what was cut off is no answer
            judged = verifiers.get(name).score(gold, answer, tool_calls=trajectory.tool_calls)
            no_task = self._no_task(self.store.turn(started.turn_id))
            return self.store.add_outcome(
                started.turn_id,
                "verifier",
                judged.value,
                name,
                gold,
                judged.reason,
                question.owner,
                no_task,
                verifiers.gold_key(name, gold),
                question.gold_expires_at,
            )

        return await self.call(verify)


class _ShieldedExitStack(AsyncExitStack):
    """Its clean-up runs to the end even inside a request that has been cancelled."""

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> bool | None:
        with anyio.CancelScope(shield=True):
            swallowed = await super().__aexit__(kind, error, trace)
        return swallowed


class _Recording:
    """Closes a turn exactly once: as done after the last event, else as cancelled or as an error."""

    def __init__(self, turns: Unclosed, turn_id: str) -> None:
        self._turns = turns
        self._turn_id = turn_id
        self._closed = False
        self.text = ""  # what has been streamed of the answer
        self.trajectory: Trajectory | None = None

    async def finish(self) -> Trajectory:
        assert self.trajectory is not None, "finish comes after the agent's last event"
        await self._write(self.trajectory.answer, _STATUS[self.trajectory.stop_reason])
        return self.trajectory

    async def close(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if self._closed:
            return
        if isinstance(error, Exception):
            await self._write(self.text, "error", f"{type(error).__name__}: {error}")
        else:  # the generator was closed, or its task cancelled
            await self._write(self.text, "cancelled")

    async def _write(self, answer: str, status: FinalStatus, error: str = "") -> None:
        self._closed = True
        await asyncio.to_thread(self._turns.finish, self._turn_id, answer, status, error)
