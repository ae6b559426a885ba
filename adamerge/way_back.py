"""The way back: from gradients of merged tensors to those of the coefficients, each tensor contracted once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from adamerge.combinations import Combination
from adamerge.copies import Place
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

    def keep(self, name: str, update: Tensor | Combination) -> None:
        """Remember how the update of a tensor was computed.

        Args:
            name: of the tensor.
            update: as computed, of as many elements; it is let go of, only its edge in autograd's graph stays. The gradient
                of a combination is contracted before autograd is asked.
        """
        if isinstance(update, Combination):
            end, back = update.coefficients, update.contract
        else:
            end, back = update, partial(torch.reshape, shape=update.shape)
        if end.requires_grad:
            self._ways[name] = get_gradient_edge(end), back

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
