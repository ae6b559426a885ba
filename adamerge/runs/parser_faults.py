"""The first fault of a configuration that the parser has refused, in one line that names the key."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning import Trainer

from adamerge.data import Calibration
from adamerge.errors import ConfigError
from adamerge.runs.command_line import TOP, told_apart, unknown_key
from adamerge.runs.config_files import config_files, overlaid, overridden, read_config
from adamerge.runs.signatures import argument_fault, fault
from adamerge.training.merging import Merging


def first_fault(arguments: Sequence[str]) -> ConfigError | None:
    """Finds what is wrong with the arguments by the types of what they set; None where it is something else.

    The parser's own words name every alternative that it tried, and seldom the key first.

    Args:
        arguments: ``--config FILE`` and overrides, which the parser has refused.
    """
    config: dict[str, Any] = {}
    try:
        for file in config_files(arguments):
            config = overlaid(config, read_config(Path(file)))
        config = overridden(config, [word for word in told_apart(arguments).overrides if "+=" not in word])
    except ConfigError as error:
        return error
    groups = {key: config.get(key) or {} for key in ("model", "trainer")}
    if not all(isinstance(group, dict) for group in groups.values()):
        return None  # a file of its own
    return (
        next((unknown_key(str(key), f"'{key}'") for key in config if key not in TOP), None)
        or argument_fault("model", Merging, groups["model"])
        or (fault("data", config["data"], Calibration) if config.get("data") is not None else None)
        or argument_fault("trainer", Trainer, groups["trainer"])
        or next((one for key in ("tasks", "leave_out") if (one := fault(key, config.get(key), list[str] | None))), None)
    )
