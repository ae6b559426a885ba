"""Teachers, one sample at a time: kept where a prediction counts and nowhere else, and made a batch of again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from adamerge.backbones import Inputs, Output, Teacher
from adamerge.backbones.inputs import stack_tensors
from adamerge.io.tensor_bytes import tensor_bytes

Teach = Callable[[str, int], Teacher]
"""Task and sample number to what the task's expert makes of the sample; its tensors lack the sample dimension."""

Kept = dict[str, Tensor]
"""Of one sample: ``logits`` and ``classes`` at the positions of ``mask`` alone, ``hidden.i`` at those of ``hidden_mask``."""


def compact(output: Output, top: int | None, dtype: str | None) -> list[Kept]:
    """Returns what is kept of each sample of a batch, on the CPU."""
    logits, classes = narrowed(output.logits.detach(), top, dtype)
    parts: dict[str, Tensor] = {"logits": logits}
    if classes is not None:
        parts["classes"] = classes
    hidden = {f"hidden.{i}": states.detach() for i, states in enumerate(output.encoded.hidden)}
    logits_at, hidden_at = (
        _on_host(parts, output.mask, "mask"),
        _on_host(hidden, output.encoded.hidden_mask, "hidden_mask"),
    )
    return [{**one, **other} for one, other in zip(logits_at, hidden_at, strict=True)] if hidden else logits_at


def narrowed(logits: Tensor, top: int | None, dtype: str | None) -> tuple[Tensor, Tensor | None]:
    """Returns the largest logits alone in a narrower dtype, and which classes they are of; all and None without ``top``.

    Args:
        logits: ``(..., classes)``.
        top: so many of them; all when None.
        dtype: less their largest, where it is narrower than theirs; None for their own.
    """
    classes = None
    if top is not None and top < logits.shape[-1]:
        logits, largest = logits.topk(top, dim=-1)
        classes = largest.int()
    if dtype is not None and getattr(torch, dtype).itemsize < logits.dtype.itemsize:
        # a softmax does not see the shift, and narrow dtypes are finest near 0
        logits = (logits - logits.amax(dim=-1, keepdim=True)).to(getattr(torch, dtype))
    return logits, classes


def expanded(kept: Kept) -> Teacher:
    """Returns one sample with zeros at the positions that do not count, up to the last that does."""
    hidden = [f"hidden.{i}" for i in range(len(kept)) if f"hidden.{i}" in kept]
    classes = _spread(kept["classes"], kept.get("mask")) if "classes" in kept else None
    states = tuple(_spread(kept[name], kept.get("hidden_mask")) for name in hidden)
    return Teacher(_spread(kept["logits"], kept.get("mask")), classes, states)


def stack_teachers(teachers: Sequence[Teacher]) -> Teacher:
    """Makes a batch's teacher from those of its samples; positions are padded at their end, with zeros, to the longest."""
    classes = [teacher.classes for teacher in teachers if teacher.classes is not None]
    hidden = zip(*(teacher.hidden for teacher in teachers), strict=True)
    return Teacher(
        stack_tensors([teacher.logits for teacher in teachers]),
        stack_tensors(classes) if classes else None,
        tuple(stack_tensors(states) for states in hidden),
    )


def digest_of(inputs: Inputs) -> str:
    """Returns a hash of a sample: of the names, dtypes, shapes and values of its tensors."""
    digest = hashlib.sha256()
    for name, value in sorted(({"": inputs} if isinstance(inputs, Tensor) else inputs).items()):
        digest.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode())
        digest.update(tensor_bytes(value))
    return digest.hexdigest()[:32]


def _on_host(parts: Mapping[str, Tensor], mask: Tensor | None, name: str) -> list[Kept]:
    """Returns each sample's values at the positions of ``mask``, and ``mask`` itself up to its last position."""
    host = {key: value.cpu() for key, value in parts.items()}
    if mask is None:
        samples = len(next(iter(host.values()))) if host else 0
        return [{key: value[i].clone() for key, value in host.items()} for i in range(samples)]
    kept = []
    for i, counts in enumerate(mask.cpu()):
        counted = counts.nonzero()[:, 0]
        last = int(counted[-1]) + 1 if len(counted) else 0
        kept.append({**{key: value[i][counted] for key, value in host.items()}, name: counts[:last].clone()})
    return kept


def _spread(values: Tensor, mask: Tensor | None) -> Tensor:
    """Spreads ``(counted, ...)`` to ``(positions, ...)`` with zeros where ``mask``, bool ``(positions,)``, is False."""
    if mask is None:
        return values
    full = values.new_zeros(len(mask), *values.shape[1:])
    full[mask] = values
    return full
