"""What one program prints, kept within bounds whatever it prints."""

from __future__ import annotations


class Output:
    """The beginning and the end of more than `limit` bytes. Past `flood` bytes, a program is to be stopped."""

    def __init__(self, limit: int, flood: int) -> None:
        self._tail_bytes = limit // 4
        self._head_bytes = limit - self._tail_bytes
        self._flood = flood
        self._head = bytearray()
        self._tail = bytearray()
        self._total = 0

    def add(self, chunk: bytes | bytearray) -> None:
        self._total += len(chunk)
        room = self._head_bytes - len(self._head)
        self._head += chunk[:room]
        self._tail += chunk[room:]
        if len(self._tail) > self._tail_bytes:
            del self._tail[: -self._tail_bytes or None]

    @property
    def truncated(self) -> bool:
        return self._total > self._head_bytes + self._tail_bytes

    @property
    def flooded(self) -> bool:
        return self._total > self._flood

    @property
    def text(self) -> str:
        left_out = self._total - len(self._head) - len(self._tail)
        mark = f"\n[... {left_out} bytes left out ...]\n".encode() if left_out else b""
        return bytes(self._head + mark + self._tail).decode("utf-8", "replace")
