"""Keeps freed memory in the process while it trains on a CPU."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> None:
    """Stop glibc from giving large blocks back to the system after each tensor operation.

    By default each activation is a mapping of its own, zeroed page by page by the kernel when it is next wanted:
    with two cores, up to a third of a training step. Elsewhere than on glibc this does nothing.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
