"""Layer-sequential least squares: each linear map does on the merged model's inputs what the experts' do on theirs."""

from __future__ import annotations

import torch
from torch import Tensor

from adamerge.errors import ConfigError
from adamerge.solvers.base import Solver, finite
from adamerge.solvers.sequential import Linears, SequentialSolver
from adamerge.solvers.wudi import Wudi


class LeastSquares(SequentialSolver):
    """Minimises ``sum_k ||X_k W^T - Y_k||_F^2 + ridge * c * ||W - W_start||_F^2`` map by map, in the network's order.

    ``X_k`` (rows, inputs) is what enters the map when the merge so far runs task k's samples, and ``Y_k`` what comes out of
    expert k's own map when expert k runs them: errors of earlier layers are made up for, as far as a linear map can. Where
    the output is added to a residual stream, the target is the expert's stream behind the map, so that what has drifted
    there is corrected: ``Y_k + drift * (R_k - R)`` of the expert's stream ``R_k`` and the merge's ``R`` before it. It is a
    linear system in the input dimension, solved by Cholesky for the correction ``E = W - W_start``:

        E (G + ridge c I) = sum_k (Y_k - X_k W_start^T)^T X_k,  G = sum_k X_k^T X_k,  c = mean(diag(G))

    ``W_start`` is the base with what the other solver makes of its task vectors. A bias is one more column of W, whose
    input is 1, pulled in units of its own entry of G; a tensor that is no matrix of a linear map, such as a norm, a
    convolution or an embedding, is the other solver's. Products of a batch are in fp32 and summed in fp64, in which the
    system is solved.

    Args:
        toward: the other solver; ``Wudi(0.3, 0.4)`` when None.
        ridge: strength of the pull to ``W_start``, in units of the mean square of the inputs; positive.
        drift: share of the residual stream's difference that is corrected; 0 for none.
        samples: of each task, at most.

    Raises:
        ConfigError: a number is out of range, or the other solver would see inputs too.

    Reference: RegMean (Jin et al., 2023), https://arxiv.org/abs/2212.09849, for the experts' outputs as targets of a linear
        system; on the merged model's inputs, in order, with drift corrected and a ridge to WUDI: ours.
    """

    def __init__(
        self, toward: Solver | None = None, ridge: float = 0.1, drift: float = 1.0, samples: int = 200
    ) -> None:
        super().__init__(Wudi(ridge=0.3, vector_scale=0.4) if toward is None else toward, samples)
        finite(self, ridge=ridge, drift=drift)
        if ridge <= 0:
            raise ConfigError(f"LeastSquares: ridge must be positive, got {ridge}")
        self.ridge, self.drift = ridge, drift

    def solve_maps(self, maps: Linears, toward: Tensor) -> Tensor:
        """Returns the merged delta of linear maps that share their inputs, ``(outputs, inputs [+ 1])`` in fp32."""
        start = maps.base() + toward
        gram, rest = (toward.new_zeros(size, toward.shape[1], dtype=torch.float64) for size in toward.shape[::-1])
        for task in maps.inputs.tasks:
            expert = maps.expert(task)
            targets = [(inputs @ expert.T, stream) for inputs, stream in maps.of_expert(task)]
            for (target, theirs), (inputs, ours) in zip(targets, maps.of_merge(task), strict=True):
                if theirs is not None and ours is not None:
                    target += self.drift * (theirs - ours)
                target -= inputs @ start.T
                gram += inputs.T @ inputs
                rest += target.T @ inputs
        gram.diagonal().add_(self._pull(gram.diagonal(), biased=maps.group[0].bias is not None))
        # G is symmetric: E G = B is G E^T = B^T
        correction = torch.cholesky_solve(rest.T, torch.linalg.cholesky(gram)).T
        return toward + correction.to(toward.dtype)

    def _pull(self, diagonal: Tensor, biased: bool) -> Tensor:
        """Returns ``ridge * c`` of every column, in units of its own entry of G for the column of ones."""
        weights = diagonal[:-1] if biased else diagonal
        mean = weights.mean()
        units = torch.where(mean > 0, mean, 1.0).expand_as(weights)  # of inputs that are all 0 the correction is 0
        return self.ridge * (torch.cat([units, diagonal[-1:]]) if biased else units)
