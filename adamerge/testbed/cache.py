"""The testbed's cache: the splits of a task, built once a recipe, read from disk afterwards."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the names of the testbeds' tasks are told before a data set is read
    import datasets

SPLITS = ("train", "calibration", "validation", "test")
Splits = Iterator[tuple[str, "datasets.Dataset"]]
_MAY_BUILD = ContextVar("_MAY_BUILD", default=True)


class NotBuiltError(Exception):
    """A task's splits are not in the cache, and it was only asked whether they are."""


def is_built(load: Callable[[], object]) -> bool:
    """Returns whether ``load``, which calls ``cached_splits``, finds a task in the cache; nothing is built."""
    token = _MAY_BUILD.set(False)
    try:
        load()
    except NotBuiltError:
        return False
    finally:
        _MAY_BUILD.reset(token)
    return True


def cached_splits(
    name: str, recipe: Sequence[Path], build: Callable[[], Splits], cache_dir: Path | None, versions: str = ""
) -> datasets.DatasetDict:
    """Returns the four splits of ``name`` from the cache; ``build`` yields each with its name where they are not there.

    The cache is ``cache_dir`` (default: ``adamerge/testbed`` in the user's cache folder); a task's folder there is named
    after a hash of ``recipe``, the files of code that make the data, and of ``versions``, of the packages they are from.
    """
    import datasets

    digest = hashlib.sha256(b"".join(file.read_bytes() for file in recipe) + versions.encode()).hexdigest()[:12]
    folder = (cache_dir or _default_cache()) / f"{name}-{digest}"
    if not folder.is_dir():
        if not _MAY_BUILD.get():
            raise NotBuiltError(name)
        _write(folder, build)
    return datasets.DatasetDict({split: datasets.load_from_disk(str(folder / split)) for split in SPLITS})


def _write(folder: Path, build: Callable[[], Splits]) -> None:
    """Writes the splits beside ``folder``, then moves them there in one rename."""
    import datasets

    folder.parent.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    quiet = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        for split, data in build():
            data.save_to_disk(str(stage / split))
        try:
            stage.rename(folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process was faster, with the same data
                raise
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        if not quiet:
            datasets.enable_progress_bars()


def _default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "adamerge" / "testbed"
