"""Checks of a fit before anything is written: that model, search, objective, data and precision go together."""

from __future__ import annotations

import copy
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import distributed, nn

from adamerge.checkpoints.name_patterns import excluding
from adamerge.data import Calibration, NoData
from adamerge.errors import CheckpointError, ConfigError, did_you_mean
from adamerge.merging.footprint import units_of
from adamerge.merging.memory_plan import Plan
from adamerge.merging.merged_model import MergedModel
from adamerge.objectives import Objective
from adamerge.parametrizations import Parametrization
from adamerge.precision import check_precision
from adamerge.task_vectors.memory import Memory
from adamerge.task_vectors.task_vectors import TaskVectors
from adamerge.training.merging import Merging, Method
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


class FitSettings(NamedTuple):
    """Settings of a trainer, which need not be there yet, that the checks of a fit depend on.

    Attributes:
        steps: of the fit.
        precision: as Lightning names it.
        clipped: whether gradients are clipped.
        validated: whether the validation split is scored.
    """

    steps: int
    precision: str
    clipped: bool
    validated: bool

    @classmethod
    def of(cls, trainer: Trainer) -> FitSettings:
        """Returns the settings that the checks of a fit ask of this trainer."""
        clipped, validated = bool(trainer.gradient_clip_val), trainer.limit_val_batches != 0
        return cls(trainer.max_steps, str(trainer.precision), clipped, validated)


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
    check_method(merging, merged.task_vectors.experts, merged.dtype, data, tuple(data.tasks), fit)
    if objective is not None:
        _check_heads(merged)
        check_learned(merging.search, merged.parametrization)
    if objective is not None or merging.recalibrate_buffers:
        data.check(merged.backbone, objective is not None and fit.validated)
    if objective is not None:
        for task in data.fitted:
            objective.check(task, data.samples(task, "calibration"), len(data.tasks[task].classnames))


def check_method(
    method: Method,
    experts: Collection[str],
    dtype: torch.dtype,
    data: Calibration,
    tasks: Collection[str],
    fit: FitSettings,
) -> None:
    """Checks what is known of a fit while no model and no data are opened.

    Args:
        method: how is merged, and what drives it.
        experts: names of those that are merged.
        dtype: of the merged copy.
        data: on which it is learned.
        tasks: names of those that the data have.
        fit: of the trainer.

    Raises:
        ConfigError: the parts do not go together.
    """
    objective = method.objective
    if isinstance(data, NoData) and (objective is not None or method.recalibrate_buffers):
        what = f"model.objective={type(objective).__name__}" if objective is not None else "model.recalibrate_buffers"
        raise ConfigError(
            f"{what} needs data, and there are none",
            expected="a data section in the pool",
            got="data: null",
            todo="add one, or leave out what needs it: a method without an objective merges base and experts alone",
        )
    if objective is None:
        return
    _check_search(method, data.batch_size, fit)
    check_precision(fit.precision, dtype)
    _check_objective(method, objective, experts, data, tasks)
    _check_tasks(method, experts, data, tasks)


@dataclass(frozen=True)
class _Parameters:
    """A parametrization without a network, for a search that only looks at what it would learn."""

    parametrization: Parametrization

    def trained(self) -> list[nn.Parameter]:
        """Returns the parameters of the parametrization that are not frozen."""
        return [parameter for parameter in self.parametrization.parameters() if parameter.requires_grad]


def check_learned(search: Search, parametrization: Parametrization) -> None:
    """Checks whether a parametrization, which may have no storage, has what a search learns.

    Raises:
        ConfigError: it has not.
    """
    parameters = _Parameters(parametrization)
    if not parameters.trained():
        raise ConfigError(
            f"{type(parametrization).__name__}: nothing is left to learn",
            todo="leave out Frozen or mask_from, or the objective",
        )
    copy.copy(search).begin(parameters)


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


def _check_search(method: Method, batch_size: int, fit: FitSettings) -> None:
    """Refuses numbers of the search that do not go with the fit, and what only some searches can do."""
    search = method.search
    kind = type(search).__name__
    if fit.clipped and not search.automatic:
        raise ConfigError(
            f"trainer.gradient_clip_val is not for {kind}, whose steps have other gradients than one",
            todo="leave it out",
        )
    if method.penalty is not None and not search.penalised:
        raise ConfigError(
            f"model.penalty: {kind} minimises the objective alone",
            got=type(method.penalty).__name__,
            todo="leave it out",
        )
    search.check(fit.steps, batch_size)


def _check_tasks(method: Method, experts: Collection[str], data: Calibration, tasks: Collection[str]) -> None:
    """Refuses an expert without data, and a weight whose task does not exist."""
    unknown = [task for task in experts if task not in tasks]
    if unknown and data.only is None:
        raise ConfigError(
            f"expert '{unknown[0]}' has no data",
            expected=f"a task of {list(tasks)}",
            got=unknown,
            todo="if its coefficients shall be learned on other tasks' data, name these in data.only",
        )
    fitted = _fitted(data, tasks)
    strange = sorted((method.task_weights or {}).keys() - set(fitted))
    if strange:
        raise ConfigError(
            f"model.task_weights: the data have no task '{strange[0]}'{did_you_mean(strange[0], fitted)}",
            expected=f"tasks of {fitted}",
            got=strange,
        )


def _fitted(data: Calibration, tasks: Collection[str]) -> list[str]:
    return [task for task in tasks if data.only is None or task in data.only]


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


def _check_objective(
    method: Method, objective: Objective, experts: Collection[str], data: Calibration, tasks: Collection[str]
) -> None:
    """Refuses an objective that lacks the labels or the teachers that it learns from."""
    if objective.labelled != data.labelled:
        raise ConfigError(
            f"{type(objective).__name__} {'needs' if objective.labelled else 'must not see'} labels",
            expected=f"data.labelled={objective.labelled}",
            got=f"data.labelled={data.labelled}",
        )
    if objective.taught and method.copy is not None and method.copy.collective:
        raise ConfigError(
            f"{type(objective).__name__} asks each process for other passes of the experts than the others",
            expected="a copy whose processes do not wait for each other",
            got=f"model.copy={method.copy}",
            todo="set model.copy=adamerge.BlockCopy",
        )
    untaught = [task for task in _fitted(data, tasks) if task not in experts]
    if objective.taught and untaught:
        raise ConfigError(
            f"{type(objective).__name__}: task '{untaught[0]}' has no expert of its name to learn from",
            expected=f"tasks of {list(experts)}",
            got=untaught,
        )
