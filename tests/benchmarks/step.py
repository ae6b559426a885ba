"""Seconds of one optimisation step beside the plain forward and backward pass of one model on the same batches.

    python tests/benchmarks/step.py --arch ViT-B-32-quickgelu --experts 8 --batch 4 --storage resident --dtype bfloat16

Prints a table and one line of JSON. Random weights: only time and memory are measured. Runs alternate, so that a noisy
machine hits both sides alike; ``ratio`` is the median of the pairs, with its quartiles.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

from adamerge import LayerWise, OpenClipClassifier, TaskVectors
from adamerge.merged_model import MergedModel
from adamerge.storage import Disk, Resident


def models(backbone: OpenClipClassifier, experts: int, folder: Path) -> TaskVectors:
    """Random experts of the image tower, on disk."""
    weights = {name: value.detach().clone() for name, value in backbone.tensors().items()}
    save_file(weights, folder / "base.safetensors")
    for expert in range(experts):
        moved = {n: v + 1e-3 * torch.randn_like(v) for n, v in weights.items() if n.startswith("visual.")}
        save_file(moved, folder / f"{expert}.safetensors")
    sources = {str(expert): folder / f"{expert}.safetensors" for expert in range(experts)}
    return TaskVectors(folder / "base.safetensors", sources, include=["visual.*"])


def measure(arch: str, experts: int, batch: int, storage: str, dtype: str, rounds: int) -> dict[str, object]:
    """Time ``rounds`` alternations of floor and step."""
    with tempfile.TemporaryDirectory() as folder:
        backbone = OpenClipClassifier(arch)
        vectors = models(backbone, experts, Path(folder))
        model = MergedModel(
            backbone, vectors, partial(LayerWise, init=0.3)(vectors), Disk() if storage == "disk" else Resident(dtype)
        )
        size = backbone.preprocess_config["size"]
        side = size if isinstance(size, int) else size[0]
        inputs = torch.randint(0, 256, (experts * batch, 3, side, side), dtype=torch.uint8)

        def passes() -> torch.Tensor:
            loss = model(inputs).features.square().mean()
            loss.backward()
            return loss.detach()

        times: dict[str, list[float]] = {"floor": [], "merge": [], "contract": [], "step": []}
        model.merge()
        for _ in range(rounds + 1):
            for name in vectors:
                backbone.tensors()[name].grad = None
            start = time.perf_counter()
            passes()
            floor = time.perf_counter()
            model.merge()
            merged = time.perf_counter()
            loss = passes()
            ran = time.perf_counter()
            model.pull_back(loss).backward()
            end = time.perf_counter()
            for name, value in zip(times, (floor - start, merged - floor, end - ran, end - floor), strict=True):
                times[name].append(value)
        times = {name: values[1:] for name, values in times.items()}  # the first round warms up
        ratios = sorted(step / floor for step, floor in zip(times["step"], times["floor"], strict=True))
        found: dict[str, object] = {f"{name}_seconds": statistics.median(values) for name, values in times.items()}
        quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        return found | {"ratio": statistics.median(ratios), "ratio_quartiles": [quartiles[0], quartiles[2]]}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="ViT-B-32-quickgelu")
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--batch", type=int, default=4, help="samples per task")
    parser.add_argument("--storage", choices=["resident", "disk"], default="resident")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="of resident deltas"
    )
    parser.add_argument("--rounds", type=int, default=5)
    own = parser.parse_args()
    found = measure(own.arch, own.experts, own.batch, own.storage, own.dtype, own.rounds)
    table = Table(
        "figure", "value", title=f"{own.arch}, {own.experts} experts, {own.storage}, batch {own.batch} per task"
    )
    for name, value in found.items():
        table.add_row(name, f"{value:.4f}" if isinstance(value, float) else str(value))
    Console().print(table)
    print(json.dumps(vars(own) | found | {"threads": torch.get_num_threads()}))


if __name__ == "__main__":
    main()
