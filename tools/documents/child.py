"""The child of process.py: `python -m tools.documents.child` reads documents from stdin and answers on stdout.

A request is a header (4 bytes of length, JSON with media_type, charset,
bytes, seconds) and the document; an answer is JSON after 4 bytes of length. It ends with its input.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import struct
import sys
from typing import Any, BinaryIO

from tools.documents.formats import read
from tools.documents.reading import Unreadable

MEMORY_BYTES = 2 << 30
_LENGTH = struct.Struct("!I")


def main() -> None:
    requests = sys.stdin.buffer
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints mustn't be taken for an answer
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    while length := requests.read(_LENGTH.size):
        header = json.loads(requests.read(_LENGTH.unpack(length)[0]))
        data = requests.read(header["bytes"])
        signal.setitimer(signal.ITIMER_REAL, 2 * header["seconds"])  # fatal, if the parent is no longer there to kill
        _answer(answers, header, data)
        signal.setitimer(signal.ITIMER_REAL, 0)


def _answer(answers: BinaryIO, header: dict[str, Any], data: bytes) -> None:
    answer: dict[str, Any]
    try:
        reading = read(data, header["media_type"], header["charset"])
        sections = [(section.text, section.heading, section.anchor) for section in reading.sections]
        answer = {"title": reading.title, "sections": sections, "cut": reading.cut}
        packed = json.dumps(answer).encode()
    except Unreadable as error:
        packed = json.dumps({"error": str(error)}).encode()
    except MemoryError:
        packed = json.dumps({"error": "takes more than 2 GB of memory to read", "fatal": True}).encode()
    except Exception as error:  # a library's fault costs this document, not the ones after it
        packed = json.dumps({"error": f"can't be read ({type(error).__name__}: {str(error)[:100]})"}).encode()
    answers.write(_LENGTH.pack(len(packed)) + packed)
    answers.flush()


if __name__ == "__main__":
    main()
