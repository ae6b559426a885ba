"""Export of merged LoRA experts as one adapter: their factors side by side, which peft reloads with nothing lost."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from adamerge.artifacts.coefficients import Coefficients
from adamerge.artifacts.export_files import staged_export
from adamerge.checkpoints.lora import CONFIG, PREFIX, WEIGHTS, AdapterCheckpoint, Pair
from adamerge.checkpoints.origins import base_name
from adamerge.deltas.low_rank import LowRankDeltas
from adamerge.errors import ExportError
from adamerge.io.safetensors_writer import verify_tensors
from adamerge.io.tensor_bytes import tensor_bytes
from adamerge.io.untrusted_files import quoted
from adamerge.parametrizations import Linear
from adamerge.precision import exact


def export_adapter(coefficients: Coefficients, target: str | Path, *, overwrite: bool = False) -> Path:
    """Writes the merged model's change as a LoRA adapter of the base: fp32 factors, configuration, card and coefficients.

    The rank of a tensor is the sum of the experts' ranks. Coefficients and scales are in the factors, and the adapter's own
    scale is 1. Staged beside the target, re-read and compared, then renamed, as in ``export``.

    Args:
        coefficients: what ``load_coefficients`` gives.
        target: the new folder.
        overwrite: replace an existing folder, which stays until the new one is complete.

    Raises:
        ExportError: the change is no sum of the experts' factors, or the target exists, cannot be written, or does not read
            back as it was written.
        CheckpointError: a model's weights cannot be read, are not finite, or changed since they were opened.
    """
    pairs = _pairs(coefficients)
    with staged_export(coefficients, target, overwrite=overwrite) as folder:
        tensors: dict[str, Tensor] = {}
        with torch.no_grad():
            for name, pair in pairs.items():
                tensors |= _factors(coefficients, name, pair)
        (folder / WEIGHTS).write_bytes(safetensors.torch.save(tensors, {"format": "pt"}))
        (folder / CONFIG).write_text(json.dumps(_configuration(coefficients, pairs, tensors), indent=2) + "\n")
        hashes = {key: hashlib.sha256(tensor_bytes(value)).hexdigest() for key, value in tensors.items()}
        verify_tensors(folder / WEIGHTS, hashes)
        _compare(coefficients, folder)
    return Path(target)


def _refusal(reason: str) -> ExportError:
    return ExportError(
        f"this merge cannot be written as one adapter: {reason}", todo="export it dense, without --adapter"
    )


def _pairs(coefficients: Coefficients) -> dict[str, Pair]:
    """Returns for each merged tensor what peft calls it, from the first adapter that has it."""
    vectors, parametrization = coefficients.task_vectors, coefficients.parametrization
    adapters = []
    if coefficients.buffers:
        raise _refusal(
            f"buffers such as {quoted(next(iter(coefficients.buffers)))} were recomputed, and have no factors"
        )
    if vectors.start is not None:
        raise _refusal("it begins from a start, whose deltas have no factors")
    for task, checkpoint in vectors.checkpoints.items():
        if not isinstance(checkpoint, AdapterCheckpoint):
            raise _refusal(f"expert '{task}' is a full model")
        adapters.append(checkpoint)
    if not isinstance(parametrization, Linear):
        raise _refusal(f"{type(parametrization).__name__} is not linear in whole task vectors")
    pairs: dict[str, Pair] = {}
    for name in vectors:
        if not isinstance(vectors[name], LowRankDeltas):
            raise _refusal(f"{quoted(name)} is not low-rank in every expert after the transforms")
        if parametrization.shares(name)[1].count != 1:
            raise _refusal(f"{quoted(name)} has several coefficients per expert")
        own = [adapter.pairs[name] for adapter in adapters if name in adapter.pairs]
        if len({pair.module for pair in own}) > 1:
            raise _refusal(f"the adapters have several names for {quoted(name)}: {sorted({p.module for p in own})}")
        pairs[name] = own[0]
    return pairs


def _factors(coefficients: Coefficients, name: str, pair: Pair) -> dict[str, Tensor]:
    """Returns keys and values of one tensor's A and B, coefficients and scales in the left factor."""
    deltas, parametrization = coefficients.task_vectors[name], coefficients.parametrization
    assert isinstance(deltas, LowRankDeltas) and isinstance(parametrization, Linear)
    left, right = deltas.read()
    with exact(left.device):
        left = left * (parametrization.shares(name)[0][:, 0].to(left.device) @ deltas.weights.to(left))
    a, b = (left.t(), right.t()) if pair.turned else (right, left)
    if len(deltas.shape) > 2:  # a convolution's factors
        a, b = a.reshape(len(a), *deltas.shape[1:]), b.reshape(*b.shape, *[1] * (len(deltas.shape) - 2))
    stem, ending = PREFIX + pair.module, "" if pair.embedding else ".weight"
    kind = "lora_embedding_" if pair.embedding else "lora_"
    return {f"{stem}.{kind}{which}{ending}": x.cpu().clone().contiguous() for which, x in (("A", a), ("B", b))}


def _configuration(
    coefficients: Coefficients, pairs: Mapping[str, Pair], tensors: Mapping[str, Tensor]
) -> dict[str, object]:
    """Returns a configuration for peft: every module by its full name, its own rank, and the alpha that makes its scale 1."""
    vectors = coefficients.task_vectors
    configs = [model.config for model in vectors.checkpoints.values() if isinstance(model, AdapterCheckpoint)]
    ranks = {}
    for pair in pairs.values():
        key = f"{PREFIX}{pair.module}.{'lora_embedding_A' if pair.embedding else 'lora_A.weight'}"
        ranks[pair.module] = len(tensors[key])
    usual = max(ranks.values())
    others = {f"^{re.escape(module)}": rank for module, rank in ranks.items() if rank != usual}
    types = {config.get("task_type") for config in configs}
    return {
        "peft_type": "LORA",
        "task_type": types.pop() if len(types) == 1 else None,
        "base_model_name_or_path": base_name(vectors.base, vectors.checkpoints.values()),
        "target_modules": sorted(ranks),
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": others,
        "alpha_pattern": others,
        "use_rslora": False,
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": any(pair.turned and not pair.embedding for pair in pairs.values()),
        "init_lora_weights": True,
        "inference_mode": True,
        "lora_dropout": 0.0,
    }


def _compare(coefficients: Coefficients, folder: Path) -> None:
    """Opens the adapter as a stranger's, and compares its change of every tensor with the merge's."""
    vectors = coefficients.task_vectors
    written = AdapterCheckpoint(folder, vectors.base)
    with torch.no_grad():
        for name in vectors:
            update = coefficients.parametrization(name, vectors[name])
            factors = written.factors(name)
            change = None if factors is None else factors.dense().view(update.shape)
            if change is None or not torch.allclose(
                change, update.cpu(), rtol=1e-5, atol=1e-6 * float(update.abs().max())
            ):
                raise ExportError(f"the adapter does not give the merge's change of {quoted(name)} when read back")
