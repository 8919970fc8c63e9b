"""The record of conversations, outcomes, tasks, versions and runs. Open it with `Store.open(path)`."""

from feedback_store.consent import Consent, Withdrawn
from feedback_store.erasing import Busy, Erased
from feedback_store.errors import DamagedRecord, InvalidRecord, NotFound, QueueFull, StoreError
from feedback_store.records import (
    ApiKey,
    Canary,
    Conversation,
    InService,
    Lineage,
    Message,
    ObservationLike,
    Outcome,
    QueuedTask,
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
from feedback_store.search import Found
from feedback_store.store import Store
from feedback_store.taints import Taint
from feedback_store.tool_results import as_stored, result_hash

__all__ = [
    "ApiKey",
    "Busy",
    "Canary",
    "Consent",
    "Conversation",
    "DamagedRecord",
    "Erased",
    "Found",
    "InService",
    "InvalidRecord",
    "Lineage",
    "Message",
    "NotFound",
    "ObservationLike",
    "Outcome",
    "QueueFull",
    "QueuedTask",
    "Run",
    "RunStage",
    "RunTask",
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
