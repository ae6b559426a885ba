"""Trainer settings: what a fit cannot do with some of them, seen before anything is read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from adamerge.errors import ConfigError

SUITABLE_PRECISION = {"32", "32-true", "bf16", "bf16-mixed", "None"}


def check_precision(precision: str, dtype: torch.dtype) -> None:
    """See whether gradients of the merged copy come through.

    Args:
        precision: of the trainer.
        dtype: of the merged copy.

    Raises:
        ConfigError: they do not.
    """
    if precision not in SUITABLE_PRECISION:
        raise ConfigError(
            f"trainer.precision={precision} does not suit: coefficients must stay fp32, and gradients reach the merged "
            "copy without loss scaling",
            expected="32-true or bf16-mixed",
            got=precision,
            todo="backbone.dtype sets the merged copy's own dtype",
        )
    if dtype == torch.float16:
        raise ConfigError("backbone.dtype=float16: gradients would underflow", expected="float32 or bfloat16")


def whole_number(trainer: Mapping[str, Any], key: str, default: int) -> int:
    """A setting that counts; the default where it is missing.

    Raises:
        ConfigError: it does not.
    """
    value = trainer.get(key)
    try:
        return default if value is None else int(value)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"trainer.{key} is no whole number", expected="such as 500", got=value) from error


def check_length(trainer: Mapping[str, Any]) -> None:
    """See whether a fit has a length, and does all of it.

    Args:
        trainer: its settings; what is missing is the trainer's default.

    Raises:
        ConfigError: it has none, or would be shorter than it says.
    """
    if whole_number(trainer, "max_steps", 0) < 1 and not trainer.get("fast_dev_run"):
        raise ConfigError("trainer.max_steps is not set: how long should the fit be?", todo="--trainer.max_steps=500")
    if trainer.get("accumulate_grad_batches") not in {None, 1}:
        raise ConfigError("trainer.accumulate_grad_batches would shorten the fit", todo="use --model.micro_batch")
