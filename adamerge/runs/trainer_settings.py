"""Trainer settings: what a fit cannot do with some of them, seen before anything is read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from adamerge.errors import ConfigError


def whole_number(trainer: Mapping[str, Any], key: str, default: int) -> int:
    """Returns a trainer's setting as a whole number; the default where it is missing.

    Raises:
        ConfigError: it is no whole number.
    """
    value = trainer.get(key)
    try:
        return default if value is None else int(value)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"trainer.{key} is no whole number", expected="such as 500", got=value) from error


def check_length(trainer: Mapping[str, Any]) -> None:
    """Checks that a fit has a length in steps, and that no setting ends it earlier.

    Args:
        trainer: its settings; what is missing is the trainer's default.

    Raises:
        ConfigError: it has none, or would be shorter than it says.
    """
    steps = whole_number(trainer, "max_steps", 0)
    if trainer.get("accumulate_grad_batches") not in {None, 1}:
        raise ConfigError("trainer.accumulate_grad_batches would shorten the fit", todo="use --model.micro_batch")
    if trainer.get("fast_dev_run"):
        return
    if steps < 1:
        raise ConfigError("trainer.max_steps is not set: how long should the fit be?", todo="--trainer.max_steps=500")
    if whole_number(trainer, "max_epochs", 1) == 0:
        raise ConfigError(
            "trainer.max_epochs=0 would end the fit before its first step",
            expected="1: all steps are one pass over the fit's data",
            got=0,
            todo="leave it out, and set trainer.max_steps",
        )
    for key, whole in (("limit_train_batches", 1.0), ("overfit_batches", 0.0)):
        value = trainer.get(key)
        none = not isinstance(value, bool) and value == whole and (isinstance(value, float) or value == 0)
        enough = key == "limit_train_batches" and isinstance(value, int) and value >= steps
        if value is not None and not none and not enough:
            raise ConfigError(
                f"trainer.{key}={value} would end the fit before its {steps} steps",
                expected=whole,
                got=value,
                todo="leave it out, and set trainer.max_steps",
            )
    if trainer.get("max_time") is not None and seconds(trainer["max_time"]) <= 0:
        raise ConfigError(
            "trainer.max_time would end the fit before its first step",
            expected="some time, as DD:HH:MM:SS",
            got=trainer["max_time"],
            todo="leave it out, or give it time",
        )
    scored = trainer.get("limit_val_batches")
    if isinstance(scored, float) and scored not in {0.0, 1.0}:
        raise ConfigError(
            f"trainer.limit_val_batches={scored} is a share of batches, of which there may be one",
            expected="a number of batches, or 0 for no validation",
            got=scored,
        )
    if trainer.get("check_val_every_n_epoch") == 0:
        raise ConfigError(
            "trainer.check_val_every_n_epoch=0 is no number of passes",
            todo="for no validation: trainer.limit_val_batches=0",
        )
    between = trainer.get("val_check_interval")
    if isinstance(between, int) and between > steps and trainer.get("check_val_every_n_epoch", 1) is not None:
        raise ConfigError(
            f"trainer.val_check_interval={between} is never reached in {steps} steps",
            expected=f"at most {steps}",
            got=between,
        )


def seconds(duration: Any) -> float:
    """Returns the seconds of a ``trainer.max_time``: ``DD:HH:MM:SS``, a timedelta, or a mapping with its parts.

    Raises:
        ConfigError: it is none of these.
    """
    try:
        if isinstance(duration, str):
            fields = re.fullmatch(r"(\d+):(\d\d):(\d\d):(\d\d)", duration.strip())
            parts = ("days", "hours", "minutes", "seconds")
            duration = dict(zip(parts, map(int, fields.groups()), strict=True)) if fields else None
        return (duration if isinstance(duration, timedelta) else timedelta(**duration)).total_seconds()
    except TypeError as error:
        raise ConfigError(
            "trainer.max_time is no duration", expected="DD:HH:MM:SS, such as 00:01:30:00", got=duration
        ) from error
