"""Merge and contraction of several parametrizations beside those of the layer-wise one, in one process and by turns.

    python tests/benchmarks/parametrizations.py --arch ViT-B-32-quickgelu --experts 8 --storage resident

Random weights and random gradients: only time is measured, and no network runs but for the floor, the forward and backward
pass of one model on the same number of samples as ``step.py`` takes. ``to_layer_wise`` is the median of the rounds' ratios of
merge and contraction to those of ``LayerWise`` in the same round, with its quartiles; ``to_floor`` the same to the floor.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from step import Subject, write_models

from adamerge import ChunkWise, ElementWise, LayerWise, RowColumnWise, TaskVectors
from adamerge.merging.copies import Place
from adamerge.merging.malloc import keep_freed_memory
from adamerge.merging.merged_tensor import Merge
from adamerge.merging.pullback import MergeGradients
from adamerge.parametrizations import Parametrization
from adamerge.precision import exact
from adamerge.transforms import RootSumSquare

CPU = torch.device("cpu")
KINDS: dict[str, Any] = {
    "LayerWise": LayerWise,
    "ChunkWise(384)": partial(ChunkWise, chunks=384),
    "RowColumnWise": RowColumnWise,
    "ElementWise of one": ElementWise,
}


class Turn:
    """What is timed of one parametrization."""

    def __init__(self, vectors: TaskVectors, parametrization: Parametrization, places: dict[str, Place]) -> None:
        self.vectors, self.parametrization, self.places = vectors, parametrization, places
        self.gradients = {name: torch.randn_like(place.tensor) for name, place in places.items()}

    def seconds(self) -> float:
        """Seconds of a merge and of a contraction."""
        gradients = MergeGradients(list(self.parametrization.parameters()))
        start = time.perf_counter()
        with exact(CPU):
            Merge(self.vectors, self.parametrization, None, gradients).fill(self.places)
        merged = time.perf_counter() - start
        for name, place in self.places.items():
            place.tensor.grad = self.gradients[name]
        start = time.perf_counter()
        gradients.gradients(self.places)
        return merged + time.perf_counter() - start


def measure(own: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All turns, round after round."""
    write_models(own.arch, own.experts, folder)
    subject = Subject(own, folder)
    subject.model.merge()  # places the deltas
    vectors = subject.model.task_vectors
    single = subject.model.storage.place(
        TaskVectors(vectors.base, vectors.checkpoints, [RootSumSquare()], include=["visual.*"]), CPU
    )
    places = {
        name: Place(torch.nn.Parameter(torch.empty(vectors.shape(name))))
        for name in subject.backbone.tensors()
        if name in vectors
    }
    turns = {}
    for name, kind in KINDS.items():
        given = single if name.endswith("of one") else vectors
        turns[name] = Turn(given, kind(given), places)
    times: dict[str, list[float]] = {name: [] for name in ("floor", *turns)}
    for _ in range(own.rounds + 1):
        start = time.perf_counter()
        subject.floor()
        times["floor"].append(time.perf_counter() - start)
        for name, turn in turns.items():
            times[name].append(turn.seconds())
    rows = {name: own_times[1:] for name, own_times in times.items()}  # the first round warms up
    found: dict[str, Any] = {
        "elements": subject.elements,
        "seconds": {n: statistics.median(t) for n, t in rows.items()},
    }
    for key, beside in (("to_layer_wise", "LayerWise"), ("to_floor", "floor")):
        ratios = {name: [a / b for a, b in zip(rows[name], rows[beside], strict=True)] for name in turns}
        found[key] = {name: statistics.median(ratio) for name, ratio in ratios.items()}
        found[f"{key}_quartiles"] = {name: statistics.quantiles(ratio, n=4)[::2] for name, ratio in ratios.items()}
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="ViT-B-32-quickgelu")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--batch", type=int, default=4, help="samples per task, of the floor")
    parser.add_argument("--storage", choices=["resident", "disk"], default="resident")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, help="a JSON file of what is found")
    own = parser.parse_args()
    own.precision, own.checkpointed, own.compiled = "32-true", False, False
    keep_freed_memory()  # as every fit does
    with tempfile.TemporaryDirectory(prefix="adamerge-parametrizations-") as folder:
        found = measure(own, Path(folder))
    given = {name: getattr(own, name) for name in ("arch", "experts", "batch", "storage", "dtype", "rounds")}
    line = given | {"threads": torch.get_num_threads(), "load": os.getloadavg()[0]} | found
    table = Table(
        "parametrization", "seconds", "to layer-wise", "to the floor", title=f"{own.arch}, {own.experts} experts"
    )
    for name in KINDS:
        table.add_row(name, *(f"{found[key][name]:.3f}" for key in ("seconds", "to_layer_wise", "to_floor")))
    Console().print(table)
    print(json.dumps(line))
    if own.out is not None:
        own.out.write_text(json.dumps(line, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
