"""Trainer settings: a fit has a length, and its gradients come through."""

import pytest
import torch

from adamerge.errors import ConfigError
from adamerge.trainer_settings import check_length, check_precision


@pytest.mark.parametrize("precision", ["32", "32-true", "bf16-mixed", "None"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_goes(precision, dtype):
    check_precision(precision, dtype)


@pytest.mark.parametrize(
    ("precision", "dtype"), [("16-mixed", torch.float32), ("64-true", torch.float32), ("32-true", torch.float16)]
)
def test_what_would_round_or_underflow(precision, dtype):
    with pytest.raises(ConfigError, match="does not suit|would underflow"):
        check_precision(precision, dtype)


@pytest.mark.parametrize(
    "trainer", [{"max_steps": 1}, {"fast_dev_run": True}, {"max_steps": 5, "accumulate_grad_batches": 1}]
)
def test_a_fit_has_a_length(trainer):
    check_length(trainer)


@pytest.mark.parametrize("trainer", [{}, {"max_steps": -1}, {"max_steps": 5, "accumulate_grad_batches": 2}])
def test_a_fit_without_a_length_or_that_would_be_shorter(trainer):
    with pytest.raises(ConfigError, match="trainer"):
        check_length(trainer)
