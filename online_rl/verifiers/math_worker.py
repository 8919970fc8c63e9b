"""Runs math-verify in a process of its own: one JSON request a line on stdin, one JSON answer a line on stdout.

Symbolic algebra has inputs that never end and inputs that eat all memory. Here both can be cut off: by the library's
own alarms, which need a main thread, by a limit on memory, and at last by whoever kills this process.
"""

from __future__ import annotations

import json
import resource
import sys

MEMORY_BYTES = 2 * 1024**3
SECONDS = 3  # for each of: reading the gold, reading the answer, comparing them


def main() -> None:
    from math_verify import parse, verify

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            gold, answer = (parse(f"${request[key]}$", parsing_timeout=SECONDS) for key in ("gold", "answer"))
            reply: dict[str, object] = {
                "gold_read": bool(gold),
                "answer_read": bool(answer),
                "equal": bool(gold and answer and verify(gold, answer, timeout_seconds=SECONDS)),
            }
        except (Exception, MemoryError) as error:
            reply = {"error": f"{type(error).__name__}: {str(error)[:200]}"}
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    main()
