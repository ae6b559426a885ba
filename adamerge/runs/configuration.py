"""Configurations: what the files and words of a command line say together, as plain data, of each stage of a method."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adamerge.errors import AdamergeError, ConfigError
from adamerge.io.unwritten import IMPORTANCE, PREVIOUS, TASK_VECTORS
from adamerge.runs.command_line import Words, stage_of, told_apart
from adamerge.runs.config_files import read_config, stages_of, with_texts
from adamerge.runs.former_keys import renewed_key, renewed_keys
from adamerge.runs.help import near_key
from adamerge.runs.overrides import as_text, as_yaml, overlaid, overridden

TOP = ("model", "data", "trainer", "tasks", "leave_out", "runs", "name", "id", "seed", "seed_everything")
"""First parts of every key that a configuration may have."""
DEFAULTS = {"data": "adamerge.NoData", "model.search": "adamerge.Descent"}
"""Classes where none is named."""
SOLVED = "adamerge.StartAlone"
"""How the one task vector that a solver writes is merged."""


@dataclass(frozen=True)
class Configuration:
    """The configuration of a fit, or of one stage of it.

    Attributes:
        files: where it stands, laid over each other in this order.
        words: overrides, laid over these.
        number: of the stage, from 1; 0 where the method has none.
        file: of the stage.
        replacements: marks such as ``{previous}`` and the paths that they stand for, where these are known.
    """

    files: tuple[Path, ...]
    words: tuple[str, ...]
    number: int = 0
    file: Path | None = None
    replacements: tuple[tuple[str, str], ...] = ()

    @property
    def content(self) -> dict[str, Any]:
        """The whole configuration for the parser, in which the values of overrides are texts."""
        return self._laid(as_text)

    @property
    def plain(self) -> dict[str, Any]:
        """The whole configuration as plain data, with values as YAML has them."""
        return self._laid(as_yaml)

    def placed(self, replacements: Mapping[str, str]) -> Configuration:
        """Returns the same configuration with marks such as ``{previous}`` replaced by these paths."""
        return Configuration(self.files, self.words, self.number, self.file, tuple(replacements.items()))

    @contextmanager
    def named(self) -> Iterator[None]:
        """Puts the number and file of the stage in front of an error raised in the block."""
        try:
            yield
        except AdamergeError as error:
            if not self.number:
                raise
            own = f"{error.todo or ''} (--{self.number}.KEY is for stage {self.number} alone)".strip()
            raise error.told_of(f"stage {self.number}, {self.file}", None if self.number == 1 else own) from error

    def _laid(self, read: Any) -> dict[str, Any]:
        config: dict[str, Any] = {}
        for file in self.files:
            config = overlaid(config, renewed_keys(_opened(read_config(file))))
        words = [word[2:].partition("=") for word in self.words]
        config = _opened(overridden(config, [f"--{renewed_key(key)}={value}" for key, _, value in words], read))
        return with_texts(_with_defaults(config), self._replaced)

    def _replaced(self, text: str) -> str:
        for mark, path in self.replacements:
            text = text.replace(mark, path)
        return text


def configurations(arguments: Sequence[str] | Words, verb: str = "fit") -> list[Configuration]:
    """Returns the configuration of each stage of a method; a single one where it has no stages.

    No library is loaded for it, and no class looked up.

    Args:
        arguments: of the command line.
        verb: which is called; for what is said.

    Raises:
        ConfigError: a file cannot be read, a key has an unknown beginning, a stage is not there, the first one speaks of one
            before it, or base, experts or method are in none of the files.
    """
    words = arguments if isinstance(arguments, Words) else told_apart(arguments)
    if len(words.folders) > 1:
        raise ConfigError(f"at most one folder of stages, got {[str(folder) for folder in words.folders]}")
    stages: Sequence[Path | None] = stages_of(words.folders[0]) if words.folders else [None]
    every = []
    for number, stage in enumerate(stages, 1 if words.folders else 0):
        files = [stage if stage is not None and Path(file).is_dir() else Path(file) for file in words.files]
        every.append(Configuration(tuple(files), tuple(words.of_stage(number)), number, stage))
    for file in {file: None for one in every for file in one.files}:
        for key in read_config(file):
            if renewed_key(str(key)).partition(".")[0] not in TOP:
                raise unknown_key(str(key), f"{file}: '{key}'")
    _refuse_words(words, len(stages) if words.folders else 0)
    if words.flags and not words.files:
        return every
    first = every[0].plain
    marks = [mark for mark in (PREVIOUS, IMPORTANCE) if mark in str(first)]
    if marks:
        where = f"{every[0].file}: the first stage" if words.folders else f"{marks[0]}: a method without stages"
        raise ConfigError(f"{where} has no stage before it", expected="no {previous}, no {importance}")
    _refuse_unsolved(every)
    if "--help" not in words.flags:
        _require(first, words.files, verb)
    return every


def unknown_key(key: str, where: str) -> ConfigError:
    """Returns the error for a key that no configuration has.

    Args:
        key: which.
        where: begins the error: where the key stands, and the key.
    """
    near = near_key(key)
    return ConfigError(
        f"{where} is no key" + (f"; did you mean '{near}'?" if near else ""),
        expected=None if near else f"one of {', '.join(TOP)}, or what is below them",
        todo=None if near else "adamerge fit --help lists the keys",
    )


def _refuse_words(words: Words, stages: int) -> None:
    for word in words.overrides:
        number, (whole, _, _) = stage_of(word), word[2:].partition("=")
        key = whole.partition(".")[2] if number is not None else whole
        if number is not None and not 1 <= number <= stages:
            raise ConfigError(
                f"--{number}.{key}: there is no stage {number} to override",
                expected=f"1 to {stages}" if stages else "a method that is a folder of stages",
                got=number,
                todo=None if stages else f"--{key} is for a method that is a file",
            )
        if renewed_key(key).partition(".")[0].rstrip("+") not in TOP:
            raise unknown_key(key.rstrip("+"), f"--{key.rstrip('+')}")


def _refuse_unsolved(stages: Sequence[Configuration]) -> None:
    """Refuses ``{task_vectors}`` where no stage before it has a solver."""
    solvers = False
    for stage in stages:
        content = stage.plain
        if TASK_VECTORS in str(content) and not solvers:
            raise ConfigError(
                f"{stage.file or TASK_VECTORS}: {TASK_VECTORS} stands for what an earlier stage's solver has written",
                expected="a stage before it that has model.solver",
                got="none",
                todo="put a stage with a solver before it, or name a file of task vectors",
            )
        solvers = solvers or bool((content.get("model") or {}).get("solver"))


def _require(config: Mapping[str, Any], files: Sequence[str], verb: str) -> None:
    model = config.get("model")
    for key in ("task_vectors", "parametrization"):
        if not isinstance(model, dict) or not model.get(key):
            raise ConfigError(
                f"model.{key} is in none of {list(files)}",
                todo=f"give a pool (what is merged) and a method (how): adamerge {verb} POOL METHOD",
            )


def _opened(config: dict[str, Any]) -> dict[str, Any]:
    """Returns a configuration in which sections that name a file, as ``model: model.yaml``, hold its content."""
    named = {key: config[key] for key in ("model", "data", "trainer") if isinstance(config.get(key), str)}
    return {
        **config,
        **{key: read_config(Path(name)) for key, name in named.items() if name.endswith((".yaml", ".yml"))},
    }


def _with_defaults(config: dict[str, Any]) -> dict[str, Any]:
    data, model = config.get("data"), config.get("model")
    if data is None or data == {}:
        config = {**config, "data": {"class_path": DEFAULTS["data"]}}
    if isinstance(model, dict):
        search = overlaid({"class_path": DEFAULTS["model.search"]}, model.get("search") or {})
        model = {**model, "search": search}
        if model.get("solver"):  # one vector comes out of it, which is merged as it is
            model["parametrization"] = _solved(model.get("parametrization") or {})
        config = {**config, "model": model}
    return config


def _solved(given: Any) -> dict[str, Any]:
    """Returns the parametrization of a stage with a solver, which may not be chosen."""
    told = given.get("class_path") if isinstance(given, dict) else given
    if given and told != SOLVED:
        raise ConfigError(
            "model.parametrization does not go with model.solver: what a solver writes is merged as it is",
            got=str(told or given)[:200],
            todo="give the vector a strength with adamerge.Scaled around the solver, or weigh it in a later stage",
        )
    return {"class_path": SOLVED}
