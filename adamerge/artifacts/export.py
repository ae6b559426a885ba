"""Export: the merged model as a folder that other libraries load, written one tensor at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from adamerge.artifacts.coefficients import Coefficients, load_coefficients
from adamerge.artifacts.export_files import (
    check_names,
    check_task,
    copy_files,
    exported,
    headers,
    staged_export,
    write_heads,
)
from adamerge.artifacts.lora_export import export_adapter
from adamerge.deltas.tuning import EXPORTED_PIECE
from adamerge.errors import ConfigError
from adamerge.io.dtypes import name_of, torch_dtype
from adamerge.io.safetensors_writer import nbytes_of, verify_tensors, write_weights
from adamerge.merging.merged_tensor import merged_tensor, updates

SHARD = 5.0
"""GB of a weights file, at most, by default: as others write them."""


def export(
    coefficients: Coefficients,
    target: str | Path,
    *,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    task: str | None = None,
    shard_size: float = SHARD,
) -> Path:
    """Writes the merged model to folder ``target``: weights, configuration, card and coefficients.

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
    check_names(layout, vectors.experts)
    dtype = dtype or coefficients.dtype
    if not shard_size > 0:
        raise ConfigError(f"shard_size must be positive, got {shard_size}")
    if task is not None:
        check_task(coefficients, task)
    most = 1e9 * shard_size if layout.divisible else math.inf
    with staged_export(coefficients, target, overwrite=overwrite) as folder:
        header, pieces = headers(coefficients, task, dtype), merged_pieces(coefficients, dtype, task)
        written = write_weights(folder, layout.weights, header, pieces, most)
        for name, content in layout.files.items():
            (folder / name).write_text(content, encoding="utf-8")
        copy_files(layout, [vectors.base] if task is None else [vectors.checkpoints[task], vectors.base], folder, dtype)
        if task is None:
            write_heads(coefficients, folder, dtype)
        for file, hashes in written.items():
            verify_tensors(folder / file, hashes)
    return Path(target)


def export_from(
    path: str | Path,
    target: str | Path,
    *,
    adapter: bool = False,
    dtype: str | None = None,
    shard_size: float | None = None,
    task: str | None = None,
    overwrite: bool = False,
    base: str | None = None,
    experts: Mapping[str, str] | None = None,
    start: str | None = None,
    components: str | None = None,
    plugins: Sequence[str] = (),
    verify: bool = True,
) -> Path:
    """Writes the model of a coefficient file, and prints how large it will be before it is merged.

    Args:
        path: the file, or the folder of the run that it lies in.
        target: the new folder.
        adapter: write one LoRA adapter of the base, of LoRA experts with whole-tensor coefficients.
        dtype: name of the floating-point tensors' dtype; that of the merged copy when None.
        shard_size: GB of a weights file, at most; ``SHARD`` when None.
        task: whose complete model is written; all heads aside when None.
        overwrite: replace an existing folder, once the new one is complete.
        base: where the base is now, when not where the file says.
        experts: where experts are now, by name.
        start: where the file of deltas that the coefficients begin from is now, when not where the file says.
        components: where the file of the experts' components is now, when not where the file says.
        plugins: prefixes of further modules that the recipe may name.
        verify: refuse models with other fingerprints than the file's.

    Raises:
        ConfigError: the options do not go together.
        AdamergeError: what ``load_coefficients``, ``export`` and ``export_adapter`` raise.
    """
    if adapter and (dtype or shard_size):
        raise ConfigError(
            "--adapter writes fp32 factors, in one file: --dtype and --shard-size do not go with it",
            todo="leave them out",
        )
    wanted = None if dtype is None else torch_dtype(dtype, "--dtype")
    coefficients = load_coefficients(path, base, experts, plugins, verify, start=start, components=components)
    if adapter:
        return export_adapter(coefficients, target, overwrite=overwrite)
    wanted = wanted or coefficients.dtype
    numbers, nbytes = size_of(coefficients, wanted, task)
    print(f"{numbers / 1e6:,.1f} M numbers, {nbytes / 1e9:,.2f} GB in {name_of(wanted)}", flush=True)
    size = SHARD if shard_size is None else shard_size
    return export(coefficients, target, dtype=wanted, overwrite=overwrite, task=task, shard_size=size)


def size_of(coefficients: Coefficients, dtype: torch.dtype | None = None, task: str | None = None) -> tuple[int, int]:
    """Returns numbers and bytes of the weights that an export with these arguments writes; nothing is read for it."""
    header = headers(coefficients, task, dtype or coefficients.dtype)
    return sum(shape.numel() for _, shape in header.values()), nbytes_of(header)


def merged_tensors(
    coefficients: Coefficients, dtype: torch.dtype, task: str | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Yields every tensor of the exported model, by on-disk name; what is neither merged nor recomputed is the base's.

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
    """Yields what ``merged_tensors`` does, each tensor flattened and in consecutive pieces, so that none is in memory whole.

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
            start = vectors.start_deltas(source)
            parts = updates(coefficients.parametrization, source, vectors[source], size=EXPORTED_PIECE, start=start)
            yield name, _merged(stored, parts, own)
        else:
            yield name, _cast(stored, own)


def _merged(stored: Tensor, parts: Iterator[tuple[slice, Tensor]], dtype: torch.dtype) -> Iterator[Tensor]:
    for part, update in parts:
        yield merged_tensor(stored[part], update, dtype)


def _cast(stored: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    for piece in stored.split(EXPORTED_PIECE):
        yield piece.to(dtype) if piece.is_floating_point() else piece
