"""Rows of a comparison: methods crossed with a grid of settings and with seeds, as the words of one fit each."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from adamerge.errors import ConfigError
from adamerge.runs.command_line import Words, words_of_fits

OF_POOL = ("data", "model.backbone", "model.task_vectors", "model.copy", "tasks", "leave_out")
"""Keys of what is merged and scored; the others say how."""


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What a comparison is asked for besides a pool and methods.

    Attributes:
        runs: folders of finished runs, scored as they are.
        seeds: that each method is fitted with; the configuration's own when empty.
        grid: ``[METHOD:]KEY=VALUE,VALUE,...``, each crossed with the others and with the methods; one value is a setting.
        split: ``test`` or ``validation``.
        corruptions: whether all are scored on spoiled pictures too.
        leave_out: tasks whose experts and data no fit sees, and that are scored all the same.
        forward_passes: that every search gets; as many as its configuration says when None.
    """

    runs: tuple[Path, ...] = ()
    seeds: tuple[int, ...] = ()
    grid: tuple[str, ...] = ()
    split: str = "test"
    corruptions: bool = False
    leave_out: tuple[str, ...] = ()
    forward_passes: int | None = None


@dataclass(frozen=True)
class Row:
    """A method with one choice of settings: what has a row of its own.

    Attributes:
        name: of the method, with the settings of the grid.
        method: its file or folder.
        words: of a fit.
    """

    name: str
    method: Path
    words: Words


def rows_of(pool: Path, methods: Sequence[Path], shared: Words, grid: Sequence[str] = ()) -> list[Row]:
    """Returns the rows of methods on a pool, in order; settings of a stage that a method does not have give it no row more.

    A row is named after its method and its settings; one that all rows of a method share tells none apart.

    Args:
        pool: what is merged.
        methods: how.
        shared: files and overrides of all.
        grid: as in ``Choices``.

    Raises:
        ConfigError: two methods have the same name, or a grid is none.
    """
    stems = [method.stem for method in methods]
    if len(set(stems)) < len(stems):
        raise ConfigError(f"two methods have the same name: {sorted(stems)}", todo="rename one of them")
    axes = [_axis(text, stems) for text in grid]
    rows: dict[tuple[Path, tuple[str, ...]], Row] = {}
    for method in methods:
        own = [(key, values) for whose, key, values in axes if whose in {None, method.stem}]
        several = {key for key, values in own if len(values) > 1}
        for cell in itertools.product(*([(key, value) for value in values] for key, values in own)):
            given = Words(shared.files, [*shared.overrides, *(f"--{key}={value}" for key, value in cell)])
            words = words_of_fits(pool, methods, given)[method]
            kept = [(key, value) for key, value in cell if key in several and f"--{key}={value}" in words.overrides]
            name = " ".join([method.stem, *(f"{_short(key, [key for key, _ in kept])}={value}" for key, value in kept)])
            rows.setdefault((method, tuple(words.overrides)), Row(name, method, words))
    return list(rows.values())


def with_words(words: Words, *more: str) -> Words:
    """Returns the words of a fit with further overrides behind them."""
    return Words(words.files, [*words.overrides, *more])


def pool_words(pool: Path, shared: Words) -> Words:
    """Returns the words of a pool alone, from which the models and data that are scored are made."""
    own = [word for word in shared.overrides if any(re.match(rf"--{re.escape(key)}[.=+]", word) for key in OF_POOL)]
    return Words([str(pool), *shared.files], ["--model.parametrization=adamerge.TaskWise", *own])


def is_run(path: Path) -> bool:
    """Returns whether a path is the folder of a run that has coefficients."""
    return (path / "coefficients.safetensors").is_file() and (path / "config.yaml").is_file()


def _axis(text: str, stems: Sequence[str]) -> tuple[str | None, str, list[str]]:
    """Returns whose a grid is, or None for all methods, its key and its values."""
    match = re.fullmatch(r"(?:([^:=]+):)?(?:--)?([\w.]+)=(.+)", text)
    if match is None:
        raise ConfigError(
            f"--grid {text}: no grid", expected="KEY=VALUE,VALUE,... or METHOD:KEY=VALUE,VALUE,...", got=text
        )
    whose, key, values = match.groups()
    if whose is not None and whose not in stems:
        raise ConfigError(f"--grid {text}: no method is called '{whose}'", expected=f"one of {list(stems)}", got=whose)
    return whose, key, _divided(values)


def _divided(text: str) -> list[str]:
    """Returns the parts between commas; those inside brackets divide nothing."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "[{(") - (letter in "]})")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def _short(key: str, keys: Sequence[str]) -> str:
    """Returns the last part of a key, or all of it where another one ends alike."""
    last = key.rpartition(".")[2]
    return last if [one.rpartition(".")[2] for one in keys].count(last) == 1 else key
