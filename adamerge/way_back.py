"""The way back: from gradients of merged tensors to those of the coefficients, each tensor contracted once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from adamerge.copies import Place
from adamerge.deltas import Deltas
from adamerge.groups import Groups
from adamerge.precision import exact


class WayBack:
    """Of one merge: how each merged tensor depends on the coefficients, and what has come back of them.

    Args:
        parameters: of the parametrization, that gradients are for.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        self._ways: dict[str, tuple[GradientEdge, Callable[[Tensor], Tensor]]] = {}
        self._found: dict[int, Tensor] = {}  # by the parameter's place

    def keep(self, name: str, update: Tensor) -> None:
        """Remember how the update of a tensor was computed.

        Args:
            name: of the tensor.
            update: as computed, of as many elements; it is let go of, only its edge in autograd's graph stays.
        """
        if update.requires_grad:
            self._ways[name] = get_gradient_edge(update), partial(torch.reshape, shape=update.shape)

    def keep_combination(self, name: str, update: Combination) -> None:
        """The same of an update that is a combination of deltas: its gradient is contracted before autograd is asked."""
        if update.coefficients.requires_grad:
            self._ways[name] = get_gradient_edge(update.coefficients), update.contract

    def hand_on(self, places: Mapping[str, Place]) -> None:
        """Contract the accumulated ``G`` of tensors with their task vectors, and add the result up.

        Args:
            places: of the tensors, each of which comes once after it was kept.
        """
        found = [(*self._ways.pop(name), place.gradient) for name, place in places.items() if name in self._ways]
        ways = [(edge, back, gradient) for edge, back, gradient in found if gradient is not None]
        if not ways:
            return
        with exact(ways[0][2].device):
            gradients = [back(gradient) for _, back, gradient in ways]
            contracted = torch.autograd.grad([way[0] for way in ways], self.parameters, gradients, allow_unused=True)
        for place, own in enumerate(contracted):
            if own is not None:
                earlier = self._found.get(place)
                self._found[place] = own if earlier is None else earlier + own

    def gradients(self, places: Mapping[str, Place]) -> list[Tensor]:
        """``dL/dw`` of all that was handed on, and of these tensors; zeros where nothing depends on a parameter."""
        self.hand_on(places)
        found = [self._found.get(place) for place in range(len(self.parameters))]
        return [torch.zeros_like(p) if own is None else own for p, own in zip(self.parameters, found, strict=True)]


class PullBack(torch.autograd.Function):
    """A loss as a function of the parameters: its value is known, and its gradients are asked for in its backward pass.

    Applied to the loss ``()``, to what gives the gradients, one for each parameter, and to the parameters.
    """

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: Callable[[], Sequence[Tensor]], *parameters: Tensor) -> Tensor:
        """The value."""
        ctx.gradients = gradients
        return loss.detach().clone()

    @staticmethod
    def backward(ctx: Any, *scale: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients, as often as the loss counts."""
        return None, None, *(gradient * scale[0] for gradient in ctx.gradients())


class Combination:
    """A sum of deltas whose values are computed when they are asked for, part by part, and whose coefficients lead back.

    Args:
        deltas: that are combined.
        coefficients: ``(experts, groups.count)``, differentiable.
        groups: which elements use which.
    """

    def __init__(self, deltas: Deltas, coefficients: Tensor, groups: Groups) -> None:
        self.deltas, self.coefficients, self.groups = deltas, coefficients, groups

    def values(self) -> Iterator[tuple[slice, Tensor]]:
        """Consecutive parts, each with its flat values; without autograd."""
        coefficients = self.coefficients.detach()
        for piece, deltas in self.deltas.in_pieces():
            yield piece, deltas.summed(coefficients, self.groups, piece)

    def contract(self, gradient: Tensor) -> Tensor:
        """The gradient of all values to that of the coefficients."""
        return self.deltas.contract(gradient, self.groups)


class Outline(Deltas):
    """Deltas that are contracted and never summed: what they combine to has a shape and a way back, but no values.

    Args:
        of: the deltas.
    """

    def __init__(self, of: Deltas) -> None:
        self.of, self.shape, self.device = of, of.shape, of.device
        self._combined: tuple[Tensor, Combination] | None = None

    def combine(self, coefficients: Tensor, groups: Groups) -> Tensor:
        """No values, and a note of what they would be."""
        found = super().combine(coefficients, groups)
        self._combined = found, Combination(self.of, coefficients, groups)
        return found

    def combination(self, update: Tensor) -> Combination | None:
        """The combination that an update is, and nothing else; None where something was done with one."""
        if self._combined is None or self._combined[0] is not update:
            return None
        return self._combined[1]

    def blocks(self, dtype: torch.dtype, part: slice | None = None) -> Iterator[Tensor]:
        """As they are."""
        return self.of.blocks(dtype, part)

    def summed(self, coefficients: Tensor, groups: Groups, part: slice | None = None) -> Tensor:
        """Zeros that take no room."""
        return coefficients.new_zeros(()).expand(self.shape.numel())

    def contract(self, gradient: Tensor, groups: Groups, part: slice | None = None) -> Tensor:
        """As they are contracted."""
        return self.of.contract(gradient, groups, part)
