"""Merging: what is merged, how, and what drives it: everything of a fit but its data and its trainer."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from adamerge.backbones import Backbone
from adamerge.errors import ConfigError
from adamerge.merging.block_execution import Passes
from adamerge.merging.copies import Copy
from adamerge.objectives import Objective, View
from adamerge.objectives.penalties import Penalty
from adamerge.parametrizations import ParametrizationFactory
from adamerge.solvers import TaskVectorWriter
from adamerge.task_vectors.storage import Storage
from adamerge.task_vectors.task_vectors import TaskVectors
from adamerge.training.descent import Descent
from adamerge.training.search import Search
from adamerge.training.task_balance import EqualAtStart
from adamerge.training.teacher_cache import TeacherCache
from adamerge.training.teachers import Teachers
from adamerge.training.teachers_ahead import TeachersAhead


@dataclass(eq=False, kw_only=True)
class Method:
    """How task vectors are merged, and what drives it; which network, base and experts is not said.

    Args:
        parametrization: which elements share a coefficient.
        objective: what drives the coefficients; None keeps the initial ones and opens no data.
        search: how they are learned.
        solver: writes new task vectors, one of all or each expert's components, for a later stage; instead of an objective.
            It may see inputs.
        penalty: on the coefficients.
        views: how the samples are changed anew in each step, for the merged model and its teachers alike; they are seen as
            they are when None.
        task_weights: weight of a task's mean in the sum; 1 where a task is not named, negative to move away from it.
        balance: weights of tasks beside these, from the sizes of their first losses; none when None.
        micro_batch: samples per forward pass, of whatever task, those of like length together; all of the step's samples at
            once when None. Either way a pass of the whole copy is cut where that saves more positions of padding than a pass
            costs: 64 on a CPU, 4,096 elsewhere.
        storage: where the deltas are between merges, and in how many bits; the fastest exact one that fits when None.
        copy: whether the merged copy exists at once, block by block, or in parts over processes; at once when None.
        passes: how the network's blocks run, checkpointed or compiled; as they are when None.
        init_from: a coefficient file of the same groups and experts to start from.
        teachers: where outputs of the experts are kept, for objectives that align with them; when None, in memory, of each
            sample once, or with ``views`` of some steps ahead.
        recalibrate_buffers: after the fit, recompute the running statistics of batch normalisation on calibration inputs and
            keep them with the coefficients; the base's when False. During the fit they are the base's in any case.
        hold: keep coefficients where they begin whose gradient is nothing but rounding, or that weigh nothing.

    Raises:
        ConfigError: a number is out of range.
    """

    parametrization: ParametrizationFactory
    objective: Objective | None = None
    search: Search = field(default_factory=Descent)
    solver: TaskVectorWriter | None = None
    penalty: Penalty | None = None
    views: View | None = None
    task_weights: dict[str, float] | None = None
    balance: EqualAtStart | None = None
    micro_batch: int | None = None
    storage: Storage | None = None
    copy: Copy | None = None
    passes: Passes | None = None
    init_from: str | Path | None = None
    teachers: Teachers | None = None
    recalibrate_buffers: bool = False
    hold: bool = True

    def __post_init__(self) -> None:
        if self.micro_batch is not None and self.micro_batch < 1:
            raise ConfigError(f"model.micro_batch must be at least 1, got {self.micro_batch}")

    @property
    def sees_inputs(self) -> bool:
        """Returns whether calibration inputs are read, for whatever; else base and experts are all that is seen."""
        solving = self.solver is not None and self.solver.sees_inputs
        return self.objective is not None or self.recalibrate_buffers or solving

    def teaching(self) -> Teachers:
        """Returns the teachers: those given, or the plain ones for samples that change in each step or do not."""
        if self.teachers is not None:
            return self.teachers
        return TeacherCache() if self.views is None else TeachersAhead()


@dataclass(eq=False, kw_only=True)
class Merging(Method):
    """What is merged, how, and what drives it: everything of a fit but its data and its trainer.

    Args:
        backbone: the network.
        task_vectors: base and experts.
    """

    backbone: Backbone
    task_vectors: TaskVectors
