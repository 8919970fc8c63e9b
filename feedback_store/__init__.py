"""The record of conversations, outcomes, tasks, versions and runs. Open it with `Store.open(path)`."""

from feedback_store.errors import DamagedRecord, InvalidRecord, NotFound, QueueFull, StoreError
from feedback_store.records import (
    ApiKey,
    Conversation,
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
from feedback_store.store import Store
from feedback_store.tool_results import as_stored, result_hash

__all__ = [
    "ApiKey",
    "Conversation",
    "DamagedRecord",
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
    "ToolResult",
    "Turn",
    "Version",
    "VersionChange",
    "as_stored",
    "result_hash",
]
