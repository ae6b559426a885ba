"""The pullback: from gradients of merged tensors to those of the coefficients, each tensor contracted once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from adamerge.merging.copies import Place
from adamerge.precision import exact


class MergeGradients:
    """Maps gradients of merged tensors to gradients of the coefficients, for one merge (a vector-Jacobian product).

    Args:
        parameters: of the parametrization, that gradients are for.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        self._noted: dict[str, tuple[GradientEdge, Callable[[Tensor], Tensor]]] = {}
        self._sums: dict[int, Tensor] = {}  # by the parameter's number

    def note(self, name: str, end: Tensor, contract: Callable[[Tensor], Tensor]) -> None:
        """Notes how the update of a tensor was computed; nothing of the tensor's size is kept for it.

        Args:
            name: of the tensor.
            end: what autograd knows: the coefficients of a linear update, or an update itself.
            contract: maps the gradient ``G`` of the merged tensor to the gradient of ``end``.
        """
        if end.requires_grad:
            self._noted[name] = get_gradient_edge(end), contract

    def hand_on(self, places: Mapping[str, Place]) -> None:
        """Contracts the accumulated ``G`` of tensors with their task vectors, and adds the result up.

        Args:
            places: of the tensors, each of which comes once after it was noted.
        """
        noted = [
            (name, *self._noted.pop(name), place.gradient) for name, place in places.items() if name in self._noted
        ]
        pulls = [_Pull(name, edge, contract, own) for name, edge, contract, own in noted if own is not None]
        if not pulls:
            return
        with exact(pulls[0].gradient.device):
            contracted = self._contracted(pulls)
        for number, own in enumerate(contracted):
            if own is not None:
                earlier = self._sums.get(number)
                self._sums[number] = own if earlier is None else earlier + own

    def gradients(self, places: Mapping[str, Place]) -> list[Tensor]:
        """Returns ``dL/dw`` of all that was handed on, and of these tensors; zeros where nothing depends on a parameter."""
        self.hand_on(places)
        sums = [self._sums.get(number) for number in range(len(self.parameters))]
        return [self._nothing(p) if own is None else own for p, own in zip(self.parameters, sums, strict=True)]

    def _contracted(self, pulls: Sequence[_Pull]) -> Sequence[Tensor | None]:
        gradients = [pull.contract(pull.gradient) for pull in pulls]
        return torch.autograd.grad([pull.edge for pull in pulls], self.parameters, gradients, allow_unused=True)

    def _nothing(self, parameter: Tensor) -> Tensor:
        return torch.zeros_like(parameter)


class _Pull(NamedTuple):
    """The gradient of one merged tensor, and how it becomes that of what its update was computed from."""

    name: str
    edge: GradientEdge
    contract: Callable[[Tensor], Tensor]
    gradient: Tensor


class Probes(MergeGradients):
    """Several gradients of one backward pass: of each, ``G`` is multiplied element by element by other numbers.

    The first is the gradient itself. Comparing the others with those of a second pass tells, without storing any ``G``,
    whether the gradients of the two passes agree beyond their rounding.

    Args:
        parameters: of the parametrization, that gradients are for.
        count: gradients.
        factors: gives the numbers: name of the tensor, number of the gradient from 1 on, and ``G``, to numbers of ``G``'s
            shape.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], count: int, factors: Callable[[str, int, Tensor], Tensor]
    ) -> None:
        super().__init__(parameters)
        self.count, self.factors = count, factors

    def _contracted(self, pulls: Sequence[_Pull]) -> Sequence[Tensor | None]:
        edges, rows = [pull.edge for pull in pulls], []
        for number in range(self.count):
            gradients = [
                pull.contract(
                    pull.gradient if number == 0 else pull.gradient * self.factors(pull.name, number, pull.gradient)
                )
                for pull in pulls
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
        """Returns the loss, as a number that depends on the parameters."""
        ctx.gradients = gradients
        return loss.detach().clone()

    @staticmethod
    def backward(ctx: Any, *scale: Tensor) -> tuple[Tensor | None, ...]:
        """Returns the gradients of the parameters times the gradient of the loss."""
        return None, None, *(gradient * scale[0] for gradient in ctx.gradients())
