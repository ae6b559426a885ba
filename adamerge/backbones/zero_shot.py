"""Zero-shot heads: cosine similarity to the embeddings of the classes' names."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from adamerge.backbones.base import Task
from adamerge.errors import DataError


class ZeroShotHead(nn.Module):
    """Cosine similarity to class embeddings, times a scale.

    Args:
        weight: ``(classes, width)``: scale x normalised mean over templates of normalised text embeddings.
    """

    weight: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)

    def forward(self, features: Tensor) -> Tensor:
        """Features ``(samples, width)``, not normalised, to logits ``(samples, classes)``."""
        with torch.autocast(features.device.type, enabled=False):  # bfloat16 has steps of 0.1 at CLIP's logits
            return nn.functional.linear(nn.functional.normalize(features.float(), dim=-1), self.weight)


@torch.no_grad()
def class_embeddings(name: str, task: Task, embed: Callable[[Sequence[str]], Tensor]) -> Tensor:
    """Normalised mean over templates of the normalised embeddings of each class; ``(classes, width)``.

    Args:
        name: of the task, for errors.
        task: class names and templates.
        embed: prompts to ``(prompts, width)``; called with at most 256.

    Raises:
        DataError: there are no class names or no templates.
    """
    if not task.classnames or not task.templates:
        raise DataError(f"task '{name}' has no class names or no templates: a zero-shot head needs both")
    prompts = [template.format(classname) for classname in task.classnames for template in task.templates]
    parts = [embed(prompts[start : start + 256]).float() for start in range(0, len(prompts), 256)]
    embeddings = nn.functional.normalize(torch.cat(parts), dim=-1)
    means = embeddings.view(len(task.classnames), len(task.templates), -1).mean(dim=1)
    return nn.functional.normalize(means, dim=-1)
