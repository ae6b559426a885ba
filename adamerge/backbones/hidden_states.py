"""Hidden states by number: which of a network's states is meant, from either end or as a share of its depth."""

from __future__ import annotations

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
