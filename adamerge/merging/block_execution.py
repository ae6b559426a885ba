"""Block execution: how the blocks of the network run, whatever their weights are: checkpointed, compiled, or as they are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from adamerge.backbones.structure import outermost
from adamerge.errors import ConfigError
from adamerge.merging.copies import Copy


@dataclass(frozen=True)
class Passes:
    """How the blocks run: the members of the outermost module lists, such as the layers of a transformer.

    Args:
        checkpointed: keep of the activations what enters the blocks alone, and run each block again in the backward pass: one
            more forward pass, for long sequences or large micro-batches. It needs the whole copy.
        compiled: by ``torch.compile``, block by block, in the first steps; products of a bf16-mixed pass are rounded
            elsewhere then. On a CPU it needs a C++ compiler.
    """

    checkpointed: bool = False
    compiled: bool = False

    def begin(self, network: nn.Module, copy: Copy) -> None:
        """Has the network's blocks run so from now on, until ``restore``.

        Args:
            network: whose blocks run.
            copy: how its weights are there.

        Raises:
            ConfigError: it has no blocks, or their weights are not there as this needs them.
        """
        if not (self.checkpointed or self.compiled):
            return
        if self.checkpointed and not copy.whole:
            raise ConfigError(
                "model.passes.checkpointed needs the whole copy",
                expected="model.copy=adamerge.WholeCopy",
                got=copy,
                todo="leave it out: a BlockCopy runs its blocks again by itself",
            )
        if copy.collective:
            raise ConfigError(
                f"model.passes.compiled: the weights of a {copy} are gathered anew at each pass",
                expected="model.copy of WholeCopy or BlockCopy",
                got=copy,
                todo="leave it out",
            )
        blocks = outermost(network)
        if not blocks:
            raise ConfigError(
                f"model.passes: {type(network).__name__} has no blocks",
                expected="a list of modules, such as the layers of a transformer",
                todo="leave model.passes out",
            )
        for block in blocks:
            Run(block, self)


class StandIn(ABC):
    """Takes the place of a module's ``forward``, until ``restore``.

    Args:
        module: of which it is.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module, self.forward = module, module.forward
        module.forward = self

    @abstractmethod
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs what stands in for the module's own ``forward``."""

    def undo(self) -> None:
        """Gives the module its own ``forward`` back."""
        self.module.forward = self.forward


def restore(network: nn.Module) -> None:
    """Lets every module run as it is, whatever took its place; weights that were not always there are to be filled in."""
    for module in network.modules():
        while isinstance(module.forward, StandIn):
            module.forward.undo()


class Run(StandIn):
    """Runs a block as the passes say: checkpointed, compiled or neither.

    Args:
        module: whose weights stay what they are between the forward and the backward pass.
        passes: how it runs.
    """

    def __init__(self, module: nn.Module, passes: Passes) -> None:
        super().__init__(module)
        self.passes = passes
        self.run = torch.compile(self.forward) if passes.compiled else self.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the module's own ``forward``, checkpointed or compiled."""
        try:
            if self.passes.checkpointed and torch.is_grad_enabled():
                # nothing is drawn in a network in eval mode, for which transformers checkpoints nothing
                return checkpoint(self.run, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
            return self.run(*args, **kwargs)
        except torch._dynamo.exc.BackendCompilerFailed as error:
            raise ConfigError(
                f"model.passes.compiled: {type(self.module).__name__} cannot be compiled: {str(error).splitlines()[0]}",
                todo="install a C++ compiler on a CPU, or leave it out",
            ) from error
