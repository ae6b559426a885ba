"""Inspection: what a coefficient file, a run or a model holds, from headers and metadata alone."""

from __future__ import annotations

import math
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from adamerge.coefficient_file import read_coefficients
from adamerge.coefficients import mask_statistics
from adamerge.export import COEFFICIENTS_FILE
from adamerge.files import read_json
from adamerge.sources import open_checkpoint


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Let the command line end as after any closed pipe."""
        raise BrokenPipeError


def describe_path(path: str) -> None:
    """Print what ``path`` is.

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
    for part in (*metadata["transforms"], metadata["parametrization"]):
        console.print(escape(f"{part['class_path']} {part['init_args']}"))
    console.print(escape(f"data: {metadata['protocol'] or 'none'}"))
    if sections["buffer"]:
        names = list(sections["buffer"])
        console.print(escape(f"buffers: {len(names)} recomputed, the others the base's: {', '.join(names)}"))
    table = Table(
        "group",
        *map(escape, metadata["rows"]),
        title="raw values, before the constraint (mean over a group's chunks)",
    )
    for group, value in sections["w"].items():
        table.add_row(escape(group), *(f"{row.mean().item():.4f}" for row in value))
    console.print(table)
    if sections["mask"]:
        masks = Table("tensor", "shape", "mean probability", "share above 0.5", title="learned mask")
        for name, logits in sections["mask"].items():
            mean, share = mask_statistics(logits)
            masks.add_row(escape(name), str(tuple(logits.shape)), f"{mean:.4f}", f"{share:.4f}")
        console.print(masks)


def _describe_model(path: str) -> None:
    checkpoint = open_checkpoint(path)
    table = Table("tensor", "shape", "dtype", title=escape(checkpoint.location))
    for name in checkpoint:
        table.add_row(
            escape(name), str(tuple(checkpoint.shape(name))), str(checkpoint.dtype(name)).removeprefix("torch.")
        )
    console = _Console()
    console.print(table)
    console.print(
        f"{len(checkpoint)} tensors, {sum(math.prod(checkpoint.shape(name)) for name in checkpoint):,} elements"
    )
    if (Path(path) / COEFFICIENTS_FILE).is_file():
        console.print(
            f"merged by adamerge: adamerge inspect {escape(str(Path(path) / COEFFICIENTS_FILE))}", soft_wrap=True
        )
