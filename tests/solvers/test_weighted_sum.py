"""The weighted sum: task arithmetic's vector."""

import math

import pytest
import torch
from toy_matrices import dense, taus

from adamerge.errors import ConfigError
from adamerge.solvers import WeightedSum


def test_three_numbers_by_hand():
    values = torch.tensor([[[1.0, -2.0, 0.5]], [[3.0, 2.0, 0.25]]])
    assert torch.equal(WeightedSum(0.5).solve("w", {"w": dense(values)}), torch.tensor([[2.0, 0.0, 0.375]]))
    assert torch.equal(WeightedSum(2.0).solve("w", {"w": dense(values)}), torch.tensor([[8.0, 0.0, 1.5]]))
    assert torch.equal(WeightedSum(None).solve("w", {"w": dense(values)}), torch.tensor([[2.0, 0.0, 0.375]]))


def test_matrices_are_no_other_than_vectors():
    values = taus(6, 4)
    flat = WeightedSum().solve("v", {"v": dense(values.flatten(1))})
    assert torch.equal(WeightedSum().solve("w", {"w": dense(values)}).flatten(), flat)


def test_the_scale_is_finite():
    with pytest.raises(ConfigError, match="scale"):
        WeightedSum(math.nan)
