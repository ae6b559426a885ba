"""Zero-shot heads: cosine similarity to the embeddings of the classes' names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from adamerge.errors import ConfigError, DataError

SHOWN = 8
"""Labels that an error lists."""


class Task(Protocol):
    """Class names and templates: what a backbone must know of a task to build its head."""

    @property
    def classnames(self) -> Sequence[str]:
        """Returns the names of the classes, in label order."""

    @property
    def templates(self) -> Sequence[str]:
        """Returns prompts with ``{}`` where the class name goes."""


class ZeroShotHead(nn.Module):
    """Classifies by cosine similarity to class embeddings, times a scale.

    Args:
        weight: ``(classes, width)``: scale x normalised mean over templates of normalised text embeddings.
    """

    weight: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)

    def forward(self, features: Tensor) -> Tensor:
        """Returns logits ``(samples, classes)`` of features ``(samples, width)`` that are not normalised."""
        with torch.autocast(features.device.type, enabled=False):  # bfloat16 has steps of 0.1 at CLIP's logits
            return nn.functional.linear(nn.functional.normalize(features.float(), dim=-1), self.weight)


_PROBE = "⟨name⟩"
"""Stands for a class name that no prompt holds."""


def check_words(where: str, classnames: Sequence[str], templates: Sequence[str]) -> None:
    """Checks whether classes can be told apart by their names, and whether each template has a place for one.

    Args:
        where: for errors.
        classnames: in label order.
        templates: prompts with ``{}`` where the class name goes.

    Raises:
        ConfigError: a name is empty or used twice, or a template cannot be filled or takes no name.
    """
    empty = next((number for number, name in enumerate(classnames) if not name.strip()), None)
    if empty is not None:
        raise ConfigError(f"{where}: the class name of label {empty} is empty", todo="give each class a name")
    (name, count), *_ = [*Counter(classnames).most_common(1), ("", 0)]
    if count > 1:
        same = [number for number, other in enumerate(classnames) if other == name]
        raise ConfigError(
            f"{where}: labels {', '.join(map(str, same[:SHOWN]))}{', …' if count > SHOWN else ''} have the same class name "
            f"'{name}'",
            todo="give each class a name of its own, as in 'crane (bird)' and 'crane (machine)'",
        )
    for template in templates:
        reason = "has no place for the class name"
        try:
            fits = _PROBE in template.format(_PROBE)
        except (LookupError, ValueError, AttributeError, TypeError) as error:
            fits, reason = False, f"cannot be filled ({error or type(error).__name__})"
        if not fits:
            raise ConfigError(
                f"{where}: the template '{template}' {reason}",
                expected="'{}' where the class name goes, as in 'a photo of a {}.', and no other braces",
                got=f"'{template}'",
            )


def check_templates(name: str, templates: Sequence[str]) -> None:
    """Checks whether there is a prompt to put class names into.

    Raises:
        DataError: there is none.
    """
    if not templates:
        raise DataError(
            f"task '{name}' has no templates, of which its head is made",
            expected="prompts with '{}' where the class name goes, as in templates: ['a photo of a {}.']",
            todo="list templates beside the task's dataset",
        )


def check_task(name: str, task: Task) -> None:
    """Checks whether a task has what a zero-shot head is made of.

    Raises:
        DataError: there are no class names or no templates.
        ConfigError: they are of no use.
    """
    check_templates(name, task.templates)
    if not task.classnames:
        raise DataError(f"task '{name}' has no class names, of which its head is made", todo="list classnames")
    check_words(f"task '{name}'", task.classnames, task.templates)


@torch.no_grad()
def class_embeddings(name: str, task: Task, embed: Callable[[Sequence[str]], Tensor]) -> Tensor:
    """Returns, per class, the normalised mean over templates of normalised embeddings; ``(classes, width)``.

    Args:
        name: of the task, for errors.
        task: class names and templates.
        embed: prompts to ``(prompts, width)``; called with at most 256.

    Raises:
        DataError: there are no class names or no templates.
        ConfigError: they are of no use.
    """
    check_task(name, task)
    prompts = [template.format(classname) for classname in task.classnames for template in task.templates]
    parts = [embed(prompts[start : start + 256]).float() for start in range(0, len(prompts), 256)]
    embeddings = nn.functional.normalize(torch.cat(parts), dim=-1)
    means = embeddings.view(len(task.classnames), len(task.templates), -1).mean(dim=1)
    return nn.functional.normalize(means, dim=-1)
