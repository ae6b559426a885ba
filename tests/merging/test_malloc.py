"""The heap: freed memory is used again or given back, as asked for, and a user's own settings win."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from adamerge.merging.malloc import give_back_freed_memory, keep_freed_memory

ALLOCATE = """
import resource, sys
from adamerge.merging.malloc import give_back_freed_memory, keep_freed_memory
import numpy
kept = keep_freed_memory() and (sys.argv[1] == "keep" or give_back_freed_memory())
def run():
    held = [numpy.ones(1 << 21, dtype=numpy.uint8) for _ in range(50)]  # 100 MiB
run()
run()
before = resource.getrusage(resource.RUSAGE_SELF)
run()
after = resource.getrusage(resource.RUSAGE_SELF)
print(kept, (after.ru_minflt - before.ru_minflt) * resource.getpagesize() >> 20, after.ru_maxrss >> 10)
"""


def outcome(wanted="keep", **environment):
    line = [sys.executable, "-c", ALLOCATE, wanted]
    run = subprocess.run(line, capture_output=True, text=True, env=environment, check=True)
    kept, faulted, peak = run.stdout.split()
    return kept == "True", int(faulted), int(peak)


@pytest.mark.skipif(sys.platform != "linux", reason="a setting of glibc")
def test_what_was_freed_is_used_again_and_the_peak_is_the_same():
    (kept, faulted, peak), (left, new, other) = outcome(), outcome(MALLOC_TRIM_THRESHOLD_="131072")
    assert kept and faulted < 5
    assert not left and new > 80
    assert abs(peak - other) < 20


@pytest.mark.skipif(sys.platform != "linux", reason="a setting of glibc")
def test_what_was_freed_is_given_back_when_that_is_asked_for_later():
    done, new, _ = outcome("give back")
    assert done and new > 80


@pytest.mark.parametrize("own", [{"MALLOC_ARENA_MAX": "1"}, {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=131072"}])
def test_settings_of_the_user_are_left(own):
    kept, *_ = outcome(**own)
    assert not kept


@pytest.mark.parametrize("setting", [keep_freed_memory, give_back_freed_memory])
def test_another_c_library_is_left_alone(monkeypatch, setting):
    for name in ("MALLOC_ARENA_MAX", "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert not setting()


CIRCLE = """
import gc
from adamerge.merging.malloc import keep_freed_memory, release_unreachable
import numpy

def resident():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS:")).split()[1]) // 1024

gc.disable()  # it would be the number of objects that decides when
keep_freed_memory()
before, circle = resident(), {"outputs": [numpy.ones(1 << 17) for _ in range(100)]}
circle["self"] = circle
full = resident()
del circle
left = resident()
release_unreachable()
after = resident()
circle = {"outputs": [numpy.ones(1 << 17) for _ in range(20)]}
circle["self"] = circle
del circle
release_unreachable()
little = resident()
circle = {"outputs": [numpy.ones(1 << 17) for _ in range(300)]}
circle["self"] = circle
del circle
release_unreachable()
print(full - before, left - before, after - before, little - before, resident() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a setting of glibc")
def test_what_only_refers_to_itself_is_released():
    run = subprocess.run([sys.executable, "-c", CIRCLE], capture_output=True, text=True, check=True)
    full, left, after, little, much = map(int, run.stdout.split())  # MiB; 100 arrays of 1 MiB, 20, and 300 more
    assert full >= 95 and left >= 95 and after < 20
    assert 15 <= little < 60, "it was not worth it"
    assert much < 20
