"""Checks of a method that open no model and no data: that search, objective, penalty, data and precision go together."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from adamerge.artifacts.recipe import plain_data
from adamerge.data import Calibration, NoData
from adamerge.errors import ConfigError, did_you_mean
from adamerge.io.task_vector_file import holds_task_vectors
from adamerge.objectives import Objective
from adamerge.parametrizations import Parametrization
from adamerge.precision import check_precision
from adamerge.solvers import TaskVectorWriter
from adamerge.training.merging import Method
from adamerge.training.search import Search

if TYPE_CHECKING:  # a configuration is checked without Lightning
    from lightning import Trainer


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


def check_method(
    method: Method,
    experts: Mapping[str, object],
    dtype: torch.dtype,
    data: Calibration,
    *,
    tasks: Collection[str] | None = None,
    fit: FitSettings,
) -> None:
    """Checks what is known of a fit while no model and no data are opened.

    Args:
        method: how is merged, and what drives it.
        experts: files, folders or Hub ids of those that are merged, by name.
        dtype: of the merged copy.
        data: on which it is learned.
        tasks: names of those that the data have, where they are known; the data are asked when None, which may open them, and
            only where something is learned.
        fit: of the trainer.

    Raises:
        ConfigError: the parts do not go together.
    """
    objective = method.objective
    if method.solver is not None:
        _check_solver(method, method.solver)
    if isinstance(data, NoData) and method.sees_inputs:
        seeing = {"model.objective": objective, "model.solver": method.solver}
        named = [f"{key}={type(part).__name__}" for key, part in seeing.items() if part is not None]
        what = named[0] if named else "model.recalibrate_buffers"
        raise ConfigError(
            f"{what} needs data, and there are none",
            expected="a data section in the pool",
            got="data: null",
            todo="add one, or leave out what needs it: a method without an objective merges base and experts alone",
        )
    if objective is None and (method.solver is None or not method.sees_inputs):
        return
    tasks = tuple(data.tasks) if tasks is None else tasks
    if objective is None:
        _check_seen(type(method.solver).__name__, experts, data, tasks)
        _check_tasks(method, experts, data, tasks)
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


def _check_solver(method: Method, solver: TaskVectorWriter) -> None:
    """Refuses what does not go with a solver, whose task vectors take the place of the experts'."""
    kind = type(solver).__name__
    other = {
        "model.objective": method.objective,
        "model.init_from": method.init_from,
        "model.recalibrate_buffers": method.recalibrate_buffers or None,
    }
    for key, value in other.items():
        if value is not None:
            raise ConfigError(
                f"{key} does not go with model.solver={kind}: a solver is a stage of its own",
                todo="make the method a folder of stages, and name the solver's file {task_vectors} in the second",
            )
    if solver.sees_inputs and method.copy is not None and not method.copy.whole:
        raise ConfigError(
            f"{kind} runs whole models one after the other in one copy",
            expected="model.copy=adamerge.WholeCopy",
            got=f"model.copy={method.copy}",
            todo="leave it out",
        )
    plain_data(solver, "written into a file of task vectors")


def _check_tasks(method: Method, experts: Mapping[str, object], data: Calibration, tasks: Collection[str]) -> None:
    """Refuses an expert without data, unless it is a solver's vector, and a weight whose task does not exist."""
    unknown = [task for task, source in experts.items() if task not in tasks and not holds_task_vectors(source)]
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
    if method.views is not None and objective.labelled:
        raise ConfigError(
            f"{type(objective).__name__} learns from labels, and they are those of the samples as they are",
            got=f"model.views={type(method.views).__name__}",
            todo="leave out model.views",
        )
    if method.views is not None and objective.taught and not method.teaching().changing:
        raise ConfigError(
            f"model.teachers={type(method.teaching()).__name__} runs a sample once, and model.views changes it in each step",
            expected="model.teachers=adamerge.TeachersAhead",
            got=f"model.views={type(method.views).__name__}",
            todo="leave out model.teachers, or model.views",
        )
    if objective.taught:
        _check_taught(type(objective).__name__, experts, data, tasks)


def _check_seen(kind: str, experts: Collection[str], data: Calibration, tasks: Collection[str]) -> None:
    """Refuses data of which a solver may not see all that it would be handed, or that it has no expert for."""
    if data.labelled:
        raise ConfigError(f"{kind} must not see labels", expected="data.labelled=False", got="data.labelled=True")
    _check_taught(kind, experts, data, tasks)


def _check_taught(kind: str, experts: Collection[str], data: Calibration, tasks: Collection[str]) -> None:
    """Refuses tasks without an expert of their own."""
    untaught = [task for task in _fitted(data, tasks) if task not in experts]
    if untaught:
        raise ConfigError(
            f"{kind}: task '{untaught[0]}' has no expert of its name to learn from",
            expected=f"tasks of {list(experts)}",
            got=untaught,
        )
