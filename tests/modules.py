"""Merging modules of a few words, with what tests do to their coefficients and see of them."""

from __future__ import annotations

from typing import Any

import torch
from lightning import Callback
from torch.optim import Adam

from adamerge import Bilevel, Descent, Merging, MergingModule


def descending(
    backbone: Any,
    task_vectors: Any,
    parametrization: Any,
    objective: Any = None,
    lr: float = 1e-3,
    optimizer: Any = Adam,
    schedule: Any = None,
    **arguments: Any,
) -> MergingModule:
    """A module whose coefficients descend together."""
    search = Descent(optimizer, lr, schedule)
    return MergingModule(
        Merging(
            backbone=backbone,
            task_vectors=task_vectors,
            parametrization=parametrization,
            objective=objective,
            search=search,
            **arguments,
        )
    )


OF_BILEVEL = ("optimizer", "lr", "schedule", "inner_optimizer", "inner_lr", "inner_schedule", "fresh_noise")


def bilevel(
    backbone: Any, task_vectors: Any, parametrization: Any, objective: Any = None, **arguments: Any
) -> MergingModule:
    """A module whose mask is learned for coefficients that adapt to it."""
    search = Bilevel(**{key: arguments.pop(key) for key in OF_BILEVEL if key in arguments})
    return MergingModule(
        Merging(
            backbone=backbone,
            task_vectors=task_vectors,
            parametrization=parametrization,
            objective=objective,
            search=search,
            **arguments,
        )
    )


class Trail(Callback):
    """The coefficients after each step."""

    def __init__(self):
        self.w = {}

    def on_train_start(self, trainer, module):
        self.w[trainer.global_step] = module.merged.parametrization.w.detach().clone()

    def on_train_batch_end(self, trainer, module, *rest):
        self.w[trainer.global_step] = module.merged.parametrization.w.detach().clone()


def randomised(parametrization, seed=1):
    """Gives a parametrization random raw values, and returns them."""
    generator = torch.Generator().manual_seed(seed)
    values = {group: torch.randn(own.shape, generator=generator) for group, own in parametrization.values().items()}
    parametrization.load_values(values)
    return values
