"""Rows of a data set from a local file, or from the Hugging Face hub."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from online_rl.tasks.jsonl import TaskFileError, rows

SUFFIXES = (".jsonl", ".json", ".parquet")


class HubUnavailable(RuntimeError):
    """A set is on the hub and can't be had from there. The message says how else."""


def file_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number from 1, row) of a .jsonl, .json or .parquet file. Raises TaskFileError, naming file and row."""
    if path.suffix == ".jsonl":
        yield from rows(path)
    elif path.suffix == ".json":
        yield from _json_rows(path)
    elif path.suffix == ".parquet":
        yield from _parquet_rows(path)
    else:
        raise TaskFileError(path, 0, "", f"has the ending {path.suffix!r}: use one of {', '.join(SUFFIXES)}")


def _json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise TaskFileError(path, 0, "", f"cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise TaskFileError(path, 0, "", f"is not JSON: {error}") from error
    if isinstance(content, dict):  # some sets are one object with their rows under this name
        content = content.get("data", content.get("Data"))
    if not isinstance(content, list):
        raise TaskFileError(path, 0, "", "is no JSON list, nor an object with one under 'data'")
    for number, row in enumerate(content, start=1):
        if not isinstance(row, dict):
            raise TaskFileError(path, number, "", f"is a JSON {type(row).__name__}, not an object")
        yield number, row


def _parquet_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    try:
        table = parquet.ParquetFile(path)
    except OSError as error:
        raise TaskFileError(path, 0, "", f"cannot be read: {error.strerror or error}") from error
    except arrow.ArrowInvalid as error:
        raise TaskFileError(path, 0, "", f"is not Parquet: {error}") from error
    number = 0
    for batch in table.iter_batches():
        for row in batch.to_pylist():
            number += 1
            yield number, row


def hub_rows(repository: str, config: str | None, split: str, name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a set on the hub. Raises HubUnavailable; `name` is the set's here.

    With HF_HUB_OFFLINE=1 the library answers from its cache on this machine.
    """
    way_out = (
        f"Give a copy of its file by hand, put it in the folder `data` of Whetstone's home as {name}.jsonl, .json or "
        ".parquet, or set HF_HUB_OFFLINE=1 where the hub's cache has it."
    )
    told = f"{name} is on the Hugging Face hub ({repository}), "
    if not _reachable():  # asked first: the library itself tries for half a minute
        raise HubUnavailable(f"{told}which is out of reach from here. {way_out}")
    try:
        from datasets import load_dataset

        found = load_dataset(repository, config, split=split)
    except Exception as error:  # the library lets those of several HTTP clients through
        said = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
        raise HubUnavailable(f"{told}and can't be had from there: {said}. {way_out}") from error
    yield from ((number, dict(row)) for number, row in enumerate(found, start=1))


@cache
def _reachable() -> bool:
    if os.environ.get("HF_HUB_OFFLINE") or os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy"):
        return True  # answered from the cache, or by a proxy that resolves the name: the library finds out
    address = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    try:
        socket.create_connection((address.hostname or "", address.port or 443), timeout=5).close()
    except OSError:
        return False
    return True
