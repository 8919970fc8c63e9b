"""Token ids, logprobs and masks as compact little-endian binary; text that every database accepts."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from typing import Any

from feedback_store.errors import InvalidRecord


def _pack(code: str, name: str, values: Sequence[float]) -> bytes:
    try:
        return struct.pack(f"<{len(values)}{code}", *values)
    except (struct.error, OverflowError) as error:
        raise InvalidRecord(f"{name} can't be stored: {error}. Give plain numbers within its range.") from error


def pack_ids(ids: Sequence[int]) -> bytes:
    """int32, 4 bytes each."""
    return _pack("i", "A list of token ids", ids)


def pack_logprobs(logprobs: Sequence[float]) -> bytes:
    """float32, 4 bytes each: what engines compute in; a float64 is rounded."""
    return _pack("f", "A list of logprobs", logprobs)


def pack_mask(mask: Sequence[int]) -> bytes:
    """uint8, one byte each."""
    return _pack("B", "A mask", mask)


def unpack_ids(data: bytes) -> list[int]:
    return list(struct.unpack(f"<{len(data) // 4}i", data))


def unpack_logprobs(data: bytes) -> list[float]:
    return list(struct.unpack(f"<{len(data) // 4}f", data))


def unpack_mask(data: bytes) -> list[int]:
    return list(data)


def clean(text: str) -> str:
    """`text` with what UTF-8 or PostgreSQL can't hold (lone surrogates, NUL) as U+FFFD, so that no record is lost."""
    try:
        text.encode()
    except UnicodeEncodeError:
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text.replace("\0", "\ufffd")


def to_json(value: Any) -> str:
    """JSON that people can read in the file; what JSON has no word for (a path, a date, NaN) becomes its `str`."""
    try:
        written = json.dumps(value, ensure_ascii=False, default=str, allow_nan=False)
    except ValueError:  # NaN or infinity: PostgreSQL takes none, and other readers of JSON don't either
        plain = json.loads(json.dumps(value, default=str), parse_constant=str)
        written = json.dumps(plain, ensure_ascii=False)
    return clean(written)
