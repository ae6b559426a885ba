"""Shortcuts: blocks of a network that make what they made before hand that on and do not run, pass after pass."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree

from adamerge.backbones.structure import outermost


@dataclass
class _Settled:
    """What is kept of the passes of one model on one batch.

    Attributes:
        blocks: that need not run again, in the order in which they do.
        handed: by the list that they are members of what the last of them handed on.
    """

    blocks: list[nn.Module] = field(default_factory=list)
    handed: dict[int, Any] = field(default_factory=dict)


class Shortcuts:
    """Lets passes that each go a little further than those before begin at the block which they reach.

    Of blocks that come one after the other, such as the layers of a transformer, the last output alone is kept, and all that
    need not run hand that on. It holds where blocks see each other's outputs alone, one after the other: whoever uses it
    compares first.

    Args:
        network: with lists of blocks; without any, all of it runs each time.
    """

    def __init__(self, network: nn.Module) -> None:
        lists = [module for module in network.modules() if isinstance(module, nn.ModuleList)]
        homes = {id(block): id(blocks) for blocks in lists for block in blocks}
        self._blocks = {block: homes[id(block)] for block in outermost(network) if id(block) in homes}
        self._settled: dict[Hashable, _Settled] = {}

    def forget(self) -> None:
        """Has all blocks run again."""
        self._settled = {}

    @contextmanager
    def passing(self, key: Hashable, reached: Callable[[], bool]) -> Iterator[None]:
        """Runs a pass without what need not run.

        Args:
            key: of the model, as far as it is known to be the same as before, and of the batch.
            reached: whether the pass has come to what may change from here on: blocks that end before are settled.
        """
        settled, numbers = self._settled.setdefault(key, _Settled()), count()

        def instead(block: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
            def run(*args: Any, **kwargs: Any) -> Any:
                number = next(numbers)
                if number < len(settled.blocks) and settled.blocks[number] is block:
                    return _copied(settled.handed[self._blocks[block]])
                output = forward(*args, **kwargs)
                if number == len(settled.blocks) and not reached():
                    settled.blocks.append(block)
                    settled.handed[self._blocks[block]] = _copied(output)
                return output

            return run

        before = {block: block.__dict__.get("forward") for block in self._blocks}
        for block in self._blocks:
            block.forward = instead(block, block.forward)
        try:
            yield
        finally:
            for block, own in before.items():
                del block.forward
                if own is not None:
                    block.forward = own


def _copied(output: Any) -> Any:
    """Returns what a block handed on, in memory of its own: the next block may write into it."""
    return _pytree.tree_map(lambda part: part.clone() if isinstance(part, Tensor) else part, output)
