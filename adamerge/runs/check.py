"""Checking a pool and a method before anything is downloaded or read: all that does not fit, and the plan of what does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jsonargparse import Namespace
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from adamerge.checkpoints.checkpoint import Checkpoint
from adamerge.checkpoints.config_differences import unlike
from adamerge.checkpoints.lora import AdapterCheckpoint
from adamerge.checkpoints.obsolete_tensors import leftovers
from adamerge.data.calibration_rows import sizes
from adamerge.errors import AdamergeError, CheckpointError, ConfigError
from adamerge.io.unwritten import is_unwritten
from adamerge.merging.copies import WholeCopy
from adamerge.merging.footprint import units_by_name
from adamerge.merging.memory_plan import Plan
from adamerge.merging.memory_report import print_plan
from adamerge.runs.class_names import class_named
from adamerge.runs.configuration import Configuration
from adamerge.runs.early_checks import Parts, arguments_made, arguments_of, parts_of, refuse_parts
from adamerge.runs.parser import read
from adamerge.runs.pool import Pool, open_pool
from adamerge.runs.preparation import waiting
from adamerge.runs.trainer_settings import whole_number
from adamerge.task_vectors.memory import size
from adamerge.task_vectors.task_vectors import TaskVectors
from adamerge.training.method_checks import check_learned


def check(stages: Sequence[Configuration]) -> None:
    """Prints whether a pool and a method fit together and what a fit would take, from headers alone.

    Fingerprints, and whether weights are finite, are not looked at: that reads every weight, and ``fit`` does it.

    Args:
        stages: configuration of each stage of the method; one where it has none.

    Raises:
        ConfigError: the configuration cannot be used.
        AdamergeError: base and experts do not fit together, or not with the method; the first of what has been printed.
    """
    console = Console()
    problems: dict[str, AdamergeError] = {}
    opened: dict[str, Checkpoint] = {}
    shown: Any = None
    methods: list[Parts] = []
    for stage, settings in [(stage, read(stage)) for stage in stages]:
        given, awaited = _without_awaited(stage, arguments_of(settings.model.task_vectors))
        refused, parts = _parts(stage, settings)
        methods += [] if parts is None else [parts]
        pool = open_pool(given, opened)
        told = (given, list(pool.experts), list(pool.problems))
        if told != shown:  # stages mostly merge the same
            _print_pool(console, pool)
            _print_notes(console, pool)
            shown = told
        if stage.file is not None and pool.base is not None:
            console.print(f"\n[bold]stage {stage.number} of {len(stages)}: {escape(stage.file.name)}[/bold]")
        if refused is None and (awaited or parts is None):
            console.print("what it takes is known when the stage before it has written its files")
        elif parts is not None and pool.good:
            _print_stage(console, stage, settings, parts, pool)
        for error in (*([] if refused is None else [refused]), *(one for own in pool.problems.values() for one in own)):
            if str(error) not in problems:  # stages share most of them
                console.print(escape(f"problem: {error}"), highlight=False, soft_wrap=True)
                problems[str(error)] = error
    if problems:
        first, count = next(iter(problems.values())), len(problems)
        listed = f"{first.todo or 'correct it'}; all {count} problems are listed above this line"
        raise first.told_of("", listed if count > 1 else None)
    for line in _inputs(methods):
        console.print(escape(line), highlight=False, soft_wrap=True)
    console.print(
        "the models go together; what is not known before a fit: whether weights are finite, the data, and whether the "
        "objective goes with them; nor, before `compare`, whether labels and rows of the heads mean the same"
    )


def _without_awaited(stage: Configuration, given: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Returns arguments of task vectors without experts that an earlier stage is to write, and the names of what it does."""
    experts = dict(given.get("experts") or {})
    awaited = [task for task, source in experts.items() if stage.number > 1 and is_unwritten(source)]
    if is_unwritten(given.get("components")):
        awaited.append("components")
    left = {task: source for task, source in experts.items() if task not in awaited}
    return {**given, "experts": left}, awaited


def _inputs(methods: Sequence[Parts]) -> list[str]:
    """Returns how many inputs each task has to calibrate on, of the first stage that sees data which are at hand."""
    for data in [parts.data for parts in methods if parts.method.sees_inputs]:
        told = [f"{task}: {sizes(data, task)}" for task in data.fitted if data.at_hand(task)]
        rest = [task for task in data.fitted if not data.at_hand(task)]
        return [
            *told,
            *([f"{', '.join(rest)}: calibration inputs are counted when a fit opens the data"] if rest else []),
        ]
    return []


def _parts(stage: Configuration, settings: Namespace) -> tuple[AdamergeError | None, Parts | None]:
    """Returns the error that refuses the method, and the parts that could be made; neither where a file is awaited."""
    parts = None
    try:
        with stage.named(), waiting(stage):
            parts = parts_of(settings)
            refuse_parts(settings, parts)
    except AdamergeError as error:
        return error, parts
    return None, parts


def _print_stage(console: Console, stage: Configuration, settings: Namespace, parts: Parts, pool: Pool) -> None:
    """Prints what a fit on the mergeable experts will take; an error of the method is added to the pool's problems."""
    plan = None
    try:
        with stage.named(), waiting(stage):
            plan = plan_of(settings, parts, pool)
    except AdamergeError as error:
        if not (pool.problems and isinstance(error, ConfigError) and "expert" in error.what):
            pool.add("method", error)  # else it misses an expert that is told of already
        return
    if plan is None:
        console.print("what it takes is known when the stage before it has written its files")
    elif parts.method.solver is not None:
        kind, what = type(parts.method.solver).__name__, "components of each expert"
        what = "one task vector of all experts" if parts.method.solver.single else what
        seen = ", and sees unlabelled inputs" if parts.method.sees_inputs else ""
        console.print(f"nothing is learned: {kind} writes {what}, tensor by tensor{seen}")
    elif parts.method.objective is None:
        console.print(
            "nothing is learned: a fit writes the coefficients as they are and loads no weights, and an export merges "
            "tensor by tensor"
        )
    else:
        print_plan(plan, parts.method.micro_batch)
        if _accelerator(settings) in {"gpu", "cuda"} and plan.device.type == "cpu":
            console.print("warning: trainer.accelerator is a GPU, and there is none here: this is the plan of the CPU")


def plan_of(settings: Namespace, parts: Parts, pool: Pool) -> Plan:
    """Returns the memory plan of a fit on the experts that can be merged.

    Raises:
        AdamergeError: the method does not go with them.
    """
    assert pool.base is not None
    spec, method = settings.model.task_vectors, parts.method
    given = arguments_made(class_named("model.task_vectors", spec.class_path, TaskVectors), spec.init_args)
    vectors = TaskVectors(
        pool.base,
        pool.good,
        given["transforms"],
        given["include"],
        given["exclude"],
        start=given.get("start"),
        components=given.get("components"),
    )
    with torch.device("meta"):  # a mask has a logit for every weight
        parametrization = method.parametrization(vectors)
    if method.objective is not None:
        check_learned(method.search, parametrization)
    copy = WholeCopy() if method.copy is None else method.copy
    dtype = getattr(torch, str(arguments_of(settings.model.backbone).get("dtype") or "float32"), torch.float32)
    device = _device(settings)
    local_world_size, machines = _processes(settings, device)
    return Plan.of(
        vectors,
        parametrization,
        units=units_by_name(vectors, dtype),
        device=device,
        storage=copy.storage_for(method.storage),
        copy=copy,
        processes=local_world_size * machines,
        local_world_size=local_world_size,
    )


def _accelerator(settings: Namespace) -> str:
    return str(settings.trainer.accelerator)


def _device(settings: Namespace) -> torch.device:
    """Returns the device that a fit on this machine would run on."""
    wanted = _accelerator(settings)
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def _processes(settings: Namespace, device: torch.device) -> tuple[int, int]:
    """Returns the local world size of a fit, processes on one machine, and the number of machines."""
    trainer = vars(settings.trainer)
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
    """Prints notes on what does not hinder a merge, but may make the merged model a poor one."""
    if pool.base is None:
        return
    for task, expert in pool.experts.items():
        for note in (*leftovers(pool.base, expert), *unlike(pool.base, expert)):
            console.print(escape(f"note: expert '{task}': {note}"), highlight=False, soft_wrap=True)


def _described(checkpoint: Checkpoint) -> str:
    """Describes a checkpoint by number of tensors, size and dtypes; an adapter by number of tensors and ranks."""
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
