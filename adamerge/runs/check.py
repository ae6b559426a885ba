"""Checking a pool and a method before anything is downloaded or read: all that does not fit, and the plan of what does."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from adamerge.checkpoints.checkpoint import Checkpoint
from adamerge.checkpoints.config_differences import unlike
from adamerge.checkpoints.lora import AdapterCheckpoint
from adamerge.checkpoints.obsolete_tensors import leftovers
from adamerge.errors import AdamergeError, CheckpointError, ConfigError
from adamerge.merging.copies import Copy, WholeCopy
from adamerge.merging.footprint import units_by_name
from adamerge.merging.memory_plan import Plan
from adamerge.merging.memory_report import print_plan
from adamerge.parametrizations import Parametrization, ParametrizationFactory
from adamerge.precision import check_precision
from adamerge.runs.config_files import overlaid, overridden, read_config, stages_of
from adamerge.runs.instantiate import make_part
from adamerge.runs.pool import Pool, arguments_of, narrow, open_pool
from adamerge.runs.trainer_settings import check_length, whole_number
from adamerge.task_vectors.memory import size
from adamerge.task_vectors.storage import Storage
from adamerge.task_vectors.task_vectors import TaskVectors
from adamerge.transforms import Transform


def check(files: Sequence[Path], overrides: Sequence[str]) -> None:
    """Print what of a pool and a method fits together and what it will take; from headers alone.

    Fingerprints, and whether weights are finite, are not looked at: that reads every weight, and ``fit`` does it.

    Args:
        files: of the pool, the method, and others; a method may be a folder of stages.
        overrides: ``--key=value``; ``--2.key=value`` is for the second stage.

    Raises:
        CheckpointError: base and experts do not fit together; after everything has been printed.
        ConfigError: the configuration cannot be used; likewise.
    """
    stages = _stages(files, overrides)
    console = Console()
    found: dict[str, AdamergeError] = {}
    opened: dict[str, Checkpoint] = {}
    shown: Any = None
    for number, (name, config) in enumerate(stages, 1):
        pool = open_pool(config, opened)
        told = (config["model"]["task_vectors"], list(pool.experts), list(pool.problems))
        if told != shown:  # stages mostly merge the same
            _print_pool(console, pool)
            _print_notes(console, pool)
            shown = told
        if len(stages) > 1 and pool.base is not None:
            console.print(f"\n[bold]stage {number} of {len(stages)}: {escape(name)}[/bold]")
        plan = plan_of(config, pool)
        if plan is not None and not config["model"].get("objective"):
            console.print(
                "nothing is learned: a fit writes the coefficients as they are and loads no weights, and an export merges "
                "tensor by tensor"
            )
        elif plan is not None:
            print_plan(plan, config["model"].get("micro_batch"))
            if _accelerator(config) in {"gpu", "cuda"} and plan.device.type == "cpu":
                console.print(
                    "warning: trainer.accelerator is a GPU, and there is none here: this is the plan of the CPU"
                )
        for error in (error for errors in pool.problems.values() for error in errors):
            if str(error) not in found:  # stages share most of them
                console.print(escape(f"problem: {error}"), highlight=False, soft_wrap=True)
                found[str(error)] = error
    if found:
        first, count = next(iter(found.values())), len(found)
        kind = CheckpointError if any(isinstance(one, CheckpointError) for one in found.values()) else ConfigError
        raise kind(
            f"{count} problem{'s' if count > 1 else ''}, the first: {first.what}", todo="all are listed above this line"
        )
    console.print(
        "the models go together; what is not known before a fit: whether weights are finite, the data, and whether the "
        "objective goes with them; nor, before `compare`, whether labels and rows of the heads mean the same"
    )


def plan_of(config: Mapping[str, Any], pool: Pool) -> Plan | None:
    """What learning will take, of the experts that can be merged; what the method cannot do is noted."""
    model, given = config["model"], arguments_of(config["model"]["task_vectors"])
    if pool.base is None or not pool.good:
        return None
    try:
        transforms = [
            make_part(spec, Transform, f"model.task_vectors.transforms[{i}]")
            for i, spec in enumerate(given.get("transforms") or ())
        ]
        copy = WholeCopy() if model.get("copy") is None else make_part(model["copy"], Copy, "model.copy")
        storage = None if model.get("storage") is None else make_part(model["storage"], Storage, "model.storage")
        storage = copy.storage_for(storage)
        include, exclude = given.get("include") or (), given.get("exclude") or ()
        vectors = TaskVectors(pool.base, pool.good, transforms, include, exclude)
        with torch.device("meta"):  # a mask has a logit for every weight
            parametrization = _parametrization(model.get("parametrization"), vectors)
    except AdamergeError as error:
        if not (pool.problems and isinstance(error, ConfigError) and "expert" in error.what):
            pool.add("method", error)  # else it misses an expert that is told of already
        return None
    backbone = arguments_of(model.get("backbone") or {})
    dtype = getattr(torch, str(backbone.get("dtype") or "float32"), torch.float32)
    if model.get("objective"):
        _check_trainer(config.get("trainer") or {}, dtype, pool)
    device = _device(config)
    local_world_size, machines = _processes(config, device)
    units = units_by_name(vectors, dtype)
    return Plan.of(
        vectors,
        parametrization,
        units=units,
        device=device,
        storage=storage,
        copy=copy,
        processes=local_world_size * machines,
        local_world_size=local_world_size,
    )


def _check_trainer(trainer: Mapping[str, Any], dtype: torch.dtype, pool: Pool) -> None:
    """What a fit would refuse of the trainer's settings is noted."""
    for look in (partial(check_length, trainer), partial(check_precision, str(trainer.get("precision")), dtype)):
        try:
            look()
        except ConfigError as error:
            pool.add("method", error)


def _parametrization(spec: Any, vectors: TaskVectors) -> Parametrization:
    """Made for these task vectors; what stands for a file of an earlier stage is counted at its most."""
    waiting: list[str] = []
    factory: ParametrizationFactory = make_part(
        _without_files(spec, vectors, waiting), Parametrization, "model.parametrization"
    )
    found = factory(vectors)
    if "mask_from" in waiting:  # a mask from a file is constant
        for logits in found.masks().values():
            logits.requires_grad_(False)
    return found


def _without_files(spec: Any, vectors: TaskVectors, waiting: list[str]) -> Any:
    """A part's description without ``{previous}`` and ``{importance}``; the arguments they were given to are added."""
    if not isinstance(spec, Mapping):
        return spec
    found = {key: _without_files(value, vectors, waiting) for key, value in spec.items()}
    for key in ("mask_from", "importance"):
        if "{" in str(found.get(key, "")) and not isinstance(found[key], Mapping):
            waiting.append(key)
            del found[key]
            if key == "importance":
                found |= {"importance": dict.fromkeys(vectors, 1.0), "kappa": 0.0}
    return found


def _stages(files: Sequence[Path], overrides: Sequence[str]) -> list[tuple[str, dict[str, Any]]]:
    """Name and whole configuration of each stage; one where no method is a folder."""
    folders = [path for path in files if path.is_dir()]
    if len(folders) > 1:
        raise ConfigError(f"at most one folder of stages, got {[str(folder) for folder in folders]}")
    methods = stages_of(folders[0]) if folders else [None]
    numbered = {int(given[1]) for word in overrides if (given := re.match(r"--(\d+)\.", word))}
    beyond = sorted(numbered - set(range(1, len(methods) + 1)))
    if beyond:
        raise ConfigError(f"there is no stage {beyond[0]} to override", expected=f"1 to {len(methods)}", got=beyond[0])
    found = []
    for number, method in enumerate(methods, 1):
        config: dict[str, Any] = {}
        for path in files:
            config = overlaid(config, read_config(method if method is not None and path.is_dir() else path))
        own = [re.sub(rf"^--{number}\.", "--", word) for word in overrides if re.match(rf"--{number}\.", word)]
        common = [word for word in overrides if not re.match(r"--\d+\.", word)]
        config = overridden(config, [*common, *own])
        _require(config, files)
        narrow(config)
        found.append((method.name if method is not None else "", config))
    return found


def _require(config: Mapping[str, Any], files: Sequence[Path]) -> None:
    model = config.get("model")
    for key in ("task_vectors", "parametrization"):
        if not isinstance(model, Mapping) or not model.get(key):
            raise ConfigError(
                f"model.{key} is in none of {[str(path) for path in files]}",
                todo="give a pool (what is merged) and a method (how): adamerge check POOL METHOD",
            )


def _accelerator(config: Mapping[str, Any]) -> str:
    return str((config.get("trainer") or {}).get("accelerator", "auto"))


def _device(config: Mapping[str, Any]) -> torch.device:
    """Where a fit on this machine would run."""
    wanted = _accelerator(config)
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def _processes(config: Mapping[str, Any], device: torch.device) -> tuple[int, int]:
    """Of a fit on each machine, and machines."""
    trainer = config.get("trainer") or {}
    devices, machines = trainer.get("devices", "auto"), whole_number(trainer, "num_nodes", 1)
    if isinstance(devices, str) and "," in devices:
        devices = [word for word in devices.split(",") if word.strip()]
    if isinstance(devices, list):
        return max(1, len(devices)), machines
    if str(devices) in {"auto", "-1", "None"}:
        return max(1, torch.cuda.device_count()) if device.type == "cuda" else 1, machines
    return max(1, whole_number(trainer, "devices", 1)), machines


def _print_pool(console: Console, pool: Pool) -> None:
    if pool.base is not None:
        console.print(escape(f"base: {pool.base.location}, {_described(pool.base)}"), highlight=False)
    table = Table("expert", "holds", "verdict", box=None)
    for task in dict.fromkeys([*pool.experts, *(who for who in pool.problems if who not in {"base", "method"})]):
        expert, count = pool.experts.get(task), len(pool.problems.get(task, ()))
        holds = "cannot be opened" if expert is None else _described(expert)
        table.add_row(escape(task), holds, f"{count} problem{'s' if count > 1 else ''}" if count else "fits")
    console.print(table)


def _print_notes(console: Console, pool: Pool) -> None:
    """What is no problem for a merge, and may be one of what is merged."""
    if pool.base is None:
        return
    for task, expert in pool.experts.items():
        for note in (*leftovers(pool.base, expert), *unlike(pool.base, expert)):
            console.print(escape(f"note: expert '{task}': {note}"), highlight=False, soft_wrap=True)


def _described(checkpoint: Checkpoint) -> str:
    """Number of tensors, size and dtypes; of an adapter, its factors and ranks."""
    if isinstance(checkpoint, AdapterCheckpoint):
        ranks = sorted({pair.rank for pair in checkpoint.pairs.values()})
        return f"LoRA of {len(checkpoint.pairs)} tensors, rank {', '.join(map(str, ranks))}"
    try:
        dtypes = {name: checkpoint.dtype(name) for name in checkpoint}
    except CheckpointError as error:
        return f"{len(checkpoint)} tensors, {error.what}"
    kinds = sorted({str(dtype).removeprefix("torch.") for dtype in dtypes.values() if dtype.is_floating_point})
    nbytes = sum(checkpoint.shape(name).numel() * dtype.itemsize for name, dtype in dtypes.items())
    return f"{len(checkpoint)} tensors, {size(nbytes)}, {', '.join(kinds)}"
