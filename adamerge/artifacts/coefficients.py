"""Coefficients: learned values, the recipe that gives them meaning, and which models they belong to."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

import adamerge
from adamerge.artifacts.coefficient_table import Cell, coefficient_table
from adamerge.artifacts.model_sources import check_buffers, check_fingerprints, source_of, written_source
from adamerge.artifacts.recipe import build, build_factory, describe, plain_data
from adamerge.checkpoints.checkpoint import Checkpoint
from adamerge.errors import CoefficientsError, ConfigError
from adamerge.io.atomic import staged_file
from adamerge.io.coefficient_file import FORMAT, METADATA_KEY, digest_of, plain_layout, read_coefficients
from adamerge.io.dtypes import name_of
from adamerge.io.model_folder import Layout
from adamerge.parametrizations import Parametrization
from adamerge.parametrizations.held_names import held_masks
from adamerge.parametrizations.wrapper import kind_of
from adamerge.task_vectors.task_vectors import Source, TaskVectors
from adamerge.transforms import Transform


@dataclass(frozen=True)
class Coefficients:
    """Everything that ``export`` needs, besides the models' own files.

    Attributes:
        task_vectors: base and experts, opened, transforms applied.
        parametrization: with the learned values in it.
        layout: of the exported folder.
        dtype: of the merged copy they were learned on.
        step: optimiser steps they were learned for.
        protocol: which data were used, and how.
        buffers: on-disk name to fp32 values that take the place of the base's; none where its own stay.
    """

    task_vectors: TaskVectors
    parametrization: Parametrization
    layout: Layout = field(default_factory=Layout)
    _: KW_ONLY
    dtype: torch.dtype = torch.float32
    step: int = 0
    protocol: Mapping[str, Any] = field(default_factory=dict)
    buffers: Mapping[str, Tensor] = field(default_factory=dict)

    def check(self) -> None:
        """Checks whether the recipe can be written, before a fit and not after it.

        Raises:
            ConfigError: a part's constructor arguments are not attributes of the same name, or not plain data.
        """
        for part in (*self.task_vectors.transforms, self.parametrization):
            plain_data(part, "written into a coefficient file")

    def table(self) -> dict[str, dict[str, Cell]]:
        """Returns group name to expert name to coefficients, after the constraint; mean and spread where they are many."""
        with torch.no_grad():
            made = self.parametrization.coefficients()
        return coefficient_table(kind_of(self.parametrization), made, self.task_vectors.experts)

    @property
    def held(self) -> dict[str, Tensor]:
        """Coefficients that the protocol says were held: group name to booleans ``(experts, coefficients of the group)``."""
        return held_masks(self.protocol, self.parametrization.values(), self.task_vectors.experts)

    def held_table(self) -> dict[str, list[str]]:
        """Returns group name to the experts whose coefficients there were all held."""
        experts = self.task_vectors.experts
        return {
            group: [task for task, row in zip(experts, mask, strict=True) if bool(row.all())]
            for group, mask in self.held.items()
        }

    def mask_table(self) -> dict[str, tuple[float, float]]:
        """Returns tensor name to mean probability of its learned mask, and the share of probabilities above 0.5."""
        return {name: mask_statistics(logits.detach()) for name, logits in self.parametrization.masks().items()}


def mask_statistics(logits: Tensor) -> tuple[float, float]:
    """Returns the mean of ``sigmoid(logits)``, and the share of it above 0.5."""
    probabilities = logits.sigmoid()
    return float(probabilities.mean()), float((probabilities > 0.5).float().mean())


def save_coefficients(
    coefficients: Coefficients, path: str | Path, location: Callable[[Checkpoint], str] | None = None
) -> None:
    """Writes the file atomically; the same coefficients give the same bytes.

    Args:
        coefficients: what is written.
        path: of the file.
        location: what the file says of where a model is; when None its path on this machine, or inside the file's run.

    Raises:
        ExportError: the file cannot be written.
    """
    vectors, location = coefficients.task_vectors, location or partial(written_source, Path(path))
    metadata = {
        "format": FORMAT,
        "version": adamerge.__version__,
        "step": coefficients.step,
        "base": _entry(vectors.base, location),
        "experts": {task: _entry(checkpoint, location) for task, checkpoint in vectors.checkpoints.items()},
        **{which: _entry(file, location) for which, file in vectors.files.items()},
        "rows": list(vectors.experts),
        "include": list(vectors.include),
        "exclude": list(vectors.exclude),
        "transforms": [describe(transform) for transform in vectors.transforms],
        "states": vectors.states,
        "parametrization": describe(coefficients.parametrization),
        "dtype": name_of(coefficients.dtype),
        "layout": plain_layout(coefficients.layout),
        "protocol": dict(coefficients.protocol),
    }
    parametrization = coefficients.parametrization
    sections: dict[str, Mapping[str, Tensor]] = {
        "w": parametrization.values(),
        "mask": parametrization.masks(),
        "buffer": coefficients.buffers,
    }
    values = {
        f"{section}/{name}": value.detach().contiguous().cpu()
        for section, tensors in sections.items()
        for name, value in tensors.items()
    }
    metadata["digest"] = digest_of(metadata, values)
    with staged_file(Path(path)) as temporary:
        # not one string of bytes first: a mask is as large as the model
        safetensors.torch.save_file(values, temporary, {METADATA_KEY: json.dumps(metadata)})


def _entry(model: Checkpoint, location: Callable[[Checkpoint], str]) -> dict[str, str]:
    """Returns what the file says of a model."""
    return {"source": location(model), "fingerprint": model.fingerprint}


def load_coefficients(
    path: str | Path,
    base: Source | None = None,
    experts: Mapping[str, Source] | None = None,
    plugins: Sequence[str] = (),
    verify: bool = True,
    *,
    start: str | Path | None = None,
    components: str | Path | None = None,
) -> Coefficients:
    """Opens a coefficient file and the models it names.

    Args:
        path: the file.
        base: where the base is now, when not where the file says.
        experts: where experts are now, by name, when not where the file says; the others stay.
        plugins: prefixes of further modules that the recipe may name; by default ``adamerge.`` alone.
        verify: compare the models' fingerprints with the file's, which reads every weight once.
        start: where the start's file of deltas is now, when not where the file says.
        components: where the file of the experts' components is now, when not where the file says.

    Raises:
        CoefficientsError: the file is corrupt, of an unknown version, names foreign classes, or belongs to other models.
        CheckpointError: a model cannot be opened.
    """
    path = Path(path)
    metadata, sections = read_coefficients(path)
    moved = dict(experts or {})
    unknown = sorted(moved.keys() - metadata["experts"].keys())
    if unknown:
        raise CoefficientsError(
            f"{path} has no expert '{unknown[0]}'", expected=f"one of {sorted(metadata['experts'])}", got=unknown[0]
        )
    files: dict[str, str] = {}
    for which, given in (("start", start), ("components", components)):
        if given is not None and which not in metadata:
            raise CoefficientsError(f"{path} has no {which}", todo=f"leave out --{which}")
        if which in metadata:
            source = source_of(path, f"the {which}", f"--{which} PATH", metadata[which]["source"], given)
            files[which] = str(source)
    try:
        vectors = TaskVectors(
            source_of(path, "the base", "--base PATH", metadata["base"]["source"], base),
            {
                task: source_of(path, f"expert '{task}'", f"--expert {task}=PATH", entry["source"], moved.get(task))
                for task, entry in metadata["experts"].items()
            },
            [build(spec, Transform, plugins) for spec in metadata["transforms"]],
            metadata["include"],
            metadata["exclude"],
            start=files.get("start"),
            components=files.get("components"),
            states=metadata["states"],
        )
        parametrization: Parametrization = build_factory(metadata["parametrization"], Parametrization, plugins)(vectors)
        if list(vectors.experts) != metadata["rows"]:
            raise ValueError(f"rows {metadata['rows']}, experts {list(vectors.experts)}")
        parametrization.load_values(sections["w"])
        parametrization.load_masks(sections["mask"])
        check_buffers(sections["buffer"], vectors)
    except ConfigError as error:
        raise CoefficientsError(f"{path}: the recipe cannot be used: {error.what}") from error
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, OverflowError) as error:
        raise CoefficientsError(f"{path}: the recipe does not fit the values: {error}") from error
    if verify:
        check_fingerprints(path, metadata, vectors)
    layout = Layout(**metadata["layout"])
    return Coefficients(
        vectors,
        parametrization,
        layout=layout,
        dtype=getattr(torch, metadata["dtype"]),
        step=metadata["step"],
        protocol=metadata["protocol"],
        buffers=sections["buffer"],
    )


def load_values(path: Path, parametrization: Parametrization, experts: Sequence[str]) -> None:
    """Sets a parametrization's values and mask, in place, to those of a file; experts go by name, models are not compared.

    Args:
        path: the file.
        parametrization: of the same groups and mask.
        experts: whose rows it has, in their order.

    Raises:
        CoefficientsError: the file cannot be read, or is of other experts, groups or masked tensors.
    """
    metadata, sections = read_coefficients(path)
    rows = metadata["rows"]
    if sorted(rows) != sorted(experts):
        raise CoefficientsError(
            f"init_from {path}: its experts are not this run's", expected=sorted(experts), got=sorted(rows)
        )
    order = [rows.index(task) for task in experts]
    try:
        parametrization.load_values({group: value[order] for group, value in sections["w"].items()})
        parametrization.load_masks(sections["mask"])
    except (KeyError, ValueError) as error:
        raise CoefficientsError(f"init_from {path}: {error.args[0]}", todo="use the same parametrization") from error
