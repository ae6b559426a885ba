"""Zero-shot heads: cosine similarity to the embeddings of the class names, frozen."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from adamerge.backbones.base import Task
from adamerge.errors import DataError


class ZeroShotHead(nn.Module):
    """Cosine similarity to class embeddings, times a scale.

    Args:
        weight: ``(classes, width)``: scale x normalised mean over templates of normalised text embeddings.

    Reference: CLIP (Radford et al., 2021), https://arxiv.org/abs/2103.00020, section 3.1.4.
    """

    weight: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)

    def forward(self, features: Tensor) -> Tensor:
        """Features ``(samples, width)``, not normalised, to logits ``(samples, classes)``."""
        with torch.autocast(features.device.type, enabled=False):  # bfloat16 has steps of 0.1 at CLIP's logits
            return nn.functional.linear(nn.functional.normalize(features.float(), dim=-1), self.weight)


def class_prompts(name: str, task: Task) -> list[str]:
    """Every template with every class name, classes first.

    Raises:
        DataError: there are no class names or no templates.
    """
    if not task.classnames or not task.templates:
        raise DataError(f"task '{name}' has no class names or no templates: a zero-shot head needs both")
    return [template.format(classname) for classname in task.classnames for template in task.templates]
