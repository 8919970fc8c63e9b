"""What the agent emits while it answers (events), and what is left when it is done (steps, a trajectory)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

ActionKind = Literal["code", "search", "call", "answer", "invalid"]
StopReason = Literal["answer", "no_answer", "length", "cancelled", "tool_calls"]


def calls_a_tool(action: str) -> bool:
    """Whether a step of this action called a tool; an answer and a generation without an action didn't."""
    return action in ("code", "search", "call")


@dataclass(frozen=True)
class Observation:
    """What a tool returned: `text` is what the policy reads, within its budget of tokens; `artifact` is for people."""

    tool: str
    text: str
    error: bool = False
    artifact: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass(frozen=True)
class Step:
    """One generation, and the observation that followed it.

    `token_ids`, `logprobs` and `mask` are parallel: first the policy's own tokens (mask 1), then the observation's
    (mask 0, logprob 0.0). Markup that was put around a text that a grammar made is masked 0 too. `text` is the
    generation's; `action` and `input` are what it closed with: for a "call", the JSON text that names the tool and its
    arguments. `version` drew its own tokens, as the engine told it, the last of them where full weights were changed
    midway: `drawn_by` then has (version, own tokens) in order, and is empty else.
    """

    index: int
    token_ids: list[int]
    logprobs: list[float]
    mask: list[int]
    version: str
    text: str
    action: ActionKind
    input: str
    thought: str = ""
    observation: Observation | None = None
    well_formed: bool = True
    seconds: float = 0.0
    drawn_by: tuple[tuple[str, int], ...] = ()
    tool_input: str = ""  # what the tool was given, where that isn't `input` itself: the arguments of a "call"


@dataclass(frozen=True)
class Trajectory:
    """All steps of one answer. `completion_ids` and its parallels are the steps' joined; nothing is re-tokenised.

    `version` is the one that was asked for; others may have drawn tokens where full weights were changed under it.
    """

    prompt_ids: list[int]
    steps: list[Step]
    answer: str
    stop_reason: StopReason
    version: str
    client_call: ClientCall | None = None  # what a client is to run, where the stop reason is "tool_calls"

    @property
    def completion_ids(self) -> list[int]:
        return [t for step in self.steps for t in step.token_ids]

    @property
    def logprobs(self) -> list[float]:
        return [p for step in self.steps for p in step.logprobs]

    @property
    def mask(self) -> list[int]:
        return [m for step in self.steps for m in step.mask]

    @property
    def drawn_by(self) -> dict[str, int]:
        """Own tokens by the version that drew them, in order."""
        drew: dict[str, int] = {}
        for step in self.steps:
            for version, tokens in step.drawn_by or [(step.version, sum(step.mask))]:
                drew[version] = drew.get(version, 0) + tokens
        return drew or {self.version: 0}

    @property
    def own_tokens(self) -> int:
        return sum(self.mask)

    @property
    def tool_calls(self) -> int:
        return sum(calls_a_tool(step.action) for step in self.steps)

    @property
    def tool_errors(self) -> int:
        """Tool calls that failed; a generation without an action is no call."""
        return sum(bool(s.observation and s.observation.error) for s in self.steps if calls_a_tool(s.action))

    @property
    def well_formed(self) -> bool:
        """The strict format of the paper: only think blocks, actions and whitespace, and it ends in an answer."""
        return self.stop_reason == "answer" and all(step.well_formed for step in self.steps)


# Events, in the order in which they can come:
# (Thinking* ToolCall ToolResult StepDone)* Thinking* (AnswerText* | ClientCall) StepDone Done


@dataclass(frozen=True)
class Thinking:
    """More text of the current think block."""

    text: str


@dataclass(frozen=True)
class ToolCall:
    """An action closed; the tool starts now. `input` is a program, a query, or any other tool's arguments as JSON."""

    tool: str
    input: str


@dataclass(frozen=True)
class ToolResult:
    observation: Observation


@dataclass(frozen=True)
class TokenLogprob:
    """A token's bytes, which may be part of a character, its logprob, and the likeliest tokens in its place."""

    spelling: bytes
    logprob: float
    top: tuple[tuple[bytes, float], ...] = ()


@dataclass(frozen=True)
class AnswerText:
    """More text of the answer, with the tokens that it comes from where the client asked for them."""

    text: str
    tokens: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class ClientCall:
    """The policy calls a tool of the client's, with `arguments` as JSON: the answer ends, the client goes on."""

    tool: str
    arguments: str


@dataclass(frozen=True)
class StepDone:
    """A step is complete: time to write it to the store."""

    step: Step


@dataclass(frozen=True)
class Done:
    trajectory: Trajectory


Event = Thinking | ToolCall | ToolResult | AnswerText | ClientCall | StepDone | Done
