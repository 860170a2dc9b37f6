"""How a process that computes on the CPU holds its memory."""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Of malloc.h."""
MAPPED = 32 << 20
"""Bytes from which an allocation has pages of its own, and returns them: the most that glibc ever takes by itself."""


def keep_freed_memory() -> None:
    """Let glibc's heap keep what is freed for what is allocated next; elsewhere, do nothing.

    After each step it would give most of the heap back to the system, which then has to zero new pages for the next
    one. Now the heap stays as large as it was at its peak.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, MAPPED)
        mallopt(_TRIM_THRESHOLD, -1)
