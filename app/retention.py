"""What the server does at its start and daily: erase what has grown too old, finish what was left unswept."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta

from app.erasure import sweep
from app.settings import Settings
from feedback_store import Store

log = logging.getLogger(__name__)

DAY_S = 86_400.0


def tidy(store: Store, settings: Settings) -> int:
    """Erase what is older than `retention_days`, and finish earlier erasures; how many conversations went. Blocks."""
    gone = 0
    if settings.retention_days is not None:
        before = datetime.now(UTC) - timedelta(days=settings.retention_days)
        gone = len(store.expire(before).conversations)
    if store.unswept():
        sweep(store, settings.home, vacuum=False)
    return gone


@asynccontextmanager
async def tidying(store: Store, settings: Settings, every_s: float = DAY_S) -> AsyncIterator[None]:
    """`tidy` now and again every so often, while the block runs. A failure is logged, and tried again next time."""

    async def go() -> None:
        while True:
            try:
                gone = await asyncio.to_thread(tidy, store, settings)
                if gone:
                    log.info("erased %d conversations older than %s days", gone, settings.retention_days)
            except Exception:  # whatever it is, the next day may do better
                log.exception("old conversations couldn't be erased")
            await asyncio.sleep(every_s)

    keeper = asyncio.create_task(go(), name="retention")
    try:
        yield
    finally:
        keeper.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await keeper
