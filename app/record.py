"""Opens the record where the settings say. Without the model libraries, so that a look at it is quick."""

from __future__ import annotations

from app.settings import Settings
from feedback_store import Store


def open_store(settings: Settings) -> Store:
    """The record, migrated to this release; made if there is none. Raises StoreError."""
    settings.home.mkdir(parents=True, exist_ok=True)
    url = settings.store_url
    store = Store.open(
        settings.store_path if url is None else url.get_secret_value(),
        max_pending=settings.queue_max,
        connections=settings.store_connections,
    )
    store.training_by_default = settings.training_consent == "training"
    return store
