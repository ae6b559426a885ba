"""The first fault of a configuration that the parser has refused, in one line that names the key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adamerge.data import Calibration
from adamerge.errors import ConfigError
from adamerge.runs.signatures import argument_fault, fault
from adamerge.runs.trainer_keys import Trainer, names_classes
from adamerge.training import Merging


def first_fault(config: Mapping[str, Any]) -> ConfigError | None:
    """Finds what is wrong with a configuration by the types of what it sets; None where it is something else.

    The parser's own words name every alternative that it tried, and seldom the key first.

    Args:
        config: which the parser has refused, as YAML has it.
    """
    groups = {key: config.get(key) or {} for key in ("model", "trainer")}
    for key, group in groups.items():
        if not isinstance(group, dict):
            return ConfigError(f"{key}: {group!r} is no mapping of its keys", todo=f"--{key}.KEY=VALUE")
    trainer: Any = Trainer
    if names_classes(groups["trainer"]):
        from lightning import Trainer as trainer
    return (
        argument_fault("model", Merging, groups["model"])
        or fault("data", config.get("data"), Calibration)
        or argument_fault("trainer", trainer, groups["trainer"])
        or next((one for key in ("tasks", "leave_out") if (one := fault(key, config.get(key), list[str] | None))), None)
    )
