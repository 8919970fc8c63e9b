"""The record of conversations, outcomes, tasks, versions and runs. Open it with `Store.open(path)`."""

from feedback_store.errors import InvalidRecord, NotFound, QueueFull, StoreError
from feedback_store.records import (
    Conversation,
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
    Turn,
    Version,
    VersionChange,
)
from feedback_store.store import Store

__all__ = [
    "Conversation",
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
    "Turn",
    "Version",
    "VersionChange",
]
