"""The way back: from gradients of merged tensors to those of the coefficients, each tensor contracted once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from adamerge.deltas.lazy_combination import Combination
from adamerge.merging.copies import Place
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
        found = [(name, *self._ways.pop(name), place.gradient) for name, place in places.items() if name in self._ways]
        ways = [_Way(name, edge, back, gradient) for name, edge, back, gradient in found if gradient is not None]
        if not ways:
            return
        with exact(ways[0].gradient.device):
            contracted = self._contracted(ways)
        for place, own in enumerate(contracted):
            if own is not None:
                earlier = self._found.get(place)
                self._found[place] = own if earlier is None else earlier + own

    def gradients(self, places: Mapping[str, Place]) -> list[Tensor]:
        """``dL/dw`` of all that was handed on, and of these tensors; zeros where nothing depends on a parameter."""
        self.hand_on(places)
        found = [self._found.get(place) for place in range(len(self.parameters))]
        return [self._nothing(p) if own is None else own for p, own in zip(self.parameters, found, strict=True)]

    def _contracted(self, ways: Sequence[_Way]) -> Sequence[Tensor | None]:
        gradients = [way.back(way.gradient) for way in ways]
        return torch.autograd.grad([way.edge for way in ways], self.parameters, gradients, allow_unused=True)

    def _nothing(self, parameter: Tensor) -> Tensor:
        return torch.zeros_like(parameter)


class _Way(NamedTuple):
    """From the gradient of one merged tensor to what its update was computed from."""

    name: str
    edge: GradientEdge
    back: Callable[[Tensor], Tensor]
    gradient: Tensor


class Probes(WayBack):
    """Several gradients of one backward pass: of each, ``G`` is multiplied element by element by other numbers.

    The first is the gradient itself. What they have in common with those of a second pass tells, without any ``G`` being
    kept, whether the gradients of the two passes have.

    Args:
        parameters: of the parametrization, that gradients are for.
        count: gradients.
        factors: gives the numbers: name of the tensor, place in the row of gradients from 1 on, and ``G``, to numbers of
            ``G``'s shape.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], count: int, factors: Callable[[str, int, Tensor], Tensor]
    ) -> None:
        super().__init__(parameters)
        self.count, self.factors = count, factors

    def _contracted(self, ways: Sequence[_Way]) -> Sequence[Tensor | None]:
        edges, rows = [way.edge for way in ways], []
        for number in range(self.count):
            gradients = [
                way.back(way.gradient if number == 0 else way.gradient * self.factors(way.name, number, way.gradient))
                for way in ways
            ]
            rows.append(
                torch.autograd.grad(
                    edges, self.parameters, gradients, allow_unused=True, retain_graph=number + 1 < self.count
                )
            )
        return [None if own[0] is None else torch.stack(own) for own in zip(*rows, strict=True)]

    def _nothing(self, parameter: Tensor) -> Tensor:
        return parameter.new_zeros((self.count, *parameter.shape))


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
