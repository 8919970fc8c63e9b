"""The record of conversations, outcomes, tasks, versions and runs. Open it with `Store.open(path)`."""

from feedback_store.consent import Consent, Withdrawn
from feedback_store.dead_letter import DeadTask
from feedback_store.erasing import Erased
from feedback_store.errors import DamagedRecord, InvalidRecord, NotFound, QueueFull, RunUnderWay, StoreError
from feedback_store.gold import Policy
from feedback_store.guards import Guards
from feedback_store.in_use import Busy
from feedback_store.records import (
    ApiKey,
    AuditEntry,
    Batch,
    Canary,
    Claim,
    Conversation,
    InService,
    Lineage,
    Message,
    ObservationLike,
    Outcome,
    Quarantine,
    QueuedTask,
    Review,
    Run,
    RunStage,
    RunTask,
    Scope,
    StepLike,
    StoredObservation,
    StoredStep,
    ToolResult,
    Turn,
    Version,
    VersionChange,
)
from feedback_store.store import Store
from feedback_store.taints import Taint
from feedback_store.tool_results import as_stored, result_hash

__all__ = [
    "ApiKey",
    "AuditEntry",
    "Batch",
    "Busy",
    "Canary",
    "Claim",
    "Consent",
    "Conversation",
    "DamagedRecord",
    "DeadTask",
    "Erased",
    "Guards",
    "InService",
    "InvalidRecord",
    "Lineage",
    "Message",
    "NotFound",
    "ObservationLike",
    "Outcome",
    "Policy",
    "Quarantine",
    "QueueFull",
    "QueuedTask",
    "Review",
    "Run",
    "RunStage",
    "RunTask",
    "RunUnderWay",
    "Scope",
    "StepLike",
    "Store",
    "StoreError",
    "StoredObservation",
    "StoredStep",
    "Taint",
    "ToolResult",
    "Turn",
    "Version",
    "VersionChange",
    "Withdrawn",
    "as_stored",
    "result_hash",
]
