"""The heap: what the C library does with memory that one pass of a network frees and the next one asks for again."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import sys
from pathlib import Path
from typing import Any

LARGEST = 1 << 25
"""Bytes of the largest allocation that comes from the heap: what glibc's own threshold grows to, at most."""

LEAST = 1 << 17
"""Bytes of the least that is given back: glibc's own threshold before it grows."""

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""Names of the two settings (``malloc.h``)."""


WORTH = 1 << 28
"""Bytes that a process must hold more than it did before all its objects are walked: that takes a third of a second."""

_settled: list[int] = []
"""What the process held when its objects had been walked the last time; empty before the first time."""


def keep_freed_memory() -> bool:
    """Lets the C library keep what is freed for what is allocated next, instead of handing it back to the system.

    glibc hands back what is free at the end of its heap, which after each pass of a network can be most of it; the next pass
    takes new memory, page by page, each of which the system clears first. Kept, a step of a whole copy on a CPU takes about
    a twentieth less; what a process takes at its peak stays the same, and it holds on to that until its end. Settings of the
    user's own (``MALLOC_*``, ``GLIBC_TUNABLES``) are left as they are.

    Returns:
        Whether it does now; other C libraries have no such setting.
    """
    return _set(LARGEST, -1)  # -1 is never


def give_back_freed_memory() -> bool:
    """Lets the C library hand what is freed back to the system at once: less at the peak, for a quarter more seconds.

    What is gathered, used and let go over and over in other sizes leaves gaps in a heap that is kept: of a process that holds
    half a model, a quarter of all that it takes. Settings of the user's own are left as they are.

    Returns:
        Whether it does now; other C libraries have no such setting.
    """
    done = _set(LEAST, LEAST)
    if done:
        _trim()  # what was freed before
    return done


def release_unreachable() -> None:
    """Frees what nothing can reach any more, and hands free memory back to the system.

    A trainer, its module and what they hold refer to each other in circles, which are not freed until objects are many,
    however large these are. Nothing is done where the process holds less than ``WORTH`` above the least that it held since
    the last time, on the host and on GPUs.
    """
    held = _held()
    if _settled and held is not None and held < _settled[0] + WORTH:
        _settled[0] = min(_settled[0], held)
        return
    gc.collect()
    if (cuda := _cuda()) is not None:
        cuda.empty_cache()
    if platform.libc_ver()[0] == "glibc":
        _trim()
    _settled[:] = [_held() or 0]


def _held() -> int | None:
    """Returns the bytes that this process has allocated, of files none; None where the system does not say it."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    (kib, *_) = [*(int(line.split()[1]) for line in lines if line.startswith("RssAnon:")), None]
    if kib is None:
        return None
    cuda = _cuda()
    there = () if cuda is None else range(cuda.device_count())
    return kib * 1024 + sum(cuda.memory_allocated(device) for device in there)


def _cuda() -> Any:
    """Returns ``torch.cuda`` where this process uses a GPU; None else, without importing torch."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_initialized() else None


def _trim() -> None:
    ctypes.CDLL(None).malloc_trim(0)


def _set(mapped: int, trimmed: int) -> bool:
    if any(name.startswith("MALLOC_") for name in os.environ) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # setting either ends the growth of the other's threshold, so both are set
    return bool(mallopt(MMAP_THRESHOLD, mapped)) and bool(mallopt(TRIM_THRESHOLD, trimmed))
