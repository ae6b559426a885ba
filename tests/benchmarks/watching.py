"""A command run in a process of its own: its seconds, and the most memory it took, as the system counts it."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import threading
import time
import venv
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
EVERY = 0.003  # seconds between two looks
RETURNING = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
"""Environment in which the C library gives freed memory back at once: a peak is then what was allocated, run after run."""


@dataclass(frozen=True)
class Watched:
    """What one run took.

    Attributes:
        seconds: wall time from start to end.
        anonymous: peak of RssAnon in MiB, sampled; memory-mapped files are not in it.
        resident: VmHWM in MiB, the peak of all that was resident, mapped files included.
        output: what it printed.
    """

    seconds: float
    anonymous: float
    resident: float
    output: str


class CommandFailed(RuntimeError):
    """A command ended with another code than 0; the last of what it printed is the message."""


def watch(command: Sequence[str], environment: Mapping[str, str] | None = None, limit: float = float("inf")) -> Watched:
    """Run a command to its end, or until its anonymous memory passes ``limit`` MiB.

    Raises:
        CommandFailed: it failed, or was ended.
    """
    start = time.perf_counter()
    process = subprocess.Popen(
        command, env=own_environment(environment), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    printed: list[str] = []
    reader = threading.Thread(target=lambda out: printed.extend(out), args=(process.stdout,))
    reader.start()
    peaks = {"RssAnon": 0, "VmHWM": 0}
    while process.poll() is None:
        for name, value in memory(process.pid).items():
            peaks[name] = max(peaks[name], value)
        if peaks["RssAnon"] > limit * 1024:
            process.kill()
        time.sleep(EVERY)
    seconds = time.perf_counter() - start
    reader.join()
    output = "".join(printed)
    if peaks["RssAnon"] > limit * 1024:
        raise CommandFailed(f"more than {limit:.0f} MiB of anonymous memory")
    _refuse_failure(command, process.returncode, output)
    return Watched(seconds, peaks["RssAnon"] / 1024, peaks["VmHWM"] / 1024, output)


def run(command: Sequence[str], environment: Mapping[str, str] | None = None) -> str:
    """What a command prints that measures itself: looking at it 300 times a second would take from its time.

    Raises:
        CommandFailed: it failed.
    """
    done = subprocess.run(
        command, env=own_environment(environment), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    _refuse_failure(command, done.returncode, done.stdout)
    return done.stdout


def _refuse_failure(command: Sequence[str], code: int, output: str) -> None:
    if code != 0:
        raise CommandFailed(f"{' '.join(command)[:300]} ended with {code}:\n{output[-2000:]}")


@contextmanager
def own_peak() -> Iterator[list[int]]:
    """A list whose one number is this process's peak of RssAnon in KiB while the context lasts."""
    peak, going = [0], [True]

    def look() -> None:
        while going[0]:
            peak[0] = max(peak[0], memory().get("RssAnon", 0))
            time.sleep(EVERY)

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        yield peak
    finally:
        going[0] = False
        watcher.join()


def own_environment(more: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment in which ``adamerge`` is the one beside this file, without network, and ``more``."""
    return (
        os.environ
        | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        | dict(more or {})
    )


def memory(process: int | str = "self") -> dict[str, int]:
    """RssAnon and VmHWM in KiB; nothing when the process is gone."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in lines if line.startswith(("RssAnon:", "VmHWM:")))
    return {name: int(value.split()[0]) for name, value in pairs}


def environment_of(requirement: str, cache: Path) -> Path:
    """The ``bin`` folder of a virtual environment with this one requirement; made when it is not there."""
    folder = cache / requirement.replace("==", "-")
    done = folder / "complete"
    if not done.exists():
        print(f"making {folder} with {requirement}; this takes minutes, once", file=sys.stderr)
        venv.create(folder, with_pip=True, clear=True)
        subprocess.run([folder / "bin" / "python", "-m", "pip", "install", "--quiet", requirement], check=True)
        done.touch()
    return folder / "bin"


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}
