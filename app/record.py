"""Opens the record where the settings say. Without the model libraries, so that a look at it is quick."""

from __future__ import annotations

from app.settings import Settings
from feedback_store import Store


def open_store(settings: Settings) -> Store:
    """The record, migrated to this release; made if there is none. Raises StoreError."""
    settings.home.mkdir(parents=True, exist_ok=True)
    store = Store.open(settings.store_path, max_pending=settings.queue_max)
    store.training_by_default = settings.training_consent == "training"
    return store
