"""The heap: freed memory is used again, the peak is the same, and a user's own settings win."""

from __future__ import annotations

import subprocess
import sys

import pytest

ALLOCATE = """
import resource, sys
from adamerge.heap import keep_freed_memory
import numpy
kept = keep_freed_memory()
def run():
    held = [numpy.ones(1 << 21, dtype=numpy.uint8) for _ in range(50)]  # 100 MiB
run()
run()
before = resource.getrusage(resource.RUSAGE_SELF)
run()
after = resource.getrusage(resource.RUSAGE_SELF)
print(kept, (after.ru_minflt - before.ru_minflt) * resource.getpagesize() >> 20, after.ru_maxrss >> 10)
"""


def outcome(**environment):
    run = subprocess.run([sys.executable, "-c", ALLOCATE], capture_output=True, text=True, env=environment, check=True)
    kept, faulted, peak = run.stdout.split()
    return kept == "True", int(faulted), int(peak)


@pytest.mark.skipif(sys.platform != "linux", reason="a setting of glibc")
def test_what_was_freed_is_used_again_and_the_peak_is_the_same():
    (kept, faulted, peak), (left, new, other) = outcome(), outcome(MALLOC_TRIM_THRESHOLD_="131072")
    assert kept and faulted < 5
    assert not left and new > 80
    assert abs(peak - other) < 20


@pytest.mark.parametrize("own", [{"MALLOC_ARENA_MAX": "1"}, {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=131072"}])
def test_settings_of_the_user_are_left(own):
    kept, *_ = outcome(**own)
    assert not kept


def test_another_c_library_is_left_alone(monkeypatch):
    import platform

    from adamerge.heap import keep_freed_memory

    for name in ("MALLOC_ARENA_MAX", "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert not keep_freed_memory()
