"""A solver's vector with a strength."""

import pytest
import torch

from adamerge.deltas.base import DenseDeltas
from adamerge.errors import ConfigError
from adamerge.solvers import Scaled, WeightedSum


def test_the_others_deltas_are_multiplied():
    deltas = DenseDeltas(torch.tensor([[[1.0, 2.0]], [[3.0, -8.0]]]))
    # 0.5 * (1 + 3, 2 - 8) = (2, -3), times 4
    assert Scaled(WeightedSum(0.5), 4.0).solve("a", {"a": deltas}).tolist() == [[8.0, -12.0]]


def test_a_scale_that_is_no_number_is_refused():
    with pytest.raises(ConfigError, match="Scaled: scale must be a finite number"):
        Scaled(WeightedSum(), float("nan"))
