"""The heap: what the C library does with memory that one pass of a network frees and the next one asks for again."""

from __future__ import annotations

import ctypes
import os
import platform

LARGEST = 1 << 25
"""Bytes of the largest allocation that comes from the heap: what glibc's own threshold grows to, at most."""

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""Names of the two settings (``malloc.h``)."""


def keep_freed_memory() -> bool:
    """Let the C library keep what is freed for what is allocated next, instead of handing it back to the system.

    glibc hands back what is free at the end of its heap, which after each pass of a network can be most of it; the next pass
    takes new memory, page by page, each of which the system clears first. Kept, a step on a CPU takes about a twentieth
    less; what a process takes at its peak stays the same, and it holds on to that until its end. Settings of the user's own
    (``MALLOC_*``, ``GLIBC_TUNABLES``) are left as they are.

    Returns:
        Whether it does now; other C libraries have no such setting.
    """
    if any(name.startswith("MALLOC_") for name in os.environ) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # setting either ends the growth of the other's threshold, so both are set; -1 is never
    return bool(mallopt(MMAP_THRESHOLD, LARGEST)) and bool(mallopt(TRIM_THRESHOLD, -1))
