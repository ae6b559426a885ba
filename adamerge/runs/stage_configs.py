"""Configurations of stages: the files and overrides that each stage of a method is given, and whether it can be fitted."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from adamerge.errors import AdamergeError, ConfigError
from adamerge.runs.config_files import config_files, read_config, stages_of
from adamerge.runs.config_parser import FitCLI, Parsed
from adamerge.runs.preparation import prepared


def stage_files(arguments: Sequence[str]) -> list[Path]:
    """The stages of the method that is a folder, in order; none when all configurations are files.

    Raises:
        ConfigError: two folders, or a folder whose YAML files are not ``1_*.yaml, 2_*.yaml, ...``.
    """
    folders = [Path(path) for path in config_files(arguments) if Path(path).is_dir()]
    if len(folders) > 1:
        raise ConfigError(f"--config: at most one folder of stages, got {[str(folder) for folder in folders]}")
    if not folders:
        return []
    return stages_of(folders[0])


def for_stage(arguments: Sequence[str], file: Path | None, number: int) -> list[str]:
    """The arguments of one stage, its own overrides last; ``file`` takes the folder's place."""
    common: list[str] = []
    own: list[str] = []
    words = iter(arguments)
    for word in words:
        given = re.match(r"--(\d+)\.(.+)", word)
        if given:
            rest = [] if "=" in word else [next(words, "")]
            own += [f"--{given[2]}", *rest] if int(given[1]) == number else []
        elif file is not None and Path(word.removeprefix("--config=")).is_dir() and _is_config(word, common):
            common.append(f"--config={file}" if word.startswith("--config=") else str(file))
        else:
            common.append(word)
    return [*common, *own]


def _is_config(word: str, before: Sequence[str]) -> bool:
    return word.startswith("--config=") or (bool(before) and before[-1] in {"--config", "-c"})


def parsed_stage(arguments: Sequence[str], file: Path, number: int, places: Mapping[str, str]) -> Parsed:
    """The stage's configuration, checked, with what stands for files replaced.

    Raises:
        ConfigError: a key or a value cannot be used; or the first stage speaks of a stage before it.
    """
    content = _replaced(read_config(file), places)
    if number == 1 and any(mark in yaml.safe_dump(content) for mark in ("{previous}", "{importance}")):
        raise ConfigError(f"{file}: the first stage has no stage before it", expected="no {previous}, no {importance}")
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary) / file.name
        copy.write_text(yaml.safe_dump(content), encoding="utf-8")
        with _named(file, number):
            return Parsed(for_stage(arguments, copy, number))


@contextmanager
def _named(file: Path, number: int) -> Iterator[None]:
    """Let an error say of which stage it is."""
    try:
        yield
    except AdamergeError as error:
        own = f"{error.todo or ''} (--{number}.KEY is for stage {number} alone)".strip()
        raise type(error)(
            f"stage {number}, {file}: {error.what}",
            where=error.where,
            expected=error.expected,
            got=error.got,
            todo=error.todo if number == 1 else own,
        ) from error


def _replaced(value: Any, places: Mapping[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: _replaced(item, places) for key, item in value.items()}
    if isinstance(value, list):
        return [_replaced(item, places) for item in value]
    if isinstance(value, str):
        for mark, place in places.items():
            value = value.replace(mark, place)
    return value


def parsed(arguments: Sequence[str]) -> None:
    """See whether the words of a method, and of each of its stages, can be used; no model and no data are opened.

    Raises:
        ConfigError: they cannot.
    """
    files = stage_files(arguments)
    if not files:
        Parsed(for_stage(arguments, None, 0))
    for number, file in enumerate(files, 1):
        parsed_stage(arguments, file, number, {})


def validated(arguments: Sequence[str]) -> FitCLI:
    """See whether a method can be fitted, each of its stages as far as it can be known before the ones before it ran.

    Nothing is written, and no weight but those of heads is read.

    Returns:
        What the method, or its first stage, makes of the configuration.

    Raises:
        AdamergeError: it cannot.
    """
    files = stage_files(arguments)
    if not files:
        return prepared(for_stage(arguments, None, 0))
    first: FitCLI | None = None
    with tempfile.TemporaryDirectory() as temporary:
        for number, file in enumerate(files, 1):
            names = () if first is None else tuple(first.model.merged.task_vectors)
            content = _without_results(read_config(file), names)
            copy = Path(temporary) / file.name
            copy.write_text(yaml.safe_dump(content), encoding="utf-8")
            with _named(file, number):
                cli = prepared(for_stage(arguments, copy, number))
            first = first or cli
    assert first is not None
    return first


def _without_results(value: Any, names: Iterable[str]) -> Any:
    """A configuration without what an earlier stage has yet to write; importances are equal."""
    if isinstance(value, list):
        return [_without_results(item, names) for item in value]
    if not isinstance(value, dict):
        return value
    found = {
        key: _without_results(item, names)
        for key, item in value.items()
        if not (isinstance(item, str) and any(mark in item for mark in ("{previous}", "{importance}", "{run}")))
    }
    if "importance" in value and "importance" not in found:
        found |= {"importance": dict.fromkeys(names, 1.0), "kappa": 0.0}
    return found
