"""Export: the merged model as a folder that other libraries load, written one tensor at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from adamerge.artifacts.coefficients import Coefficients, save_coefficients
from adamerge.artifacts.export_files import check_names, check_task, copy_files, exported, headers, write_heads
from adamerge.artifacts.model_card import COEFFICIENTS_FILE, card
from adamerge.checkpoints.origins import origin
from adamerge.errors import ConfigError
from adamerge.io.atomic import staged_folder
from adamerge.io.safetensors_writer import nbytes_of, verify_tensors, write_weights
from adamerge.merging.merged_tensor import merged_tensor, updates

SHARD = 5.0
"""GB of a weights file, at most, by default: as others write them."""

PIECE = 1 << 17
"""Elements that are merged at a time: of larger pieces, the C library keeps more and more that it does not use again."""


def export(
    coefficients: Coefficients,
    target: str | Path,
    *,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    task: str | None = None,
    shard_size: float = SHARD,
) -> Path:
    """Write the merged model to folder ``target``: weights, configuration, card and coefficients.

    Staged beside the target, re-read and compared, then renamed: the folder is complete or not there. Needs memory for
    a few pieces of a tensor, never for a model; for a few tensors where an update is no sum over pieces: transforms,
    masks, factors of low rank.

    Args:
        coefficients: what ``load_coefficients`` gives.
        target: the new folder.
        dtype: of the floating-point tensors; by default that of the merged copy the coefficients were learned on.
        overwrite: replace an existing folder, which stays until the new one is complete.
        task: write a complete model for this task, with the head and the configuration of its expert; without, the trunk
            as the base's file has it, and every expert's head in ``heads/<task>/`` beside it.
        shard_size: GB (1e9 bytes) of a weights file, at most: a larger model is several, with an index, where the library
            that loads it knows such; ``inf`` for one file in any case.

    Raises:
        ConfigError: there is no such task, or its expert has no head of its own; or a size that is not positive.
        ExportError: the target exists, cannot be written, or does not read back as it was written.
        CheckpointError: a model's weights cannot be read, are not finite, or changed since they were opened.
    """
    vectors, layout = coefficients.task_vectors, coefficients.layout
    models = [vectors.base, *vectors.checkpoints.values()]
    check_names(layout, vectors.experts)
    dtype = dtype or coefficients.dtype
    if not shard_size > 0:
        raise ConfigError(f"shard_size must be positive, got {shard_size}")
    if task is not None:
        check_task(coefficients, task)
    most = 1e9 * shard_size if layout.divisible else math.inf
    inputs = [source for model in models for source in (*model.sources, Path(model.location)) if source.exists()]
    with staged_folder(Path(target), overwrite=overwrite, inputs=inputs) as folder:
        for model in models:
            model.check()
        header, pieces = headers(coefficients, task, dtype), merged_pieces(coefficients, dtype, task)
        written = write_weights(folder, layout.weights, header, pieces, most)
        for name, content in layout.files.items():
            (folder / name).write_text(content, encoding="utf-8")
        copy_files(layout, [vectors.base] if task is None else [vectors.checkpoints[task], vectors.base], folder, dtype)
        if task is None:
            write_heads(coefficients, folder, dtype)
        save_coefficients(coefficients, folder / COEFFICIENTS_FILE, origin)
        (folder / "README.md").write_text(card(coefficients), encoding="utf-8")
        for model in models:
            model.check()  # again: nothing may have changed while it was read
        for file, hashes in written.items():
            verify_tensors(folder / file, hashes)
    return Path(target)


def size_of(coefficients: Coefficients, dtype: torch.dtype | None = None, task: str | None = None) -> tuple[int, int]:
    """Numbers and bytes of the weights that an export with these arguments writes; nothing is read for it."""
    header = headers(coefficients, task, dtype or coefficients.dtype)
    return sum(shape.numel() for _, shape in header.values()), nbytes_of(header)


def merged_tensors(
    coefficients: Coefficients, dtype: torch.dtype, task: str | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the exported model by on-disk name, one at a time; what is neither merged nor recomputed is the base's.

    Args:
        coefficients: what ``load_coefficients`` gives.
        dtype: of the floating-point tensors.
        task: whose head takes the place of the base's.
    """
    header = headers(coefficients, task, dtype)
    for name, pieces in merged_pieces(coefficients, dtype, task):
        own, shape = header[name]
        yield name, torch.cat([torch.empty(0, dtype=own), *pieces]).view(shape)


def merged_pieces(
    coefficients: Coefficients, dtype: torch.dtype, task: str | None = None
) -> Iterator[tuple[str, Iterator[Tensor]]]:
    """As ``merged_tensors``, each tensor flattened and in consecutive pieces: what is written never stands in memory whole.

    Args:
        coefficients: what ``load_coefficients`` gives.
        dtype: of the floating-point tensors.
        task: whose head takes the place of the base's.
    """
    vectors, layout = coefficients.task_vectors, coefficients.layout
    for name, model in exported(coefficients, task).items():
        source, own = layout.copies.get(name, name), layout.stored_as(name, dtype)
        stored = (coefficients.buffers if source in coefficients.buffers else model)[source].reshape(-1)
        if model is vectors.base and source in vectors:
            parts = updates(coefficients.parametrization, source, vectors[source], size=PIECE)
            yield name, _merged(stored, parts, own)
        else:
            yield name, _cast(stored, own)


def _merged(stored: Tensor, parts: Iterator[tuple[slice, Tensor]], dtype: torch.dtype) -> Iterator[Tensor]:
    for part, update in parts:
        yield merged_tensor(stored[part], update, dtype)


def _cast(stored: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    for piece in stored.split(PIECE):
        yield piece.to(dtype) if piece.is_floating_point() else piece
