"""One task vector for all experts: the root of the sum of their squares, in whose units each element is then learned."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from adamerge.transforms.base import Elementwise, State


class RootSumSquare(Elementwise):
    """All experts become one, ``s[e] = sqrt(sum_k tau_k[e]^2)``: how far the experts moved an element, without a sign.

    With ``ElementWise`` it is ``theta[e] = theta0[e] + s[e] w[e]``: an element that no expert changed stays, and one rate
    serves all others. Factors of LoRA experts are made dense, one tensor at a time.

    Args:
        name: of the one task vector.
    """

    local = True

    def __init__(self, name: str = "scale") -> None:
        self.name = name

    def experts(self, names: Sequence[str]) -> tuple[str, ...]:
        """Returns the name of the one task vector."""
        return (self.name,)

    def apply(self, name: str, deltas: Tensor, state: State) -> Tensor:
        """Returns the roots, ``(1, numel)``."""
        squares = deltas[:1].square()
        for row in deltas[1:]:
            squares[0].addcmul_(
                row, row
            )  # one after the other: an element's bits are the same wherever a tensor is cut
        return squares.sqrt_()
