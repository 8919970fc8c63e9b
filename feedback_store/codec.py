"""Token ids, logprobs and masks as compact little-endian binary; text that every database accepts."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from datetime import datetime
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


def pack_step_ids(ids: Sequence[int]) -> bytes:
    """Unsigned, in the 2 or 3 bytes each that the largest needs; int32 for what they can't hold."""
    whole = pack_ids(ids)  # refuses what is no id
    top = max(ids, default=0)
    if min(ids, default=0) < 0 or top >= 1 << 24:
        return whole
    return struct.pack(f"<{len(ids)}H", *ids) if top < 1 << 16 else b"".join(id.to_bytes(3, "little") for id in ids)


def unpack_step_ids(data: bytes, count: int) -> list[int]:
    """`count` tells the width: what earlier releases wrote, int32, is read too."""
    width = len(data) // count if count else 4
    if width == 3:
        return [int.from_bytes(data[at : at + 3], "little") for at in range(0, len(data), 3)]
    return list(struct.unpack(f"<{count}H", data)) if width == 2 else unpack_ids(data)


def pack_step_mask(mask: Sequence[int]) -> bytes:
    """A bit each, the first the lowest of the first byte; uint8 where there is another number than 0 and 1."""
    whole = pack_mask(mask)
    if any(byte > 1 for byte in whole):
        return whole
    bits = sum(1 << at for at, own in enumerate(whole) if own)
    return bits.to_bytes((len(whole) + 7) // 8, "little")


def unpack_step_mask(data: bytes, count: int) -> list[int]:
    """`count` tells bits from bytes, which earlier releases wrote; a single one is the same in both."""
    if len(data) == count:
        return unpack_mask(data)
    bits = int.from_bytes(data, "little")
    return [bits >> at & 1 for at in range(count)]


def unpack_ids(data: bytes) -> list[int]:
    return list(struct.unpack(f"<{len(data) // 4}i", data))


def unpack_logprobs(data: bytes) -> list[float]:
    return list(struct.unpack(f"<{len(data) // 4}f", data))


def unpack_mask(data: bytes) -> list[int]:
    return list(data)


def check_zone(moment: datetime | None, what: str) -> None:
    """Raises InvalidRecord for a time without a zone, which could mean any of them."""
    if moment is not None and moment.utcoffset() is None:
        raise InvalidRecord(f"{what} has no time zone ({moment:%Y-%m-%dT%H:%M}): give one, such as datetime.UTC.")


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
