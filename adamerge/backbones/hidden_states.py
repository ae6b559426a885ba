"""Hidden states by number: which of a network's states is meant, from either end or as a share of its depth."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from adamerge.errors import ConfigError


def state_number(number: float, count: int) -> int:
    """Returns the number, from 0 to ``count - 1``, of the hidden state that is meant.

    Args:
        number: 0 is what enters the first block, ``i`` what leaves the i-th; negative ones count from the last; what lies
            between 0 and 1 is a share of the depth, and 0.5 what leaves the middle block.
        count: of the network's hidden states, one more than its blocks.

    Raises:
        ConfigError: there is no such hidden state.
    """
    if 0 < number < 1:
        return round(number * (count - 1))
    if number % 1 != 0 or not -count <= number < count:
        raise ConfigError(
            f"there is no hidden state {number}",
            expected=f"0 to {count - 1}, -1 to -{count}, or a share of the depth between 0 and 1",
        )
    return int(number) % count


@contextmanager
def captured(blocks: Sequence[nn.Module], numbers: Sequence[float]) -> Iterator[list[Tensor]]:
    """Yields a list that the hidden states of these numbers fill, in their order, during one forward pass.

    Args:
        blocks: that hand a tensor on, one after the other.
        numbers: as ``state_number`` reads them.

    Raises:
        ConfigError: there is no such hidden state.
    """
    wanted = [state_number(number, len(blocks) + 1) for number in numbers]
    outputs: dict[int, Tensor] = {}
    states: list[Tensor] = []
    handles = []
    for i in set(wanted):
        if i == 0:
            hook = blocks[0].register_forward_pre_hook(lambda module, inputs: outputs.update({0: inputs[0]}))
        else:
            hook = blocks[i - 1].register_forward_hook(lambda module, inputs, output, i=i: outputs.update({i: output}))
        handles.append(hook)
    try:
        yield states
        states.extend(outputs[number] for number in wanted)
    finally:
        for handle in handles:
            handle.remove()
