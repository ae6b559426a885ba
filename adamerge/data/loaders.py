"""Loaders: a fit's batches step by step, labelled batches for evaluation, and their way to a device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from adamerge.backbones import Batch
from adamerge.data.batch_order import Labelled, Steps, StepSampler, labelled_batch
from adamerge.data.labels import Labels
from adamerge.data.samples import Samples
from adamerge.errors import ConfigError

BLOCKING = ("cpu", "mps")
"""Kinds of devices to which a copy is waited for, as Lightning does: unfinished values could be read there."""


class TrainingLoop(Protocol):
    """What the data ask of whoever draws a fit's batches; Lightning's ``Trainer`` has all of it."""

    @property
    def max_steps(self) -> int:
        """Returns the length of the fit in optimiser steps; below 1 where it is not set."""

    @property
    def global_step(self) -> int:
        """Returns the number of optimiser steps that are done."""

    @property
    def global_rank(self) -> int:
        """Returns the number of this process, from 0 on."""

    @property
    def world_size(self) -> int:
        """Returns the number of processes of the fit."""


def running(loop: TrainingLoop | None) -> TrainingLoop:
    """Returns the loop of a fit that has a length.

    Raises:
        ConfigError: there is no loop, or it has no length.
    """
    if loop is None or loop.max_steps < 1:
        raise ConfigError("trainer.max_steps is not set: how long should the fit be?", todo="trainer: {max_steps: 500}")
    return loop


def train_loader(steps: Steps, loop: TrainingLoop, workers: int) -> DataLoader[dict[str, Batch]]:
    """Returns a loader of one batch of every task per step, from the first step that is not done yet.

    Args:
        steps: the batches by their step.
        loop: that draws them; how many steps are done is asked when an epoch begins.
        workers: processes that make batches; 0 makes them in this one.
    """
    return DataLoader(
        steps,
        batch_size=None,
        sampler=StepSampler(lambda: loop.global_step, loop.max_steps),
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
    )


def eval_loader(samples: Samples, labels: Labels, batch_size: int, workers: int) -> DataLoader[Any]:
    """Returns a loader of labelled batches in the order of the samples.

    Args:
        samples: of one split.
        labels: of the same samples.
        batch_size: samples per batch.
        workers: processes that make batches; 0 makes them in this one.
    """
    return DataLoader(
        Labelled(samples, labels),
        batch_size=batch_size,
        collate_fn=labelled_batch,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
    )


def on_device(batch: Any, device: torch.device) -> Any:
    """Returns a batch of every task, or one batch, with its tensors on a device.

    Numbers and lengths of the samples stay on the CPU: who asks for them does not wait for a device.
    """
    if isinstance(batch, Batch):
        there: Batch = _moved(batch._replace(indices=None, lengths=None), device)
        return there._replace(indices=batch.indices, lengths=batch.lengths)
    if isinstance(batch, dict):
        return {task: on_device(part, device) for task, part in batch.items()}
    return _moved(batch, device)


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=device.type not in BLOCKING)
    if isinstance(value, Mapping):
        return {name: _moved(part, device) for name, part in value.items()}
    if isinstance(value, list | tuple):
        parts = [_moved(part, device) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value
