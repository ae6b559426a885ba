"""A run's own configuration: written whole or not at all, with paths that hold from anywhere and after a move."""

from __future__ import annotations

import os
from collections.abc import Callable
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace

from adamerge.checkpoints.opening import lasting_path
from adamerge.io.atomic import staged_file
from adamerge.io.run_folder import movable, run_of
from adamerge.io.versions import WRITTEN_BY
from adamerge.runs.config_files import with_texts
from adamerge.runs.parser import as_data

SOURCES = (
    "model.task_vectors.*base",
    "model.task_vectors.*experts.*",
    "model.backbone.init_args.architecture",
    "model.backbone.init_args.model",
    "data.init_args.tasks.*.dataset",
)
"""Keys whose value may be a path, or something else: a Hub id, the name of a package or of a network."""
PATHS = (
    "model.init_from",
    "model.task_vectors.*start",
    "model.task_vectors.*components",
    "model.parametrization.*mask_from",
    "model.parametrization.*importance",
    "model.teachers.init_args.folder",
    "data.init_args.tasks.*.images",
    "trainer.logger.init_args.*dir",
    "trainer.callbacks.init_args.dirpath",
)
"""Keys whose value is a path, of a file or folder that may not exist yet."""


def write_config(settings: Namespace, path: Path) -> None:
    """Writes the configuration atomically, with absolute paths but for those inside its run, which begin ``{this_run}``.

    Raises:
        ExportError: the file cannot be written.
    """
    content = with_texts(located(as_data(settings)), partial(movable, run=run_of(path)))
    text = yaml.safe_dump(content, sort_keys=False)
    with staged_file(path) as temporary:
        temporary.write_text(f"# {WRITTEN_BY}\n{text}", encoding="utf-8")


def located(value: Any, key: str = "") -> Any:
    """Returns a configuration, or the part of it below ``key``, with absolute paths."""
    if isinstance(value, dict):
        return {name: located(item, f"{key}.{name}" if key else str(name)) for name, item in value.items()}
    if isinstance(value, list):
        return [located(item, key) for item in value]
    if not isinstance(value, str):
        return value
    kinds: tuple[tuple[tuple[str, ...], Callable[[str], str]], ...] = ((SOURCES, lasting_path), (PATHS, _absolute))
    for patterns, absolute in kinds:
        if any(fnmatchcase(key, pattern) for pattern in patterns):
            return absolute(value)
    return value


def _absolute(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))
