"""The model's learning rate decides; one that was configured elsewhere is not dropped without a word."""

import warnings

import pytest
import torch
from torch.optim import SGD, Adam

from adamerge.training.learning_rate import paced

PARAMETERS = [torch.nn.Parameter(torch.zeros(1))]


def test_another_rate_is_told_of():
    with pytest.warns(
        UserWarning, match=r"model.search.optimizer was given lr=0.1, which is not used: model.search.lr .* is 0.001"
    ):
        made = paced(Adam(PARAMETERS, lr=0.1), 1e-3, "model.search.lr", "model.search.optimizer")
    assert [group["lr"] for group in made.param_groups] == [1e-3]


@pytest.mark.parametrize("optimizer", [Adam(PARAMETERS), SGD(PARAMETERS), Adam(PARAMETERS, lr=0.5)])
def test_none_or_the_same_is_not(optimizer):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert paced(optimizer, 0.5, "model.search.lr", "model.search.optimizer").param_groups[0]["lr"] == 0.5
