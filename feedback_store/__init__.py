"""The record of conversations, outcomes, tasks, versions and runs. Open it with `Store.open(path)`."""

from feedback_store.errors import DamagedRecord, InvalidRecord, NotFound, QueueFull, StoreError
from feedback_store.records import (
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
    "Canary",
    "Conversation",
    "DamagedRecord",
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
