"""Checks of a fit before anything is written: that model, search, objective, data and precision go together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import distributed

from adamerge.backbones.inputs import stack
from adamerge.checkpoints.name_patterns import excluding
from adamerge.data import Calibration
from adamerge.errors import CheckpointError, ConfigError
from adamerge.merging.footprint import units_of
from adamerge.merging.memory_plan import Plan
from adamerge.merging.merged_model import MergedModel
from adamerge.task_vectors.memory import Memory
from adamerge.task_vectors.task_vectors import TaskVectors
from adamerge.training.merging import Merging
from adamerge.training.method_checks import FitSettings, check_learned, check_method
from adamerge.training.search import Search

if TYPE_CHECKING:  # a configuration is checked without Lightning
    from lightning import Trainer


def planned(merged: MergedModel, trainer: Trainer) -> Plan:
    """Returns what a run of this trainer will take in memory, and which storage fits, without reading a task vector."""
    device = trainer.strategy.root_device
    units = units_of(merged.backbone.network, merged.backbone.tensors(), merged.task_vectors)
    made = merged.copy.footprint(units, trainer.world_size).made
    return Plan.of(
        merged.task_vectors,
        merged.parametrization,
        units=units,
        device=device,
        storage=merged.storage,
        copy=merged.copy,
        processes=trainer.world_size,
        local_world_size=trainer.num_devices,
        taken=Memory(host=made) if device.type == "cpu" else None,
    )


def preflight(merged: MergedModel, merging: Merging, data: Calibration, fit: FitSettings) -> None:
    """Checks everything that is known of a fit before it begins, but for its processes: the one list of these checks.

    Args:
        merged: what is trained.
        merging: whose objective, penalty, task weights and buffers are asked about.
        data: on which it is learned; a sample of every task is looked at.
        fit: of the trainer.

    Raises:
        ConfigError: the parts do not go together.
        DataError: the data cannot be read.
    """
    objective = merging.objective
    # by the names of the models: a transform may make one vector of all, and each task's model still teaches it
    experts = {task: next(iter(model.sources), None) for task, model in merged.task_vectors.checkpoints.items()}
    check_method(merging, experts, merged.dtype, data, fit=fit)
    if objective is not None:
        _check_heads(merged)
        check_learned(merging.search, merged.parametrization)
    if merging.sees_inputs:
        data.check(merged.backbone, objective is not None and fit.validated)
    if objective is not None:
        for task in data.fitted:
            objective.check(task, data.samples(task, "calibration"), len(data.tasks[task].classnames))
            _check_view(merged, merging, data, task)


def _check_view(merged: MergedModel, merging: Merging, data: Calibration, task: str) -> None:
    """Refuses samples of which ``model.views`` cannot be made."""
    if merging.views is None:
        return
    try:
        inputs = stack([data.samples(task, "calibration")[0]])
        merging.views.of(merged.backbone)(inputs, torch.zeros(1, dtype=torch.int64))
    except ConfigError as error:
        raise error.told_of(f"model.views, task '{task}': ") from error


def check_processes(
    merged: MergedModel, search: Search, micro_batch: int | None, batch_size: int, trainer: Trainer
) -> None:
    """Checks what only the trainer knows: whether its processes, as many as they are, can take the fit's steps.

    Args:
        merged: what is trained.
        search: begun.
        micro_batch: samples per forward pass; all when None.
        batch_size: samples per task and step, over all processes.
        trainer: of the fit.

    Raises:
        ConfigError: they cannot.
    """
    if trainer.accumulate_grad_batches != 1:
        raise ConfigError(
            "trainer.accumulate_grad_batches would shorten the fit: a step takes its whole batch",
            expected=1,
            got=trainer.accumulate_grad_batches,
            todo="set model.micro_batch to save memory",
        )
    processes = trainer.world_size
    if processes == 1:
        return
    if trainer._accelerator_connector.use_distributed_sampler:
        raise ConfigError(
            "trainer.use_distributed_sampler: each process takes its part of every step's batch by itself, and a sampler "
            "of the trainer's would take steps away",
            expected=False,
            got=True,
            todo="Trainer(use_distributed_sampler=False)",
        )
    if merged.copy.collective and micro_batch is not None and batch_size % processes:
        raise ConfigError(
            f"data.batch_size: with model.micro_batch, processes of a {merged.copy} would wait for passes that others do "
            "not make",
            expected=f"a multiple of the {processes} processes",
            got=batch_size,
            todo=f"set data.batch_size={processes * max(1, round(batch_size / processes))}",
        )
    search.check(trainer.max_steps, batch_size, processes)


def check_same_models(vectors: TaskVectors) -> None:
    """Checks whether all processes of a run read the same base and experts; every weight is read for it.

    Raises:
        CheckpointError: they do not, on every process the same error.
    """
    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return
    read: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(read, vectors.fingerprints())
    for rank, own in enumerate(read):
        for who in sorted(own.keys() | read[0].keys()):
            if own.get(who) != read[0].get(who):
                raise CheckpointError(
                    f"process {rank} has another {who.removeprefix('the ')} than process 0",
                    expected=f"fingerprint {str(read[0].get(who))[:16]}…",
                    got=f"{str(own.get(who))[:16]}…",
                    todo="give all machines the same files, or name a Hub id with its @revision",
                )


def _check_heads(merged: MergedModel) -> None:
    """Refuses to merge tensors that training does not see: the export would differ from what was trained."""
    vectors = merged.task_vectors
    unseen = [name for name in vectors if not merged.backbone.trains(name)]
    changed = {
        name: [
            task for task, expert in vectors.checkpoints.items() if not torch.equal(expert[name], vectors.base[name])
        ]
        for name in unseen
    }
    heads = [name for name in unseen if changed[name]]
    if heads:
        raise ConfigError(
            f"expert '{changed[heads[0]][0]}' changed '{heads[0]}', on which the merged model's training does not depend",
            todo=f"{excluding(heads, set(vectors).difference(heads))} to leave what training does not see at the base",
        )
