"""Inspection: what a coefficient file, a run or a model holds, from headers and metadata alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Column, Table
from torch import Tensor

from adamerge.artifacts.coefficient_table import Moments, summarised
from adamerge.artifacts.coefficients import mask_statistics
from adamerge.artifacts.model_card import COEFFICIENTS_FILE
from adamerge.artifacts.recipe import build, build_factory
from adamerge.checkpoints.checkpoint import Checkpoint, SafetensorsCheckpoint
from adamerge.checkpoints.opening import open_checkpoint
from adamerge.errors import CoefficientsError
from adamerge.io.coefficient_file import FILES, read_coefficients
from adamerge.io.safetensors_file import TensorFile
from adamerge.io.task_vector_file import is_task_vector_file, task_vector_metadata
from adamerge.io.untrusted_files import read_json
from adamerge.parametrizations import Parametrization
from adamerge.parametrizations.constraints import Constraint, Free
from adamerge.parametrizations.held_names import HELD, held_masks

NARROWEST = 24  # characters of a column of names


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Raises ``BrokenPipeError``, so that the command line ends as after any closed pipe."""
        raise BrokenPipeError


def describe_path(path: str) -> None:
    """Prints what a coefficient file, a run's folder or a model holds, from headers and metadata alone.

    Raises:
        CheckpointError: it is no model.
        CoefficientsError: it is a damaged coefficient file.
    """
    folder = Path(path)
    if (folder / "coefficients.safetensors").is_file():
        if (folder / "summary.json").is_file():
            summary = read_json(folder / "summary.json")
            _Console().print(f"run {escape(str(folder))}: {summary.get('status')} after {summary.get('step')} steps")
        folder = folder / "coefficients.safetensors"
    if folder.is_file() and folder.name.endswith("coefficients.safetensors"):
        _describe_coefficients(folder)
    else:
        _describe_model(path)


def _describe_coefficients(path: Path) -> None:
    metadata, sections = read_coefficients(path)
    console = _Console()
    console.print(
        f"[bold]{escape(str(path))}[/bold]: coefficients after {metadata['step']} steps, adamerge {metadata['version']}"
    )
    console.print(f"base: {escape(metadata['base']['source'])} (sha256 {metadata['base']['fingerprint'][:16]})")
    for task, entry in metadata["experts"].items():
        console.print(f"expert {escape(task)}: {escape(entry['source'])} (sha256 {entry['fingerprint'][:16]})")
    for which in FILES:
        if which in metadata:
            entry = metadata[which]
            console.print(f"{which}: {escape(entry['source'])} (sha256 {entry['fingerprint'][:16]})")
    for part in (*metadata["transforms"], metadata["parametrization"]):
        console.print(escape(f"{part['class_path']} {part['init_args']}"))
    protocol = {key: value for key, value in metadata["protocol"].items() if key != HELD}
    console.print(escape(f"data: {protocol or 'none'}"))
    if sections["buffer"]:
        names = list(sections["buffer"])
        console.print(escape(f"buffers: {len(names)} recomputed, the others the base's: {', '.join(names)}"))
    _print_values(metadata, sections["w"])
    if sections["mask"]:
        headings = [Column(heading, no_wrap=True) for heading in ("shape", "mean probability", "share above 0.5")]
        masks = Table(_names("tensor"), *headings, title="learned mask")
        for name, logits in sections["mask"].items():
            mean, share = mask_statistics(logits)
            masks.add_row(escape(name), str(tuple(logits.shape)), f"{mean:.4f}", f"{share:.4f}")
        _print(masks)


def _print_values(metadata: Mapping[str, Any], values: Mapping[str, Tensor]) -> None:
    """Prints a table with a row for each group: the factor of each expert's task vector there, and its spread if many."""
    if not values:
        _Console().print("coefficients: none, base and start are merged as they are")
        return
    constraint = _constraint(metadata["parametrization"])
    made = {group: value if constraint is None else constraint(value) for group, value in values.items()}
    held = held_masks(metadata["protocol"], values, metadata["rows"])
    both = any(not torch.equal(value, made[group]) for group, value in values.items())
    title = "coefficients (raw values before the constraint)" if both else "coefficients"
    if constraint is None:
        title = "raw values, before a constraint that is not part of adamerge"
    several, many = any(value.shape[1] > 1 for value in values.values()), summarised(values)
    if several:
        title += ", mean ± spread over a tensor's" if many else ", mean over a group's chunks"
    experts = [Column(escape(row), no_wrap=True) for row in metadata["rows"]]
    table = Table(_names("group"), *experts, title=title)
    kind = _kind(metadata["parametrization"]) if many else Parametrization
    raw = kind.moments(values)
    for group, (means, spreads) in kind.moments(made).items():
        cells = []
        for row, (mean, spread, before) in enumerate(zip(means, spreads, raw[group][0], strict=True)):
            cell = str(Moments(float(mean), float(spread))) if many else f"{mean.item():.4f}"
            cell += f" ({before.item():.4f})" if both else ""
            still = group in held and bool(held[group][row].all())
            cells.append(f"{cell} held" if still else cell)
        table.add_row(escape(group), *cells)
    _print(table)


def _kind(spec: Mapping[str, Any]) -> type[Parametrization]:
    """Returns the class of a parametrization, or of the one inside it, which knows what multiplies a tensor's elements."""
    inner = (spec.get("init_args") or {}).get("inner")
    if inner:
        return _kind(inner)
    try:
        kind: type[Parametrization] = build_factory(spec, Parametrization).func  # type: ignore[attr-defined]
    except CoefficientsError:
        return Parametrization
    return kind


def _constraint(spec: Mapping[str, Any]) -> Constraint | None:
    """Returns the constraint of a parametrization or of the one inside it; None where it is not one of adamerge's."""
    arguments: Mapping[str, Any] = spec.get("init_args") or {}
    if arguments.get("inner"):
        return _constraint(arguments["inner"])
    if not arguments.get("constraint"):
        return Free()
    try:
        constraint: Constraint = build(arguments["constraint"], Constraint)
    except CoefficientsError:
        return None
    return constraint


def _names(heading: str) -> Column:
    """Returns a column that folds long names: cut short, those of weight and bias would look alike."""
    return Column(heading, overflow="fold", min_width=NARROWEST)


def _print(table: Table) -> None:
    """Prints a table as wide as the terminal; at full width into a file or pipe, and never narrower than it can be."""
    console = _Console()
    least, most = Measurement.get(console, console.options.update(max_width=1 << 20), table)
    console.width = max(console.width, least if console.is_terminal else most)
    console.print(table)


def _describe_task_vectors(file: TensorFile) -> None:
    metadata = task_vector_metadata(file)
    console, solver = _Console(), metadata["solver"]
    console.print(f"[bold]{escape(str(file.path))}[/bold]: task vectors, adamerge {metadata['version']}")
    console.print(escape(f"{solver.get('class_path')} {solver.get('init_args')}"))
    for who, entry in (("base", metadata["base"]), *metadata["experts_from"].items()):
        console.print(escape(f"{who}: sha256 {entry['fingerprint'][:16]}"))
    console.print(escape(f"data: {metadata['protocol'] or 'none'}"))
    _print_tensors(SafetensorsCheckpoint(str(file.path), [file]))


def _describe_model(path: str) -> None:
    if Path(path).is_file() and is_task_vector_file(file := TensorFile(Path(path))):
        _describe_task_vectors(file)
        return
    _print_tensors(open_checkpoint(path))
    if (Path(path) / COEFFICIENTS_FILE).is_file():
        _Console().print(
            f"merged by adamerge: adamerge inspect {escape(str(Path(path) / COEFFICIENTS_FILE))}", soft_wrap=True
        )


def _print_tensors(checkpoint: Checkpoint) -> None:
    headings = [Column(heading, no_wrap=True) for heading in ("shape", "dtype")]
    table = Table(_names("tensor"), *headings, title=escape(checkpoint.location))
    for name in checkpoint:
        table.add_row(
            escape(name), str(tuple(checkpoint.shape(name))), str(checkpoint.dtype(name)).removeprefix("torch.")
        )
    _print(table)
    _Console().print(
        f"{len(checkpoint)} tensors, {sum(math.prod(checkpoint.shape(name)) for name in checkpoint):,} elements"
    )
