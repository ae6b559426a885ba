"""The configuration of a LoRA adapter: whether its change is a plain product of factors, and each layer's rank and scale."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adamerge.errors import CheckpointError
from adamerge.io.untrusted_files import quoted, read_json

# what would make the change another than scale * B @ A, by the configuration's key
_REFUSED = {
    "use_dora": "DoRA rescales the columns of the merged weight, which is no sum of task vectors",
    "use_qalora": "its factors act on pooled inputs",
    "use_bdlora": "its factors are block-diagonal",
    "lora_bias": "it adds a bias inside the factors",
    "alora_invocation_tokens": "it acts on some tokens only",
    "arrow_config": "it chooses among adapters by token",
    "kasa_config": "it changes the base by an SVD",
    "monteclora_config": "its factors are random",
    "layer_replication": "it changes the number of layers",
    "target_parameters": "it acts on parameters that are fused in memory",
    "trainable_token_indices": "it trains single rows of an embedding",
}
LARGEST = 1e6
"""Of ranks and alphas: a larger one would overflow in a weight, if it is no mistake."""

LONGEST, MOST_REPEATS = 1000, 2
"""Letters and repetitions of a pattern: one with more can take hours to match."""

_REPEATS, _REPEATED_GROUP = re.compile(r"[*+{]"), re.compile(r"\)\s*[*+{]")
_CHANGES_BASE = re.compile(r"pissa|olora|loftq|corda|lora_ga", re.IGNORECASE)


def read_configuration(path: Path) -> dict[str, Any]:
    """Reads ``adapter_config.json``.

    Raises:
        CheckpointError: unreadable, or of an adapter whose change is not ``scale * B @ A``; the reason is given.
    """
    config = read_json(path)
    _refuse_variants(config, quoted(path))
    return config


def by_pattern(config: Mapping[str, Any], key: str, module: str, otherwise: Any) -> Any:
    """The value of the first pattern that matches the end of the module's name, as peft does it."""
    for pattern, value in (config.get(key) or {}).items():
        try:
            if (
                len(pattern) > LONGEST
                or len(_REPEATS.findall(pattern)) > MOST_REPEATS
                or _REPEATED_GROUP.search(pattern)
            ):
                raise re.error("it is too long, or has too many or nested repetitions")
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        except (re.error, OverflowError, RecursionError) as error:
            raise CheckpointError(f"an adapter's {key} has {quoted(pattern)}, which is no pattern: {error}") from error
    return otherwise


def _refuse_variants(config: Mapping[str, Any], place: str) -> None:
    """Raises CheckpointError, with the reason, for every adapter whose change is not ``scale * B @ A``."""
    todo = "merge this adapter into its base with peft, and use the merged model"
    if config.get("peft_type") != "LORA":
        raise CheckpointError(
            f"{place}: unknown kind of adapter", expected="LORA", got=config.get("peft_type"), todo=todo
        )
    for key, reason in _REFUSED.items():
        if config.get(key):
            raise CheckpointError(f"{place}: {key} is not supported: {reason}", got=config[key], todo=todo)
    start = str(config.get("init_lora_weights", ""))
    if _CHANGES_BASE.match(start):
        what = f"{place}: init_lora_weights={quoted(start)} changed the base's weights before training"
        raise CheckpointError(what, todo="save it with peft's path_initial_model_for_weight_conversion")
    for key, pattern, least in (("r", "rank_pattern", 1), ("lora_alpha", "alpha_pattern", -LARGEST)):
        given = config.get(pattern) or {}
        for number in (config.get(key), *(given.values() if isinstance(given, dict) else [given])):
            if isinstance(number, bool) or not isinstance(number, int | float) or not least <= number <= LARGEST:
                raise CheckpointError(f"{place}: {key} or {pattern} is no number that fits", got=number)
