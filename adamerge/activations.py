"""Activations: of a block of the network its inputs are kept alone, and the backward pass computes the rest again."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


class Checkpointed:
    """A module's ``forward`` under gradient checkpointing, which transformers leaves out of networks in eval mode.

    Args:
        module: whose ``forward`` is replaced; its weights must stay what they are until the backward pass.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module, self.forward = module, module.forward
        module.forward = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the module's own ``forward``."""
        if not torch.is_grad_enabled():
            return self.forward(*args, **kwargs)
        # nothing is drawn in a network in eval mode
        return checkpoint(self.forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    def undo(self) -> None:
        """Give the module its own ``forward`` back."""
        self.module.forward = self.forward
