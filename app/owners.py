"""Whose a conversation is: the name that the record knows an API key by."""

from __future__ import annotations

LOCAL_OWNER = "local"  # where no key is needed


def owner_of(key: bytes) -> str:
    """The owner's name in the record: it tells keys apart and doesn't give them away."""
    from feedback_store.keys import key_hash, owner_of_hash  # a command starts without the store's library

    return owner_of_hash(key_hash(key))
