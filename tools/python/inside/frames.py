"""Messages between the server and an interpreter: a JSON header, and the blobs whose sizes it lists under `blobs`.

4 bytes of the header's length (big-endian), the header, then the blobs one after the other.
"""

import json
import socket
import struct
from collections.abc import Sequence
from typing import Any

LENGTH = struct.Struct(">I")
MAX_HEADER = 256 << 10  # with names of 100 files as long as Linux has them, escaped


def pack(header: dict[str, Any], blobs: Sequence[bytes] = ()) -> list[bytes]:
    """The parts of a message, unjoined: blobs may be large."""
    text = json.dumps({**header, "blobs": [len(blob) for blob in blobs]}).encode()
    return [LENGTH.pack(len(text)), text, *blobs]


def receive(control: socket.socket) -> tuple[dict[str, Any], list[bytes]] | None:
    """The next message of a peer that is trusted, or None at its end. Blocks."""
    size = _read(control, LENGTH.size)
    if size is None:
        return None
    text = _read(control, LENGTH.unpack(size)[0])
    if text is None:
        return None
    header = json.loads(text)
    blobs = []
    for length in header["blobs"]:
        blob = _read(control, length)
        if blob is None:
            return None
        blobs.append(blob)
    return header, blobs


def _read(control: socket.socket, count: int) -> bytes | None:
    data = bytearray(count)
    view = memoryview(data)
    while view:
        got = control.recv_into(view)
        if not got:
            return None
        view = view[got:]
    return bytes(data)
