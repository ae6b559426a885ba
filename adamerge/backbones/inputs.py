"""Inputs of a network, one tensor or several by name: samples are stacked, batches joined and cut in one way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Inputs = Tensor | dict[str, Tensor]
"""Preprocessed inputs. Of a batch, every tensor is ``(samples, ...)``; of one sample, the same without that dimension."""

COUNT = ".count"
"""Ends the name of the number of pieces that a sample has of what the name begins with."""


class TextPlace(NamedTuple):
    """Where the text is in a backbone's inputs, which a view of texts must know.

    Attributes:
        along: names of all tensors ``(samples, positions)`` that have an entry for each token.
        special: ids of tokens that are no text, such as marks of begin and end.
        mask: id of the token that stands for one that is not shown; None where there is none.
        ids: name of the token ids.
        attended: name of the tensor that is 1 where there is a token and 0 where there is padding.
    """

    along: tuple[str, ...]
    special: tuple[int, ...]
    mask: int | None = None
    ids: str = "input_ids"
    attended: str = "attention_mask"


def count(inputs: Inputs) -> int:
    """Returns the number of samples in a batch."""
    return len(inputs if isinstance(inputs, Tensor) else next(iter(inputs.values())))


def rows(inputs: Inputs, which: slice | Tensor) -> Inputs:
    """Returns the inputs of some samples of a batch."""
    return inputs[which] if isinstance(inputs, Tensor) else {name: value[which] for name, value in inputs.items()}


def moved(inputs: Inputs, device: torch.device) -> Inputs:
    """Returns the batch on a device."""
    if isinstance(inputs, Tensor):
        return inputs.to(device, non_blocking=True)
    return {name: value.to(device, non_blocking=True) for name, value in inputs.items()}


def stack(samples: Sequence[Inputs]) -> Inputs:
    """Makes one batch of samples; sequences are padded at their end, with zeros, to the longest."""
    first = samples[0]
    if isinstance(first, Tensor):
        return stack_tensors([sample for sample in samples if isinstance(sample, Tensor)])
    named = [sample for sample in samples if isinstance(sample, dict)]
    return {name: stack_tensors([sample[name] for sample in named]) for name in first}


def stack_tensors(tensors: Sequence[Tensor], padding: int = 0) -> Tensor:
    """Stacks ``(n_i, ...)`` to ``(samples, longest n_i, ...)``, padded at the end; scalars to ``(samples,)``."""
    if tensors[0].ndim:
        longest = max(len(tensor) for tensor in tensors)
        tensors = [pad(tensor, longest, padding) for tensor in tensors]
    return torch.stack(list(tensors))


def join(batches: Sequence[Inputs]) -> Inputs:
    """Joins batches of one kind; sequences are padded at their end, with zeros, to the longest of all."""
    first = batches[0]
    if isinstance(first, Tensor):
        return join_tensors([batch for batch in batches if isinstance(batch, Tensor)])
    named = [batch for batch in batches if isinstance(batch, dict)]
    return {name: join_tensors([batch[name] for batch in named]) for name in first}


def join_tensors(tensors: Sequence[Tensor]) -> Tensor:
    """Joins ``(n_i, positions_i, ...)`` to ``(sum of n_i, longest positions_i, ...)``, padded at the end with zeros."""
    if len(tensors) == 1:
        return tensors[0]
    if tensors[0].ndim > 1:  # (samples, positions, ...)
        longest = max(tensor.shape[1] for tensor in tensors)
        inner = (0, 0) * (tensors[0].ndim - 2)
        tensors = [
            tensor
            if tensor.shape[1] == longest
            else torch.nn.functional.pad(tensor, (*inner, 0, longest - tensor.shape[1]))
            for tensor in tensors
        ]
    return torch.cat(list(tensors))


def pieces(sample: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns tensors ``(n, ...)`` of one sample, each of its own ``n``, as patches of an image, and these numbers."""
    return {**sample, **{f"{name}{COUNT}": torch.tensor(len(tensor)) for name, tensor in sample.items()}}


def packed(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the batch without padding between ``pieces``: all samples' after one another, ``(sum of n, ...)``.

    Args:
        batch: each sample has at least one piece of each kind.
    """
    counts = {name.removesuffix(COUNT): value for name, value in batch.items() if name.endswith(COUNT)}
    inputs = {name: value for name, value in batch.items() if not name.endswith(COUNT)}
    for name, count_of in counts.items():
        most = inputs[name].shape[1]
        if most == 1:  # nothing is padded: told by the shape, so that no device is waited for
            inputs[name] = inputs[name].flatten(0, 1)
        else:
            inputs[name] = inputs[name][torch.arange(most, device=count_of.device) < count_of[:, None]]
    return inputs


def pad(tensor: Tensor, length: int, padding: int = 0) -> Tensor:
    """Pads ``(n, ...)`` at the end, to ``(length, ...)``."""
    if len(tensor) == length:
        return tensor
    padded = tensor.new_full((length, *tensor.shape[1:]), padding)
    padded[: len(tensor)] = tensor
    return padded
