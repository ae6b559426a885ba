"""Trainer settings: a fit has a length, and its gradients come through."""

from datetime import timedelta

import pytest
import torch

from adamerge.errors import ConfigError
from adamerge.precision import check_precision
from adamerge.runs.trainer_settings import check_length, seconds


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


WHOLE = [
    {"limit_train_batches": 1.0}, {"limit_train_batches": 5}, {"overfit_batches": 0.0}, {"overfit_batches": 0},
    {"max_epochs": 1}, {"max_epochs": -1}, {"max_epochs": 3}, {"max_time": "00:00:00:01"}, {"max_time": {"hours": 1}},
    {"max_time": timedelta(minutes=1)}, {"val_check_interval": 5}, {"val_check_interval": 0.5}, {"limit_train_batches": None},
]  # fmt: skip
CUT = [
    {"limit_train_batches": 0}, {"limit_train_batches": 1}, {"limit_train_batches": 4}, {"limit_train_batches": 0.9},
    {"limit_train_batches": "half"}, {"overfit_batches": 1}, {"overfit_batches": 0.1}, {"overfit_batches": 1.0},
    {"max_epochs": 0}, {"max_time": "00:00:00:00"}, {"max_time": {"seconds": 0}}, {"max_time": "1 hour"}, {"max_time": 7},
    {"val_check_interval": 6},
]  # fmt: skip


@pytest.mark.parametrize("settings", WHOLE, ids=str)
def test_what_does_not_cut_a_fit_short(settings):
    check_length({"max_steps": 5, **settings})


@pytest.mark.parametrize("settings", CUT, ids=str)
def test_what_would_cut_a_fit_short_is_refused_by_its_name(settings):
    with pytest.raises(ConfigError, match=f"trainer.{next(iter(settings))}"):
        check_length({"max_steps": 5, **settings})


def test_a_dry_run_may_be_as_short_as_it_likes():
    check_length({"fast_dev_run": True, "limit_train_batches": 0, "max_epochs": 0})


def test_durations():
    assert [seconds(value) for value in ("01:02:03:04", {"minutes": 2}, timedelta(seconds=5))] == [93784, 120, 5]


@pytest.mark.parametrize("given", [{"limit_val_batches": 0.5}, {"check_val_every_n_epoch": 0}])
def test_validation_that_lightning_cannot_do_is_refused(given):
    with pytest.raises(ConfigError, match=next(iter(given))):
        check_length({"max_steps": 3, **given})
    check_length({"max_steps": 3, "limit_val_batches": 1.0, "check_val_every_n_epoch": None})
