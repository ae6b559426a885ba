"""Leftovers: tensors in older files that today's networks compute by themselves, or have no use for."""

from __future__ import annotations

from collections.abc import Sequence

from adamerge.checkpoints.checkpoint import MERGEABLE, Checkpoint

# last part of the name to the numbers of dimensions
_COMPUTED = {
    **{"inv_freq": {1}, "original_inv_freq": {1}},  # of rotary embeddings
    **{"cos_cached": {2, 3, 4}, "sin_cached": {2, 3, 4}},
    **{"masked_bias": {0, 1}, "attn_mask": {2, 3}, "position_ids": {1, 2}},
}
# T5's cross-attention has no positions, and its first files have a table for them
_UNUSED = ".EncDecAttention.relative_attention_bias.weight"


def is_leftover(name: str, shape: Sequence[int]) -> bool:
    """Whether a tensor is one that libraries once saved and no longer do, by its name and shape.

    Causal masks of GPT-2, GPT-J, GPT-NeoX and CodeGen are called ``bias``, as parameters are, and tell themselves by their
    shape ``(1, 1, n, n)``.
    """
    last = name.rpartition(".")[2]
    if last in {"bias", "causal_mask"}:
        return len(shape) == 4 and tuple(shape[:2]) == (1, 1) and shape[2] == shape[3]
    return len(shape) in _COMPUTED.get(last, ()) or name.endswith(_UNUSED)


def is_unmatched(name: str, base: Checkpoint, expert: Checkpoint) -> bool:
    """Whether a tensor of either is a leftover that cannot be merged, since both have none alike: it stays the base's."""
    if name not in base or name not in expert:
        return is_leftover(name, (base if name in base else expert).shape(name))
    alike = base.shape(name) == expert.shape(name) and {base.dtype(name), expert.dtype(name)} <= MERGEABLE
    return not alike and is_leftover(name, base.shape(name))


def leftovers(base: Checkpoint, expert: Checkpoint) -> list[str]:
    """What to know of leftovers that one of the two has and the other lacks, a line; none where there are none."""
    names = sorted(name for name in {*base} ^ {*expert} if is_unmatched(name, base, expert))
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return [f"'{names[0]}'{more}, saved by an older version on one side alone, is not merged"] if names else []
