"""Opens the record where the settings say. Without the model libraries, so that a look at it is quick."""

from __future__ import annotations

from app.settings import Settings
from feedback_store import Guards, Policy, Store
from feedback_store.gold import SOURCE_TRUST


def open_store(settings: Settings) -> Store:
    """The record, migrated to this release; made if there is none. Raises StoreError."""
    settings.home.mkdir(parents=True, exist_ok=True)
    url = settings.store_url
    store = Store.open(
        settings.store_path if url is None else url.get_secret_value(),
        max_pending=settings.queue_max,
        connections=settings.store_connections,
        policy=policy(settings),
    )
    store.training_by_default = settings.training_consent == "training"
    return store


def policy(settings: Settings) -> Policy:
    """How much whose gold counts."""
    return Policy(
        by_source={**SOURCE_TRUST, **settings.outcome_trust},
        by_owner=settings.owner_trust,
        trusted_owners=frozenset(settings.trusted_owners),
        margin=settings.gold_margin,
        quarantine_rate=settings.quarantine_rate,
    )


def guards(settings: Settings) -> Guards:
    """What a training batch may be made of; the evaluation's questions are the run's to add."""
    return Guards(settings.owner_share, frozenset(settings.trusted_owners))
