"""The linear family: theta0 + sum_k phi(w[k, g]) tau_k; its members differ in which elements share a coefficient."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from adamerge.checkpoints.name_patterns import numbered_prefix
from adamerge.deltas.base import Deltas
from adamerge.deltas.groups import Chunks, Groups, Whole
from adamerge.errors import ConfigError
from adamerge.parametrizations.base import Parametrization
from adamerge.parametrizations.constraints import Constraint, Free
from adamerge.task_vectors.task_vectors import TaskVectors

CLOSE = 1e-3  # 0.333 of three experts is a third


class Linear(Parametrization):
    """One trainable matrix ``w`` ``(experts, all coefficients of an expert)``; each tensor uses the columns of its group.

    Args:
        task_vectors: names and shapes decide the groups.
        init: the initial coefficient; None for 1 / experts, the weight average.
        constraint: from ``w`` to coefficients.

    Raises:
        ConfigError: the constraint cannot hold the initial coefficient; a softmax holds 1 / experts alone.
    """

    def __init__(
        self, task_vectors: TaskVectors, init: float | None = 0.3, constraint: Constraint | None = None
    ) -> None:
        super().__init__()
        self.init, self.constraint = init, constraint if constraint is not None else Free()
        self._groups: dict[str, Groups] = {name: self.groups(name, task_vectors) for name in task_vectors}
        self._index_bytes = sum(groups.index_bytes(task_vectors.shape(n).numel()) for n, groups in self._groups.items())
        self._columns: dict[str, slice] = {}
        self._group_of = {name: self.group(name) for name in task_vectors}
        total = 0
        for name, group in self._group_of.items():
            if group is not None and group not in self._columns:
                self._columns[group] = slice(total, total + self._groups[name].count)
                total += self._groups[name].count
        experts = len(task_vectors.experts)
        wanted = 1 / experts if init is None else init
        if not math.isfinite(wanted):
            raise ConfigError(f"{type(self).__name__}: init must be a finite number, got {init}")
        raw = self.constraint.raw(wanted)
        self._allocate(experts, raw)
        # on the CPU, since a plan makes parametrizations that hold no numbers
        self.initial = float(self.constraint(torch.full((experts, 1), raw, dtype=torch.float32, device="cpu"))[0, 0])
        if abs(self.initial - wanted) > CLOSE * max(1.0, abs(wanted)):
            raise ConfigError(
                f"{type(self.constraint).__name__}: {experts} experts start at {self.initial:.6g} each, and init is {init}",
                todo="pass init=null, which is 1 / experts, or another constraint",
            )

    def _allocate(self, experts: int, raw: float) -> None:
        """Makes the parameters, of one raw value."""
        total = sum(columns.stop - columns.start for columns in self._columns.values())
        self.w = nn.Parameter(torch.full((experts, total), raw, dtype=torch.float32))
        self._views: _Views | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Returns what a copy is made of: views are of this one's parameter."""
        return self.__dict__ | {"_views": None}

    def raw(self, group: str) -> Tensor:
        """Returns the raw values of a group, ``(experts, coefficients of the group)``, differentiable in the parameters."""
        if self._views is None or not self._views.current(self.w):
            self._views = _Views(self.w, self._columns)
        view = self._views.of[group]
        return view.view_as(view)  # a step of its own, so that gradients are added up in the order of the calls

    @abstractmethod
    def group(self, name: str) -> str | None:
        """Returns the name of the group whose coefficients tensor ``name`` uses; None where they stay the initial one."""

    def groups(self, name: str, task_vectors: TaskVectors) -> Groups:
        """Returns how the elements of tensor ``name`` share its group's coefficients."""
        return Whole()

    def shares(self, name: str) -> tuple[Tensor, Groups]:
        """Returns the coefficients of tensor ``name``, ``(experts, count)``, differentiable, and which elements use which."""
        group = self._group_of[name]
        if group is None:
            return self.w.new_full((len(self.w), 1), self.initial), Whole()
        return self.constraint(self.raw(group)), self._groups[name]

    def forward(self, name: str, deltas: Deltas) -> Tensor:
        """Returns the update of tensor ``name``, ``sum_k phi(w[k, g]) tau_k``."""
        return deltas.combine(*self.shares(name))

    def linear(self, name: str) -> tuple[Tensor, Groups] | None:
        """Returns what ``forward`` sums by; None of a subclass whose ``forward`` is another, unless it says so itself."""
        return self.shares(name) if type(self).forward is Linear.forward else None

    @property
    def index_bytes(self) -> int:
        """Returns the bytes that say which coefficient each element uses, where elements are strewn over tensors."""
        return self._index_bytes

    @property
    def transient_per_element(self) -> int:
        """Returns the temporary bytes per element while tensors are summed, of the groups that need most."""
        return max((groups.transient_per_element for groups in self._groups.values()), default=0)

    def coefficients(self) -> dict[str, Tensor]:
        """Returns the coefficients ``phi(w)`` of each group."""
        return {group: self.constraint(self.raw(group)) for group in self._columns}

    def values(self) -> dict[str, Tensor]:
        """Returns the raw values ``w`` of each group."""
        return {group: self.w.detach()[:, columns] for group, columns in self._columns.items()}

    def project_(self) -> None:
        """Projects ``w`` into its constraint's set."""
        for parameter in self.parameters():
            self.constraint.project_(parameter.detach())


class _Views:
    """Views of a matrix's columns, group by group, whose gradients become that of the matrix in one step.

    A slice of its own for each tensor would fill a matrix with zeros for each: coefficients times tensors.

    Args:
        w: the matrix.
        columns: of each group, side by side.
    """

    def __init__(self, w: Tensor, columns: Mapping[str, slice]) -> None:
        self.state = self._state(w)
        self.of = dict(zip(columns, w.split([own.stop - own.start for own in columns.values()], dim=1), strict=True))

    def current(self, w: Tensor) -> bool:
        """Returns whether the views are still those of the matrix, and autograd knows them as it is now."""
        return self.state == self._state(w)

    @staticmethod
    def _state(w: Tensor) -> tuple[object, ...]:
        version = None if w.is_inference() else w._version
        return (
            id(w),
            w.device,
            w.data_ptr(),
            w.dtype,
            version,
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
        )


class TaskWise(Linear):
    """One coefficient per expert, for the whole model.

    Reference: AdaMerging (Yang et al., 2024), https://arxiv.org/abs/2310.02575; constant, it is task arithmetic
    (Ilharco et al., 2023), https://arxiv.org/abs/2212.04089.
    """

    def group(self, name: str) -> str:
        """Returns the name of the one group that all tensors are in."""
        return "model"


class BlockWise(Linear):
    """One coefficient per expert and block: the name up to its first integer; what has none goes by its top module."""

    def group(self, name: str) -> str:
        """Returns the name up to its first integer: ``visual.transformer.resblocks.3`` for its ``mlp.c_fc.weight``."""
        return numbered_prefix(name) or name.split(".")[0]


class LayerWise(Linear):
    """One coefficient per expert and parameter tensor: what the papers call layer-wise (weight and bias each have theirs).

    Reference: AdaMerging (Yang et al., 2024), https://arxiv.org/abs/2310.02575, section 3.2.
    """

    def group(self, name: str) -> str:
        """Returns the tensor's own name, since each tensor is a group of its own."""
        return name


class ChunkWise(Linear):
    """Several coefficients per expert and parameter tensor, one per contiguous chunk of the flattened tensor.

    Args:
        task_vectors: names and shapes decide the groups.
        init: the initial coefficient; None for 1 / experts.
        constraint: from ``w`` to coefficients.
        chunks: of each tensor; a tensor with fewer elements gets one per element.

    Raises:
        ConfigError: chunks is below 1, or the constraint cannot hold the initial coefficient.

    Reference: Expert Merging (Zhang et al., 2025), https://arxiv.org/abs/2509.25712.
    """

    def __init__(
        self,
        task_vectors: TaskVectors,
        init: float | None = 0.3,
        constraint: Constraint | None = None,
        chunks: int = 2,
    ) -> None:
        if chunks < 1:
            raise ConfigError(f"ChunkWise: chunks must be at least 1, got {chunks}")
        self.chunks = chunks
        super().__init__(task_vectors, init, constraint)

    def group(self, name: str) -> str:
        """Returns the tensor's own name, since each tensor is a group of its own."""
        return name

    def groups(self, name: str, task_vectors: TaskVectors) -> Groups:
        """Returns contiguous chunks of the tensor, each with a coefficient of its own."""
        return Chunks(max(1, min(self.chunks, task_vectors.shape(name).numel())))
