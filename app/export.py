"""The record as files: for TRL, for OpenAI's fine-tuning, or whole; in constant memory, and never half a file."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

if TYPE_CHECKING:
    import pyarrow as pa

    from feedback_store import Store
    from feedback_store.selection import Answered, Practised, Selection
    from online_rl.redaction import Redact

Format = Literal["openai", "trl-sft", "trl-grpo", "trl-preference", "raw"]
Row = dict[str, Any]
_HELD = {"review": "its gold waits for review", "rejected": "its gold was rejected", "expired": "its gold has expired"}


class ExportFailed(RuntimeError):
    """No file was made. The message says why and what to do."""


@dataclass
class Exported:
    """`rows` in `file`, which isn't written where there are none; `left_out` counts what was read and left out, by
    reason."""

    file: Path
    rows: int = 0
    left_out: dict[str, int] = field(default_factory=dict)

    def leave_out(self, reason: str) -> None:
        self.left_out[reason] = self.left_out.get(reason, 0) + 1


def export(
    store: Store,
    file: Path,
    format: Format,
    selection: Selection,
    *,
    redact: Redact | None = None,
    tokens: bool = False,
    force: bool = False,
    progress: Callable[[int], None] = lambda _: None,
) -> Exported:
    """Write the selected turns to `file`, JSON lines or Parquet by its ending. Blocks.

    `openai`: messages with the answer as the last. `trl-sft`: prompt and completion. `trl-grpo`: prompt, verifier, gold
    of the tasks that came of the turns. `trl-preference`: prompt, chosen, rejected, where the same task was answered
    right and wrong. `raw`: a line for each turn with its steps and verdicts; `tokens` adds their ids, logprobs, masks.

    `redact` changes every text, and leaves out what that would spoil. `progress` hears how many turns or tasks were
    read. Without a row no file is written: readers can't tell what an empty one holds. Raises ExportFailed, and
    StoreError; nothing is left behind then.
    """
    if format not in get_args(Format):
        raise ExportFailed(f"{format!r} is no format: choose from {', '.join(get_args(Format))}.")
    if file.suffix not in (".jsonl", ".parquet"):
        raise ExportFailed(f"{file}: the name must end in .jsonl or .parquet, which says what is written.")
    if file.exists() and not force:
        raise ExportFailed(f"{file} is there already: give another name, or --force to replace it.")
    if redact is not None and format == "raw":
        raise ExportFailed("A raw export is the record as it is: redaction goes with the other formats.")
    done = Exported(file)
    draft = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with draft.open("xb") as out:
            writer = _Parquet(out, format, tokens) if file.suffix == ".parquet" else _JsonLines(out)
            for row in _rows(store, format, selection, redact, tokens, done, progress):
                writer.write(row)
                done.rows += 1
            writer.close()
            out.flush()
            os.fsync(out.fileno())
        if done.rows:
            os.replace(draft, file)
    except OSError as error:
        why = error.strerror or str(error)
        raise ExportFailed(f"{file} can't be written: {why}. Free some space, or choose another place.") from error
    finally:
        with suppress(OSError):
            draft.unlink()
    return done


def _rows(
    store: Store,
    format: Format,
    selection: Selection,
    redact: Redact | None,
    tokens: bool,
    done: Exported,
    progress: Callable[[int], None],
) -> Iterator[Row]:
    read = 0
    if format in ("trl-grpo", "trl-preference"):
        make = _prompt if format == "trl-grpo" else _preference
        for tasks in store.practised(selection):
            for task in tasks:
                if task.held:
                    done.leave_out(_HELD[task.held])
                else:
                    yield from make(task, redact, done)
            read += len(tasks)
            progress(read)
        return
    for turns in store.answered(selection, steps=format == "raw"):
        for turn in turns:
            if format == "raw":
                yield _raw(turn, tokens)
            else:
                yield from _answer(turn, format, redact, done)
        read += len(turns)
        progress(read)


def _answer(turn: Answered, format: Format, redact: Redact | None, done: Exported) -> Iterator[Row]:
    messages = turn.turn.messages
    if turn.turn.status != "done" or not turn.turn.answer:
        done.leave_out("no answer")
    elif any(m["role"] == "tool" or m.get("tool_calls") for m in messages):
        done.leave_out("rests on a client's own tools")
    else:
        prompt = [_message(message, redact) for message in messages]
        answer = [_message({"role": "assistant", "content": turn.turn.answer}, redact)]
        yield {"messages": prompt + answer} if format == "openai" else {"prompt": prompt, "completion": answer}


def _prompt(task: Practised, redact: Redact | None, done: Exported) -> Iterator[Row]:
    from online_rl.redaction import redact_task
    from online_rl.tasks.base import Task

    messages, queued = [_message(m, None) for m in task.task.messages], task.task
    if redact is not None:
        found = redact_task(Task(tuple(messages), queued.verifier, queued.gold, queued.kind), redact)
        if isinstance(found, str):
            done.leave_out(found)
            return
        messages = list(found.messages)
    yield {"prompt": messages, "verifier": queued.verifier, "gold": queued.gold, "task_id": queued.id}


def _preference(task: Practised, redact: Redact | None, done: Exported) -> Iterator[Row]:
    """As many pairs as there are answers of both kinds, none of them twice."""
    pairs = list(zip(dict.fromkeys(task.right), dict.fromkeys(task.wrong), strict=False))
    if not pairs:
        done.leave_out("not answered both right and wrong")
    for right, wrong in pairs:
        said = [[_message({"role": "assistant", "content": answer}, redact)] for answer in (right, wrong)]
        if redact is not None and said[0] == said[1]:
            done.leave_out("the same after redaction")
            continue
        prompt = [_message(message, redact) for message in task.task.messages]
        yield {"prompt": prompt, "chosen": said[0], "rejected": said[1]}


def _raw(turn: Answered, tokens: bool) -> Row:
    steps = []
    for step in turn.turn.steps:
        seen = step.observation
        told: Row = {
            "text": step.text,
            "thought": step.thought,
            "action": step.action,
            "input": step.input,
            "version": step.version,
            "seconds": step.seconds,
            "tool": seen and seen.tool,
            "observation": seen and seen.text,
            "observation_error": seen and seen.error,
            "artifact": seen and json.dumps(seen.artifact, ensure_ascii=False),
        }
        if tokens:
            told |= {"token_ids": step.token_ids, "logprobs": step.logprobs, "mask": step.mask}
        steps.append(told)
    row: Row = {
        "conversation_id": turn.turn.conversation_id,
        "turn_id": turn.turn.id,
        "owner": turn.owner,
        "created_at": turn.turn.created_at.isoformat(),
        "version": turn.turn.version,
        "status": turn.turn.status,
        "messages": json.dumps(turn.turn.messages, ensure_ascii=False),
        "answer": turn.turn.answer,
        "steps": steps,
        "outcomes": [
            {name: getattr(verdict, name) for name in ("source", "score", "verifier", "gold", "reason")}
            for verdict in turn.outcomes
        ],
    }
    return row | ({"prompt_ids": turn.turn.prompt_ids} if tokens else {})


def _message(message: Row, redact: Redact | None) -> dict[str, str]:
    text = str(message.get("content") or "")
    return {"role": str(message["role"]), "content": text if redact is None else redact(text).text}


class _Writer(Protocol):
    def write(self, row: Row) -> None: ...
    def close(self) -> None: ...


class _JsonLines:
    def __init__(self, out: Any) -> None:
        self._out = out

    def write(self, row: Row) -> None:
        self._out.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")

    def close(self) -> None:
        pass


class _Parquet:
    """Rows in groups of a thousand, with a schema of their own: columns are the same however few rows there are."""

    _GROUP = 1000

    def __init__(self, out: Any, format: Format, tokens: bool) -> None:
        import pyarrow.parquet as pq

        self._schema = _schema(format, tokens)
        self._writer = pq.ParquetWriter(out, self._schema, compression="zstd")
        self._rows: list[Row] = []

    def write(self, row: Row) -> None:
        self._rows.append(row)
        if len(self._rows) == self._GROUP:
            self._flush()

    def close(self) -> None:
        self._flush()
        self._writer.close()

    def _flush(self) -> None:
        import pyarrow as pa

        self._writer.write_table(pa.Table.from_pylist(self._rows, schema=self._schema))
        self._rows = []


def _schema(format: Format, tokens: bool) -> pa.Schema:
    import pyarrow as pa

    text = pa.string()
    said = pa.list_(pa.struct({"role": text, "content": text}))
    if format == "openai":
        return pa.schema({"messages": said})
    if format == "trl-sft":
        return pa.schema({"prompt": said, "completion": said})
    if format == "trl-grpo":
        return pa.schema({"prompt": said, "verifier": text, "gold": text, "task_id": text})
    if format == "trl-preference":
        return pa.schema({"prompt": said, "chosen": said, "rejected": said})
    step = dict.fromkeys(("text", "thought", "action", "input", "version"), text) | {"seconds": pa.float64()}
    step |= {"tool": text, "observation": text, "observation_error": pa.bool_(), "artifact": text}
    if tokens:
        step |= {"token_ids": pa.list_(pa.int32()), "logprobs": pa.list_(pa.float32()), "mask": pa.list_(pa.uint8())}
    verdict = {"source": text, "score": pa.float64(), "verifier": text, "gold": text, "reason": text}
    columns = ("conversation_id", "turn_id", "owner", "created_at", "version", "status", "messages", "answer")
    lists = {"steps": pa.list_(pa.struct(step)), "outcomes": pa.list_(pa.struct(verdict))}
    return pa.schema(dict.fromkeys(columns, text) | lists | ({"prompt_ids": pa.list_(pa.int32())} if tokens else {}))
