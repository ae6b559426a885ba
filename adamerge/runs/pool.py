"""A pool as it is configured: base and experts opened from headers, and everything that keeps them from being merged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from adamerge.checkpoints.checkpoint import Checkpoint
from adamerge.checkpoints.compatibility import differences, extra_names, names_to_merge, refuse_extra
from adamerge.checkpoints.hub_headers import open_headers
from adamerge.checkpoints.opening import opening
from adamerge.errors import AdamergeError, CheckpointError, ConfigError
from adamerge.io.untrusted_files import quoted, read_json


@dataclass
class Pool:
    """Base and experts of a configuration, opened as far as they can be.

    Attributes:
        base: None when it cannot be opened.
        experts: those that can be.
        problems: expert to what is wrong with it; what is not an expert's goes by its key of the configuration.
    """

    base: Checkpoint | None = None
    experts: dict[str, Checkpoint] = field(default_factory=dict)
    problems: dict[str, list[AdamergeError]] = field(default_factory=dict)

    def add(self, who: str, error: AdamergeError) -> None:
        """Adds a problem to those of an expert, or of a key of the configuration."""
        self.problems.setdefault(who, []).append(error)

    @property
    def good(self) -> dict[str, Checkpoint]:
        """Experts without a problem, which can be merged, by name."""
        return {task: expert for task, expert in self.experts.items() if task not in self.problems}


def open_pool(given: Mapping[str, Any], opened: dict[str, Checkpoint]) -> Pool:
    """Opens base and experts from headers and compares them; problems are collected, not raised.

    Args:
        given: arguments of the task vectors.
        opened: what other stages have opened, by source; added to.
    """
    pool = Pool()
    include, exclude = given.get("include") or (), given.get("exclude") or ()

    def opened_or_told(who: str, source: Any, whose: str) -> Checkpoint | None:
        key = f"{source} of {given.get('base')}"
        try:
            if not isinstance(source, str):
                raise ConfigError(
                    f"model.task_vectors: {who} is no path",
                    expected="a file, a folder or a Hub id",
                    got=source,
                    todo=f"say where {who} is",
                )
            if key not in opened:
                with opening(whose):
                    opened[key] = open_headers(source, pool.base)
        except AdamergeError as error:
            pool.add(who, error)
            return None
        return opened[key]

    pool.base = opened_or_told("base", given.get("base"), "base")
    if pool.base is None:
        return pool
    for task, source in (given.get("experts") or {}).items():
        expert = opened_or_told(task, source, f"expert '{task}'")
        if expert is not None:
            pool.experts[task] = expert
    try:
        names = names_to_merge(pool.base, pool.experts.values(), include, exclude)
    except AdamergeError as error:
        pool.add("base", error)
        return pool
    for task, expert in pool.experts.items():
        for difference in differences(task, expert, pool.base, names):
            pool.add(task, difference)
        try:
            refuse_extra(task, expert, pool.base, extra_names(pool.base, expert, include, exclude))
        except CheckpointError as error:
            pool.add(task, error)
        if pool.problems.get(task) and (scheme := _quantisation(expert)):
            what = f"expert '{task}' is quantised: its config.json has quantization_config, {scheme}"
            todo = "take the checkpoint that it was made from, or dequantise it; what follows is for that reason"
            pool.problems[task].insert(0, CheckpointError(what, where=expert.location, todo=todo))
    return pool


def _quantisation(expert: Checkpoint) -> str | None:
    """Returns how an expert is quantised, in the words of its ``config.json``; None where it says nothing."""
    for folder in {source.parent for source in expert.sources}:
        if (folder / "config.json").is_file():
            try:
                scheme = read_json(folder / "config.json").get("quantization_config")
            except CheckpointError:  # torn: there are other problems, which are told
                return None
            if isinstance(scheme, dict):
                return f"method {quoted(str(scheme.get('quant_method', 'unknown')))}"
    return None
