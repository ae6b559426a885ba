"""Merging: what is merged, how, and what drives it: everything of a fit but its data and its trainer."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from adamerge.backbones import Backbone
from adamerge.errors import ConfigError
from adamerge.merging.block_execution import Passes
from adamerge.merging.copies import Copy
from adamerge.objectives import Objective
from adamerge.objectives.penalties import Penalty
from adamerge.parametrizations import ParametrizationFactory
from adamerge.solvers import Solver
from adamerge.task_vectors.storage import Storage
from adamerge.task_vectors.task_vectors import TaskVectors
from adamerge.training.descent import Descent
from adamerge.training.search import Search
from adamerge.training.teacher_cache import TeacherCache


@dataclass(eq=False, kw_only=True)
class Method:
    """How task vectors are merged, and what drives it; which network, base and experts is not said.

    Args:
        parametrization: which elements share a coefficient.
        objective: what drives the coefficients; None keeps the initial ones and opens no data.
        solver: writes one task vector of all, which the parametrization then merges; instead of an objective.
        search: how they are learned.
        penalty: on the coefficients.
        task_weights: weight of a task's mean in the sum; 1 where a task is not named, negative to move away from it.
        micro_batch: samples per forward pass, of whatever task; all of the step's samples at once when None.
        storage: where the deltas are between merges, and in how many bits; the fastest exact one that fits when None.
        copy: whether the merged copy exists at once, block by block, or in parts over processes; at once when None.
        passes: how the network's blocks run, checkpointed or compiled; as they are when None.
        init_from: a coefficient file of the same groups and experts to start from.
        teachers: where outputs of the experts are kept, for objectives that align with them; in memory when None.
        recalibrate_buffers: after the fit, recompute the running statistics of batch normalisation on calibration inputs and
            keep them with the coefficients; the base's when False. During the fit they are the base's in any case.
        hold: keep coefficients where they begin whose gradient is nothing but rounding, or that weigh nothing.

    Raises:
        ConfigError: a number is out of range.
    """

    parametrization: ParametrizationFactory
    objective: Objective | None = None
    solver: Solver | None = None
    search: Search = field(default_factory=Descent)
    penalty: Penalty | None = None
    task_weights: dict[str, float] | None = None
    micro_batch: int | None = None
    storage: Storage | None = None
    copy: Copy | None = None
    passes: Passes | None = None
    init_from: str | Path | None = None
    teachers: TeacherCache | None = None
    recalibrate_buffers: bool = False
    hold: bool = True

    def __post_init__(self) -> None:
        if self.micro_batch is not None and self.micro_batch < 1:
            raise ConfigError(f"model.micro_batch must be at least 1, got {self.micro_batch}")


@dataclass(eq=False, kw_only=True)
class Merging(Method):
    """What is merged, how, and what drives it: everything of a fit but its data and its trainer.

    Args:
        backbone: the network.
        task_vectors: base and experts.
    """

    backbone: Backbone
    task_vectors: TaskVectors
