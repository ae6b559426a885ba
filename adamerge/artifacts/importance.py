"""From a first fit to the chunks of a second: how important each tensor was, and how many coefficients that gives it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch

from adamerge.artifacts.coefficients import Coefficients, load_coefficients
from adamerge.deltas.base import TransformedDeltas
from adamerge.errors import ConfigError
from adamerge.io.atomic import write_json
from adamerge.parametrizations import ImportanceChunkWise, Linear


def importances(coefficients: Coefficients) -> dict[str, float]:
    """Returns ``I_l = sum_k |c_k,l| * |tau_k,l|_1``, normalised to a sum of 1 over the merged tensors, by tensor name.

    Where a tensor has several coefficients, each counts for its own elements; what was held in the fit does not count.
    Reads every delta once.

    Raises:
        ConfigError: the coefficients are not of the linear family.

    Reference: Expert Merging++ (Zhang et al., 2025), https://arxiv.org/abs/2509.25712.
    """
    parametrization, vectors = coefficients.parametrization, coefficients.task_vectors
    if not isinstance(parametrization, Linear):
        raise ConfigError(
            f"importances need coefficients of tensors, not those of {type(parametrization).__name__}",
            todo="make LayerWise the parametrization of the first stage",
        )
    sums, held = {}, coefficients.held
    with torch.no_grad():
        for name, deltas in vectors.items():
            shares, groups = parametrization.shares(name)
            ones = torch.ones(deltas.shape.numel(), dtype=torch.float64, device=deltas.device)
            norms = TransformedDeltas(deltas, lambda rows, _: rows.abs(), local=True).contract(ones, groups)
            mask = held.get(parametrization.group(name) or "")
            if mask is not None:
                norms = torch.where(mask.to(norms.device), 0.0, norms)
            sums[name] = float((shares.to(norms).abs() * norms).sum())
    total = math.fsum(sums.values()) or 1.0
    return {name: value / total for name, value in sums.items()}


def write_importances(path: str | Path, target: str | Path) -> dict[str, float]:
    """Writes the importances of a coefficient file as JSON, which ``ImportanceChunkWise(importance=target)`` reads.

    Raises:
        CoefficientsError: ``path`` is no usable coefficient file.
        ExportError: ``target`` cannot be written.
    """
    numbers = importances(load_coefficients(path))
    write_json(Path(target), numbers)
    return numbers


def allocation_table(parametrization: ImportanceChunkWise) -> str:
    """Returns the allocation as text, most important tensors first: importance, chunks, name."""
    importance: Mapping[str, float] = parametrization.importance or {}
    counts = parametrization.allocation
    rows = sorted(counts, key=lambda name: (-importance.get(name, 0.0), name))
    lines = [f"{importance.get(name, math.nan):10.6f}  {counts[name] or 'frozen':>6}  {name}" for name in rows]
    frozen = sum(count == 0 for count in counts.values())
    head = (
        f"{sum(counts.values())} coefficients per expert for {len(counts) - frozen} tensors; {frozen} stay at the prior"
    )
    return "\n".join([head, "importance  chunks  tensor", *lines])
