"""Ids that sort by the time at which they were made: a prefix, 48 bits of milliseconds, 40 random bits. And an owner's
hash, which outlives their name."""

from __future__ import annotations

import hashlib
import secrets
import threading
import time

from feedback_store.codec import clean

_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"  # Crockford's base 32: no i, l, o, u, and in ASCII order
_RANDOM_BITS = 40

_lock = threading.Lock()
_last = 0


def new_id(prefix: str) -> str:
    """For example `turn_01jd8v0s3kx7q2m4np`. Within a process each id is greater than the one before it."""
    global _last
    with _lock:
        # Within one millisecond, or after the clock was set back, count on from the last id.
        _last = max((time.time_ns() // 1_000_000 << _RANDOM_BITS) | secrets.randbits(_RANDOM_BITS), _last + 1)
        number = _last
    digits = ""
    for _ in range(18):  # 88 bits, five at a time
        digits = _ALPHABET[number & 31] + digits
        number >>= 5
    return f"{prefix}_{digits}"


def owner_hash(owner: str) -> str:
    """What an owner is known by once their name is forgotten: 64 hex digits."""
    return hashlib.sha256(clean(owner).encode()).hexdigest()
