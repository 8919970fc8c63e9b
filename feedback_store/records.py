"""What the store takes and gives: plain frozen records, and the shape of a step that it accepts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal, Protocol, TypedDict

RIGHT = 0.9
"""A score above this counts as right: `acc` in the paper's code (arXiv 2510.07038)."""
Message = dict[str, Any]
TurnStatus = Literal["running", "done", "no_answer", "length", "cancelled", "tool_calls", "error", "interrupted"]
FinalStatus = Literal["done", "no_answer", "length", "cancelled", "tool_calls", "error"]
OutcomeSource = Literal["verifier", "client", "person", "judge"]
TaskState = Literal["pending", "claimed", "done", "dead", "withdrawn", "review", "rejected", "expired"]
Became = Literal["", "queued", "known", "reopened", "review", "rejected", "quarantined", "done", "dead", "expired"]
ClaimState = Literal["claimed", "completed", "released", "expired"]
VersionStatus = Literal["candidate", "published", "refused"]
RunStatus = Literal["running", "promoted", "refused", "ended", "failed"]
FinalRunStatus = Literal["promoted", "refused", "ended", "failed"]
Scope = Literal["chat", "feedback", "admin", "metrics"]


class ObservationLike(Protocol):
    """What a tool returned, as `serving.trajectory.Observation` has it."""

    @property
    def tool(self) -> str: ...
    @property
    def text(self) -> str: ...
    @property
    def error(self) -> bool: ...
    @property
    def artifact(self) -> Mapping[str, Any]: ...
    @property
    def seconds(self) -> float: ...


class StepLike(Protocol):
    """One generation and its observation, as `serving.trajectory.Step` has it; the three lists are parallel.

    It may have a `tool_input` too: what the tool was given, where that isn't `input` itself; and a `drawn_by`:
    (version, own tokens) in order, where several versions drew them.
    """

    @property
    def index(self) -> int: ...
    @property
    def token_ids(self) -> Sequence[int]: ...
    @property
    def logprobs(self) -> Sequence[float]: ...
    @property
    def mask(self) -> Sequence[int]: ...
    @property
    def version(self) -> str: ...
    @property
    def text(self) -> str: ...
    @property
    def thought(self) -> str: ...
    @property
    def action(self) -> str: ...
    @property
    def input(self) -> str: ...
    @property
    def observation(self) -> ObservationLike | None: ...
    @property
    def well_formed(self) -> bool: ...
    @property
    def seconds(self) -> float: ...


@dataclass(frozen=True)
class StoredObservation:
    tool: str
    text: str
    error: bool
    artifact: dict[str, Any]
    seconds: float


@dataclass(frozen=True)
class ToolResult:
    """One call of a conversation: the step that made it, what it asked, and what it saw.

    `hash` names the content of `observation` without its seconds: equal results have one hash.
    """

    turn_id: str
    index: int
    input: str
    hash: str
    observation: StoredObservation
    at: datetime


@dataclass(frozen=True)
class StoredStep:
    """A step as it was appended; logprobs are float32 values."""

    index: int
    token_ids: list[int]
    logprobs: list[float]
    mask: list[int]
    version: str
    text: str
    thought: str
    action: str
    input: str
    observation: StoredObservation | None
    well_formed: bool
    seconds: float
    drawn_by: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class Conversation:
    id: str
    owner: str
    title: str
    turns: int
    created_at: datetime
    updated_at: datetime


@dataclass(frozen=True)
class Turn:
    """A user's message and its answer. `messages` is the whole prompt; `steps` is empty in lists of turns.

    `asked`: what the client asked beside the messages, as far as it must be known again: the names of its own `tools`,
    and the `response` of the Responses API that the turn is, where it is one.
    """

    id: str
    conversation_id: str
    request_id: str
    messages: list[Message]
    prompt_ids: list[int]
    version: str
    status: TurnStatus
    answer: str
    error: str
    created_at: datetime
    finished_at: datetime | None
    steps: list[StoredStep] = field(default_factory=list)
    asked: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ApiKey:
    """`owner` is what conversations and tasks name; `hash` the SHA-256 of the key in hex. A limit of None is the
    settings'; `last_used_at` is up to a minute old."""

    owner: str
    hash: str
    name: str
    scopes: tuple[Scope, ...]
    requests_per_minute: int | None
    answers_at_once: int | None
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None
    last_used_at: datetime | None


@dataclass(frozen=True)
class Outcome:
    """A verdict on a turn. `became`: what became of its gold, "" where no task came of it; `note` says so in words.

    `trust`, in [0, 1]: what its gold weighs against others. `expires_at`: when the gold may have changed.
    """

    id: str
    turn_id: str
    source: OutcomeSource
    score: float | None
    verifier: str
    gold: str
    reason: str
    owner: str
    task_id: str | None
    note: str
    created_at: datetime
    trust: float = 1.0
    became: Became = ""
    expires_at: datetime | None = None


@dataclass(frozen=True)
class QueuedTask:
    """`attempts` counts failed ones; `reason`: why it rests. The first 16 digits of `content_hash` are
    `online_rl.tasks.base.Task.id`."""

    id: str
    content_hash: str
    messages: list[Message]
    verifier: str
    gold: str
    kind: str
    source: str
    owner: str
    state: TaskState
    attempts: int
    run_id: str | None
    lease_until: datetime | None
    created_at: datetime
    reason: str = ""
    expires_at: datetime | None = None


@dataclass(frozen=True)
class Claim:
    """What one gold of a question has for it. `owners`: who gave it, by trust; quarantined ones count for nothing."""

    gold: str
    trust: float
    owners: dict[str, float]
    task_ids: list[str]
    states: list[str]


@dataclass(frozen=True)
class Review:
    """A question whose gold a person must decide, or has. `id` is the start of its hash. `basis`: how the gold is
    known: "" (it isn't), trusted, consensus, review, known (by golds that were erased by age)."""

    id: str
    messages: list[Message]
    verifiers: list[str]
    golds: list[Claim]
    reason: str
    basis: str
    decided_by: str
    decision: str | None
    at: datetime


@dataclass(frozen=True)
class Quarantine:
    """An owner whose golds don't count, or (not `active`) who was let go `at` that time. One who was forgotten is
    named by `ids.owner_hash`."""

    owner: str
    active: bool
    who: str
    reason: str
    at: datetime


@dataclass(frozen=True)
class AuditEntry:
    id: int
    at: datetime
    who: str
    action: str
    subject: str
    detail: dict[str, Any]


@dataclass(frozen=True)
class Batch:
    """What a guarded claim took, and what it left in the queue, by the reason."""

    tasks: list[QueuedTask]
    left: dict[str, list[str]]


@dataclass(frozen=True)
class Version:
    id: str
    parent: str | None
    run_id: str | None
    path: str
    manifest: dict[str, Any]
    status: VersionStatus
    created_at: datetime


@dataclass(frozen=True)
class VersionChange:
    """One change of the version in service."""

    version_id: str
    previous: str | None
    reason: str
    at: datetime


@dataclass(frozen=True)
class Canary:
    """A version that `share` of the new conversations begin on, 0 to 1."""

    version: str
    share: float


@dataclass(frozen=True)
class InService:
    """What an answer may be written with: `kept` is the version that its conversation stays on, if it does."""

    current: str | None
    canary: Canary | None
    kept: str | None


@dataclass(frozen=True)
class RunStage:
    stage: str
    detail: dict[str, Any]
    at: datetime


@dataclass(frozen=True)
class Run:
    """`alive`: whether the process that wrote last still runs; None when finished or when it can't be told."""

    id: str
    recipe: str
    status: RunStatus
    stage: str
    detail: dict[str, Any]
    report: dict[str, Any]
    alive: bool | None
    started_at: datetime
    finished_at: datetime | None
    stages: list[RunStage] = field(default_factory=list)


@dataclass(frozen=True)
class RunTask:
    """One claim of one task by a run."""

    task_id: str
    state: ClaimState
    claimed_at: datetime
    ended_at: datetime | None


class Lineage(TypedDict):
    """Where a version comes from; all empty for one that no run of this store made."""

    version: str
    parent: str | None
    run: str | None
    task_ids: list[str]
    conversation_ids: list[str]
