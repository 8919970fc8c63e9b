"""The process that asks the endpoint in `make bench-overhead`, so that client and server share no interpreter.

Reads jobs, a JSON object a line, from standard input, and writes what it saw of each: {"tokens", "seconds", "first_s",
"failures"}. It reads the stream by lines and parses only the usage at its end: two cores have no time for a client.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any


async def run(job: dict[str, Any]) -> dict[str, Any]:
    waiting = iter(job["bodies"])
    first_s: list[float] = []
    failures: list[str] = []
    tokens = 0

    async def client() -> None:
        nonlocal tokens
        reader, writer = await asyncio.open_connection(job["host"], job["port"], limit=1 << 22)
        try:
            for body in waiting:
                took, written = await ask(reader, writer, body)
                first_s.append(took)
                tokens += written
        except (RuntimeError, OSError, asyncio.IncompleteReadError, ValueError) as error:
            failures.append(repr(error))
        finally:
            writer.close()

    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(job["at_once"])))
    return {"tokens": tokens, "seconds": time.perf_counter() - began, "first_s": first_s, "failures": failures}


async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, body: dict[str, Any]) -> tuple[float, int]:
    """Seconds to the first text, and the tokens of the answer. Raises RuntimeError where there is none."""
    payload = json.dumps(body).encode()
    began = time.perf_counter()
    writer.write(
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n%b" % (len(payload), payload)
    )
    first, last, head = None, b"", await reader.readuntil(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 200"):
        raise RuntimeError(head.decode())
    while line := await reader.readline():
        if line == b"0\r\n":  # the last piece of a chunked body
            await reader.readline()
            break
        if not line.startswith(b"data: {"):
            continue
        if first is None and b'content":"' in line and b'content":""' not in line:
            first = time.perf_counter() - began
        last = line
    told = json.loads(last.removeprefix(b"data: "))
    if "error" in told:
        raise RuntimeError(told["error"]["message"])
    return first if first is not None else time.perf_counter() - began, told["usage"]["completion_tokens"]


def main() -> None:
    for line in sys.stdin:
        print(json.dumps(asyncio.run(run(json.loads(line)))), flush=True)


if __name__ == "__main__":
    main()
