"""The trainer's keys: Lightning's, with their plain types and defaults, so that a configuration is read without Lightning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Precision = Literal[
    64, 32, 16, "transformer-engine", "transformer-engine-float16", "16-true", "16-mixed", "bf16-true", "bf16-mixed",
    "32-true", "64-true", "64", "32", "16", "bf16",
]  # fmt: skip
Duration = str | dict[str, int] | None

OURS = {
    "max_epochs": 1,
    "log_every_n_steps": 10,
    "num_sanity_val_steps": 0,
    "use_distributed_sampler": False,
    "enable_model_summary": False,
}
"""Defaults that suit a fit of one pass over its steps, where Lightning's are others."""


@dataclass(kw_only=True)
class Trainer:
    """Arguments of ``lightning.Trainer`` by their plain types; what may be a class is read by Lightning where it is one."""

    accelerator: str = "auto"
    strategy: str = "auto"
    devices: list[int] | int | str = "auto"
    num_nodes: int = 1
    precision: Precision | None = None
    logger: bool | None = None
    callbacks: list[Any] | None = None
    fast_dev_run: int | bool = False
    max_epochs: int | None = 1
    min_epochs: int | None = None
    max_steps: int = -1
    min_steps: int | None = None
    max_time: Duration = None
    limit_train_batches: int | float | None = None
    limit_val_batches: int | float | None = None
    limit_test_batches: int | float | None = None
    limit_predict_batches: int | float | None = None
    overfit_batches: int | float = 0.0
    val_check_interval: int | float | Duration = None
    check_val_every_n_epoch: int | None = 1
    num_sanity_val_steps: int | None = 0
    log_every_n_steps: int | None = 10
    enable_checkpointing: bool | None = None
    enable_progress_bar: bool | None = None
    enable_model_summary: bool | None = False
    accumulate_grad_batches: int = 1
    gradient_clip_val: int | float | None = None
    gradient_clip_algorithm: str | None = None
    deterministic: bool | Literal["warn"] | None = None
    benchmark: bool | None = None
    inference_mode: bool = True
    use_distributed_sampler: bool = False
    profiler: str | None = None
    detect_anomaly: bool = False
    barebones: bool = False
    plugins: list[Any] | None = None
    sync_batchnorm: bool = False
    reload_dataloaders_every_n_epochs: int = 0
    default_root_dir: str | None = None
    enable_autolog_hparams: bool = True
    model_registry: str | None = None


CLASSES = ("accelerator", "strategy", "logger", "callbacks", "profiler", "plugins")
"""Keys of the trainer whose values may be objects, made of classes."""


def names_classes(trainer: Mapping[str, Any]) -> bool:
    """Returns whether a value of the trainer's section is a class, so that Lightning must read it."""
    plain = {key: trainer.get(key) for key in CLASSES}
    named = {key: plain.pop(key) for key in ("logger", "callbacks", "plugins")}
    texts = (None, "", "true", "True", "false", "False", "null", True, False)
    return any(value not in texts and value != [] for value in named.values()) or any(
        isinstance(value, dict) for value in plain.values()
    )
