"""The contract of a solver that sees inputs: linear map by linear map, in the order in which the network runs them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from adamerge.backbones.capture import Entered
from adamerge.backbones.linears import LinearMap
from adamerge.errors import ConfigError
from adamerge.solvers.base import Solver
from adamerge.task_vectors.start import StartOf
from adamerge.task_vectors.task_vectors import TaskVectors

Group = tuple[LinearMap, ...]
"""Linear maps that share their inputs."""


class LinearInputs(Protocol):
    """What enters the linear maps of a network on unlabelled samples of every task, for a solver that sees it; of a stage.

    Experts and merge are run on the same samples in the same batches: a row of one is the same position of the same sample as
    in the other.
    """

    @property
    def tasks(self) -> Sequence[str]:
        """Returns the tasks that there are samples of; each has an expert of its name."""

    @property
    def groups(self) -> Sequence[Group]:
        """Returns the network's linear maps in the order in which they run."""

    def begin(self, written: StartOf) -> None:
        """Is told what has been solved: by name what reads the delta that a merge adds; None of one that is still to come."""

    def of_expert(self, group: Group, task: str) -> Iterator[Entered]:
        """Yields, batch by batch, what there is at linear maps when the task's own expert runs."""

    def of_merge(self, group: Group, task: str) -> Iterator[Entered]:
        """Yields the same when a network runs that is merged of what has been solved, and of the base's other tensors."""


@dataclass(frozen=True)
class Linears:
    """Linear maps that share their inputs, as matrices ``(outputs, inputs)`` one below the other.

    Where the maps have biases of their own, these are one more column, and inputs have a one more: ``y = [W b] [x 1]^T``.

    Attributes:
        group: the maps; of all or of none of them the bias is merged.
        vectors: base and experts.
        inputs: what enters the maps.
    """

    group: Group
    vectors: TaskVectors
    inputs: LinearInputs

    @property
    def names(self) -> list[str]:
        """Returns the tensors of the maps, in the order in which they are solved."""
        return [name for one in self.group for name in (one.weight, one.bias) if name is not None]

    def matrix(self, tensor_of: Callable[[str], Tensor]) -> Tensor:
        """Returns weights and biases that are given by name, ``(outputs, inputs [+ 1])`` in fp32 on the vectors' device."""
        rows = []
        for one in self.group:
            weight = tensor_of(one.weight).to(self.vectors.device, torch.float32)
            weight = weight.mT if one.transposed else weight
            if one.bias is not None:
                weight = torch.cat([weight, tensor_of(one.bias).to(weight)[:, None]], dim=1)
            rows.append(weight)
        return torch.cat(rows)

    def tensors(self, matrix: Tensor) -> dict[str, Tensor]:
        """Returns by name what a matrix, as ``matrix`` returns it, has of each tensor, in the shape that the tensor has."""
        found: dict[str, Tensor] = {}
        rows = iter(matrix.split([self.vectors.shape(one.weight)[one.transposed] for one in self.group]))
        for one, own in zip(self.group, rows, strict=True):
            weight = own if one.bias is None else own[:, :-1]
            found[one.weight] = (weight.mT if one.transposed else weight).contiguous()
            if one.bias is not None:
                found[one.bias] = own[:, -1].contiguous()
        return found

    def base(self) -> Tensor:
        """Returns the base's matrix."""
        return self.matrix(self.vectors.base_tensor)

    def expert(self, task: str) -> Tensor:
        """Returns the matrix of a task's own expert, whatever the transforms make of it."""
        return self.matrix(self.vectors.checkpoints[task].__getitem__)

    def of_expert(self, task: str) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yields inputs ``(rows, inputs [+ 1])`` when the expert runs, and to what the outputs are added, if to anything."""
        return self._entered(self.inputs.of_expert(self.group, task))

    def of_merge(self, task: str) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yields the same when the merge runs."""
        return self._entered(self.inputs.of_merge(self.group, task))

    def _entered(self, batches: Iterator[Entered]) -> Iterator[tuple[Tensor, Tensor | None]]:
        for inputs, streams in batches:
            if self.group[0].bias is not None:
                inputs = torch.cat([inputs, inputs.new_ones(len(inputs), 1)], dim=1)
            yield inputs, self._stream(streams, len(inputs))

    def _stream(self, streams: Mapping[str, Tensor], rows: int) -> Tensor | None:
        """Returns what the outputs of all maps are added to, side by side; zeros of one that writes into no stream."""
        if not streams:
            return None
        sizes = {one.weight: self.vectors.shape(one.weight)[one.transposed] for one in self.group}
        some = next(iter(streams.values()))
        return torch.cat([streams.get(name, some.new_zeros(rows, size)) for name, size in sizes.items()], dim=1)


class SequentialSolver(Solver, ABC):
    """A solver that sees the inputs of linear maps, and solves these in the order in which the network runs them.

    Whatever is no linear map that runs once, such as norms, convolutions and embeddings, comes first, as another solver
    makes it. Then the maps follow: what enters one is computed by a network that is merged of all that came before. Samples
    have no labels.

    Args:
        toward: solver of the other tensors, and where the maps begin from.
        samples: of each task that are run, at most.

    Raises:
        ConfigError: no sample is to be run, or the other solver would see inputs too.
    """

    sees_inputs = True

    def __init__(self, toward: Solver, samples: int = 200) -> None:
        alone(self, toward)
        if samples < 1:
            raise ConfigError(f"{type(self).__name__}: samples must be at least 1, got {samples}")
        self.toward, self.samples = toward, samples

    def solve(self, name: str, vectors: TaskVectors) -> Tensor:
        """Returns what the other solver makes of one tensor."""
        return self.toward.solve(name, vectors)

    @abstractmethod
    def solve_maps(self, maps: Linears, toward: Tensor) -> Tensor:
        """Returns the merged delta of linear maps that share their inputs, ``(outputs, inputs [+ 1])`` in fp32.

        Args:
            maps: with what they need of base, experts and inputs.
            toward: the delta that the other solver makes, of the same shape.
        """


def alone(outer: Solver, inner: Solver) -> None:
    """Refuses a solver that sees inputs inside of another, which would ask it for tensors one by one.

    Raises:
        ConfigError: it does.
    """
    if inner.sees_inputs:
        raise ConfigError(
            f"{type(outer).__name__}: {type(inner).__name__} sees inputs, and cannot stand inside of another solver",
            todo="give it a stage of its own, and name what it wrote {task_vectors} in a later one",
        )
