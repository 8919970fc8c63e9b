"""The audit: a line of JSON for each tool call, in a file that rotates."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

from tools.toolbox import Audit

log = logging.getLogger(__name__)

MAX_BYTES = 10_000_000
KEPT_FILES = 5


@contextmanager
def audit_file(path: Path, max_bytes: int = MAX_BYTES, kept: int = KEPT_FILES) -> Iterator[Audit]:
    """What writes to `path`, of which `kept` earlier files are kept. Writing raises OSError when it fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = _Handler(path, maxBytes=max_bytes, backupCount=kept, encoding="utf-8", delay=True)

    def write(line: dict[str, Any]) -> None:
        text = json.dumps(line, ensure_ascii=False)
        handler.handle(logging.LogRecord("audit", logging.INFO, "", 0, text, None, None))

    try:
        yield write
    finally:
        try:
            handler.close()
        except OSError as error:  # what a full disk didn't take
            log.warning("the end of the audit is lost: %s", error)


class _Handler(RotatingFileHandler):
    def handleError(self, record: logging.LogRecord) -> None:
        """Raise what went wrong: by default it would be printed and forgotten."""
        raise
