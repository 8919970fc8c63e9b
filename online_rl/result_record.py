"""What the tools of a run gave: a file in the run's folder that says which task saw which result.

JSON lines of two kinds: a result under the hash of its content, once, and a task's call with the hash that it saw. The
hash is the store's, so a result can be found there too. One process writes; a kill loses at most the line in flight.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

from feedback_store import StoredObservation, as_stored, result_hash
from feedback_store.codec import clean
from serving.trajectory import Observation

log = logging.getLogger(__name__)

EVALUATION = "evaluation.results.jsonl"
ROLLOUTS = "rollouts.results.jsonl"
MAX_BYTES = 128 * 2**20


class DamagedResults(RuntimeError):
    """A record of tool results can't be read. The message names the file, the line and the way out."""


class ResultRecord:
    """Results by task, tool and input, in memory and, with a `path`, in that file, which is read first if it is there.

    Without `write` the file must exist, and stays as it is. What would make it larger than `max_bytes` isn't kept:
    who asks again, asks the tool.
    """

    def __init__(self, path: Path | None = None, *, write: bool = True, max_bytes: int = MAX_BYTES) -> None:
        self._results: dict[str, StoredObservation] = {}
        self._seen: dict[tuple[str, str, str], tuple[str, float]] = {}
        self._worked: dict[tuple[str, str], tuple[str, float]] = {}  # by any task, the newest
        self._max_bytes = max_bytes
        self._bytes = 0
        self._left_out = 0
        self._file: int | None = None
        if path is not None and (path.exists() or not write):
            self._read(path)
        if path is not None and write:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
            os.ftruncate(self._file, self._bytes)  # without the line that a kill cut short

    def own(self, task_id: str, tool: str, input: str) -> Observation | None:
        """What this task saw when it made this call last."""
        return self._observation(self._seen.get((task_id, clean(tool), clean(input))))

    def newest(self, tool: str, input: str) -> Observation | None:
        """What any task saw of this call when it last worked: another's failure is no answer."""
        return self._observation(self._worked.get((clean(tool), clean(input))))

    def keep(self, task_id: str, tool: str, input: str, observation: Observation) -> Observation:
        """Record what a task saw. Returns the observation as it will be given again: let the task see that one."""
        result = as_stored(observation)
        name = result_hash(result)
        entry = {"task": task_id, "tool": clean(tool), "input": clean(input), "saw": name, "seconds": result.seconds}
        content = {"result": name, "tool": result.tool, "text": result.text, "error": result.error}
        lines = [] if name in self._results else [content | {"artifact": result.artifact}]
        data = b"".join(json.dumps(line).encode() + b"\n" for line in [*lines, entry])
        if self._bytes + len(data) <= self._max_bytes:
            if self._file is not None:
                self._append(data)
            self._bytes += len(data)
            self._results.setdefault(name, result)
            self._note(entry)
        else:
            self._left_out += 1
            if self._left_out & (self._left_out - 1) == 0:  # at 1, 2, 4, 8 …
                log.warning("%d tool results aren't recorded: the record has %d bytes", self._left_out, self._bytes)
        return Observation(result.tool, result.text, result.error, result.artifact, result.seconds)

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _append(self, data: bytes) -> None:
        assert self._file is not None
        written = os.write(self._file, data)
        if written < len(data):  # the disk is full: nothing after half a line could be read
            os.ftruncate(self._file, self._bytes)
            raise OSError(
                f"only {written} of {len(data)} bytes of a tool result could be written: free some disk space"
            )

    def _observation(self, seen: tuple[str, float] | None) -> Observation | None:
        if seen is None:
            return None
        name, seconds = seen
        result = self._results[name]  # reading and keeping both see to it that it is there
        return Observation(result.tool, result.text, result.error, result.artifact, seconds)

    def _note(self, entry: dict[str, Any]) -> None:
        seen = entry["saw"], float(entry["seconds"])
        self._seen[entry["task"], entry["tool"], entry["input"]] = seen
        if not self._results[entry["saw"]].error:
            self._worked[entry["tool"], entry["input"]] = seen

    def _read(self, path: Path) -> None:
        number = 0
        try:
            with path.open("rb") as file:
                for line in file:
                    number += 1
                    if line.endswith(b"\n"):
                        self._take(line)
                        self._bytes += len(line)
        except FileNotFoundError:
            raise FileNotFoundError(
                f"There is no record of tool results {path}: a run makes it when it evaluates."
            ) from None
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            reason = str(error) if isinstance(error, _Wrong) else f"it isn't a line of this record ({error!r})"
            raise DamagedResults(
                f"{path}, line {number}: {reason}. The file was damaged or edited: restore it, or move it away and the "
                "tools are asked anew."
            ) from error

    def _take(self, line: bytes) -> None:
        entry = json.loads(line)
        if "result" in entry:
            result = as_stored(StoredObservation(entry["tool"], entry["text"], entry["error"], entry["artifact"], 0.0))
            if result_hash(result) != entry["result"]:
                raise _Wrong(f"the result {entry['result']} has other content than was written")
            self._results[entry["result"]] = result
        elif entry["saw"] not in self._results:
            raise _Wrong(f"task {entry['task']} saw the result {entry['saw']}, which isn't in the file")
        else:
            self._note(entry)


class _Wrong(ValueError):
    """A whole line whose content can't be right."""
