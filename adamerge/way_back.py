"""The way back: from gradients of merged tensors to those of the coefficients, each tensor contracted once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
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
        self._edges: dict[str, GradientEdge] = {}
        self._found: dict[int, Tensor] = {}  # by the parameter's place

    def keep(self, name: str, update: Tensor, shape: torch.Size) -> None:
        """Remember how the update of a tensor was computed.

        Args:
            name: of the tensor.
            update: as computed; it is let go of, only its edge in autograd's graph stays.
            shape: of the tensor's gradient.
        """
        if update.requires_grad:
            self._edges[name] = get_gradient_edge(update if update.shape == shape else update.reshape(shape))

    def hand_on(self, places: Mapping[str, Place]) -> None:
        """Contract the accumulated ``G`` of tensors with their task vectors, and add the result up.

        Args:
            places: of the tensors, each of which comes once after it was kept.
        """
        pairs = [(self._edges.pop(name), place.gradient) for name, place in places.items() if name in self._edges]
        edges = [edge for edge, gradient in pairs if gradient is not None]
        gradients = [gradient for _, gradient in pairs if gradient is not None]
        if not edges:
            return
        with exact(gradients[0].device):
            contracted = torch.autograd.grad(edges, self.parameters, gradients, allow_unused=True)
        for place, found in enumerate(contracted):
            if found is not None:
                earlier = self._found.get(place)
                self._found[place] = found if earlier is None else earlier + found

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


class Outline(Deltas):
    """Deltas that are contracted and never summed: what they combine to has a shape and a way back, but no values.

    Args:
        of: the deltas.
    """

    def __init__(self, of: Deltas) -> None:
        self.of, self.shape, self.device = of, of.shape, of.device

    def blocks(self, dtype: torch.dtype, part: slice | None = None) -> Iterator[Tensor]:
        """As they are."""
        return self.of.blocks(dtype, part)

    def summed(self, coefficients: Tensor, groups: Groups, part: slice | None = None) -> Tensor:
        """Zeros that take no room."""
        return coefficients.new_zeros(()).expand(self.shape.numel())

    def contract(self, gradient: Tensor, groups: Groups, part: slice | None = None) -> Tensor:
        """As they are contracted."""
        return self.of.contract(gradient, groups, part)
