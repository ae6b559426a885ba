"""What solvers share: sums of what is no matrix, and tensors seen as matrices."""

import math

import pytest
import torch
from rounding import gamma
from toy_matrices import dense, factors_of, low_rank_of, taus

from adamerge.errors import ConfigError
from adamerge.solvers import MatrixSolver, Solver
from adamerge.solvers.base import scaled_sum


class Recorded(MatrixSolver):
    """Answers with the first expert's matrix, and remembers what it was given."""

    def merged(self, experts):
        self.seen = [one.dense() for one in experts]
        return self.seen[0]


@pytest.mark.parametrize("scale", [None, 0.4, 0.0, -1.0])
@pytest.mark.parametrize("shape", [(7,), (), (3, 4)])
def test_the_sum_is_scaled(scale, shape):
    values = taus(*shape, experts=5)
    expected = values.double().sum(dim=0) * (1 / 5 if scale is None else scale)
    got = scaled_sum(dense(values), scale)
    assert got.dtype == torch.float32 and got.shape == torch.Size(shape)
    allowed = gamma(7) * values.double().abs().sum(dim=0) * (1 / 5 if scale is None else abs(scale))
    assert ((got.double() - expected).abs() <= allowed).all()


def test_three_numbers_by_hand():
    values = torch.tensor([[1.0, -2.0, 0.5], [3.0, 2.0, 0.25]])
    assert torch.equal(scaled_sum(dense(values), 0.5), torch.tensor([2.0, 0.0, 0.375]))
    assert torch.equal(scaled_sum(dense(values), None), torch.tensor([2.0, 0.0, 0.375])), "of two experts the average"


@pytest.mark.parametrize("shape", [(5, 3), (4, 3, 2, 2)])
def test_a_tensor_is_its_first_dimension_by_the_others(shape):
    values, solver = taus(*shape), Recorded()
    got = solver.solve("w", {"w": dense(values)})
    assert got.shape == torch.Size(shape) and torch.equal(got, values[0])
    assert [tuple(one.shape) for one in solver.seen] == [(shape[0], math.prod(shape[1:]))] * 3


@pytest.mark.parametrize("shape", [(6,), (), (0, 3)])
def test_what_is_no_matrix_is_summed(shape):
    solver = Recorded(vector_scale=0.4)
    assert torch.equal(solver.solve("b", {"b": dense(taus(*shape))}), scaled_sum(dense(taus(*shape)), 0.4))
    assert not hasattr(solver, "seen")


def test_factors_of_a_vector_are_summed_too():
    low, plain = low_rank_of(factors_of((6,), (1, 2)), (6,))
    got, expected = Recorded(0.4).solve("b", {"b": low}), 0.4 * plain.double().sum(dim=0)
    assert (got - expected).abs().max() <= gamma(8) * plain.abs().sum(dim=0).max()


@pytest.mark.parametrize("scale", [math.nan, math.inf])
def test_numbers_must_be_finite(scale):
    with pytest.raises(ConfigError, match="Recorded: vector_scale must be a finite number"):
        Recorded(scale)


def test_the_contract_is_abstract():
    for kind in (Solver, MatrixSolver):
        with pytest.raises(TypeError, match="abstract"):
            kind()
