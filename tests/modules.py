"""Merging modules of a few words: the arguments of ``Merging`` with those of its search beside them."""

from __future__ import annotations

from typing import Any

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
