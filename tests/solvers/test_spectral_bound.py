"""A bound on a solver's vector by the largest singular value of the base's matrix."""

import pytest
import torch
from lora_models import save_adapter, save_base

from adamerge.errors import ConfigError
from adamerge.solvers import LeastSquares, SpectralBound, WeightedSum
from adamerge.solvers.spectral_bound import spectral_norm
from adamerge.task_vectors.task_vectors import TaskVectors


def vectors(base, *experts):
    return TaskVectors({"w": base}, {f"task{number}": {"w": base + tau} for number, tau in enumerate(experts)})


def test_a_delta_above_the_bound_is_scaled_down_to_it():
    base = torch.diag(torch.tensor([4.0, 1.0]))  # spectral norm 4; half of it is 2
    tau = torch.tensor([[0.0, 8.0], [0.0, 0.0]])  # spectral norm 8
    made = SpectralBound(WeightedSum(1.0), dense=0.5).solve("w", vectors(base, tau))
    assert torch.allclose(made, tau / 4, rtol=1e-6, atol=0)


def test_a_delta_below_the_bound_stays_as_it_is_to_the_bit():
    base, tau = torch.randn(5, 7), 0.01 * torch.randn(5, 7)
    pool = vectors(base, tau)
    assert torch.equal(SpectralBound(WeightedSum(1.0)).solve("w", pool), WeightedSum(1.0).solve("w", pool))


@pytest.mark.parametrize("shape", [(3, 8), (8, 3), (4, 3, 2, 2)])
def test_whatever_the_shape_the_bound_holds_and_the_direction_stays(shape):
    base, tau = torch.randn(shape), 20 * torch.randn(shape)
    made = SpectralBound(WeightedSum(1.0), dense=0.3).solve("w", vectors(base, tau))
    norm = float(torch.linalg.svdvals(base.double().flatten(1))[0])
    assert float(torch.linalg.svdvals(made.double().flatten(1))[0]) == pytest.approx(0.3 * norm, rel=1e-5)
    assert torch.nn.functional.cosine_similarity(made.flatten(), tau.flatten(), dim=0) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("base", [torch.ones(6), torch.zeros(3, 2)])
def test_vectors_and_what_is_zero_in_the_base_stay(base):
    pool = vectors(base, 100 * torch.randn(base.shape))
    assert torch.equal(SpectralBound(WeightedSum(1.0)).solve("w", pool), WeightedSum(1.0).solve("w", pool))


def test_factors_have_a_share_of_their_own(tmp_path):
    experts = {f"task{seed}": tmp_path / f"adapter{seed}" for seed in (1, 2)}
    for seed, folder in enumerate(experts.values(), 1):
        save_adapter("llama", folder, seed, r=2, target_modules=["q_proj"])
    pool = TaskVectors(save_base("llama", tmp_path / "base"), experts)
    name = next(name for name in pool if pool.terms(name))
    made = SpectralBound(WeightedSum(100.0), dense=0.5, low_rank=0.01).solve(name, pool)
    norms = [float(torch.linalg.svdvals(matrix.double())[0]) for matrix in (made, pool.base_tensor(name))]
    assert norms[0] == pytest.approx(0.01 * norms[1], rel=1e-5)


@pytest.mark.parametrize("shape", [(1, 1), (50, 3), (3, 50), (64, 64)])
def test_the_norm_is_the_largest_singular_value(shape):
    matrix = torch.randn(shape)
    # a product of n terms is off by n units in the last place at most, of the sum of magnitudes
    rel = max(shape) * min(shape) * torch.finfo(torch.float32).eps
    assert float(spectral_norm(matrix)) == pytest.approx(float(torch.linalg.svdvals(matrix.double())[0]), rel=rel)


@pytest.mark.parametrize("shares", [{"dense": 0.0}, {"low_rank": -1.0}, {"dense": float("inf")}])
def test_a_share_that_bounds_nothing_is_refused(shares):
    with pytest.raises(ConfigError, match="SpectralBound: "):
        SpectralBound(WeightedSum(), **shares)


def test_a_solver_that_sees_inputs_is_refused():
    with pytest.raises(ConfigError, match="LeastSquares sees inputs"):
        SpectralBound(LeastSquares(WeightedSum()), dense=0.5)
