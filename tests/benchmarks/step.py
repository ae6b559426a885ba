"""One optimisation step beside the plain forward and backward pass of one model on the same batches: seconds and memory.

    python tests/benchmarks/step.py --arch ViT-B-32-quickgelu --experts 8 --batch 4 --storage resident --dtype bfloat16

Random weights: only time and memory are measured. Seconds are of one process, in which both sides alternate, so that a noisy
machine hits both alike; ``ratio`` is the median of the pairs of step and floor, with its quartiles. Memory is the peak of
anonymous memory of a process of its own for each side, whose C library gives freed memory back at once; ``extra_models`` is
the step's above the floor's, in units of the merged tensors in fp32, and ``extra_models_kept`` the same where freed memory is
kept, as in a fit and while seconds are taken. ``operations`` are elements of all operations but views in merge and
contraction, in units of the merged elements. ``copy_seconds`` is the time it takes to copy the deltas' and
the base's bytes once, from memory to memory, just before a merge, and ``copy_after_seconds`` just after a contraction: each
is compared with the one beside it, since a machine's memory may be faster in some seconds than in others; ``read_seconds``
what it takes to sum as many, and ``reading_twice_to_floor`` the least that a merge and a contraction can take which each read
them from memory.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from watching import RETURNING, own_peak, run

from adamerge import LayerWise, OpenClipClassifier, Passes, TaskVectors
from adamerge.merging.malloc import keep_freed_memory
from adamerge.merging.merged_model import MergedModel
from adamerge.task_vectors.storage import Disk, Resident

SIDES = ("floor", "step")
PIECE = 1 << 29  # bytes


def write_models(arch: str, experts: int, folder: Path) -> None:
    """Random experts of the image tower, on disk."""
    torch.manual_seed(0)
    weights = {name: value.detach().clone() for name, value in OpenClipClassifier(arch).tensors().items()}
    save_file(weights, folder / "base.safetensors")
    for expert in range(experts):
        moved = {n: v + 1e-3 * torch.randn_like(v) for n, v in weights.items() if n.startswith("visual.")}
        save_file(moved, folder / f"{expert}.safetensors")


class Subject:
    """The merged model with its batch, and what is timed of it."""

    def __init__(self, own: argparse.Namespace, folder: Path) -> None:
        sources = {str(expert): folder / f"{expert}.safetensors" for expert in range(own.experts)}
        self.vectors = TaskVectors(folder / "base.safetensors", sources, include=["visual.*"])
        self.backbone = OpenClipClassifier(own.arch)
        storage = Disk() if own.storage == "disk" else Resident(own.dtype)
        parametrization = partial(LayerWise, init=0.3)(self.vectors)
        passes = Passes(checkpointed=own.checkpointed, compiled=own.compiled)
        self.model = MergedModel(self.backbone, self.vectors, parametrization, storage, passes=passes)
        # the floor's passes are those of the network as it is
        self.plain = OpenClipClassifier(own.arch) if passes != Passes() else self.backbone
        size = self.backbone.preprocess_config["size"]
        side = size if isinstance(size, int) else size[0]
        self.inputs = torch.randint(0, 256, (own.experts * own.batch, 3, side, side), dtype=torch.uint8)
        self.mixed = own.precision == "bf16-mixed"

    @property
    def elements(self) -> int:
        """Of the merged tensors."""
        return sum(self.vectors.shape(name).numel() for name in self.vectors)

    def passes(self, backbone: OpenClipClassifier) -> Tensor:
        """Forward and backward pass of one model."""
        with torch.autocast("cpu", torch.bfloat16, self.mixed):
            loss = backbone.encode(self.inputs).features.float().square().mean()
        loss.backward()
        return loss.detach()

    def floor(self) -> None:
        """The same without a merge; and its gradients go, as a step's do."""
        self.passes(self.plain)
        for name in self.vectors:
            self.plain.tensors()[name].grad = None

    def step(self) -> tuple[float, float]:
        """Merge, passes, contraction; seconds of the first and the last."""
        start = time.perf_counter()
        self.model.merge()
        merged = time.perf_counter()
        loss = self.passes(self.backbone)
        ran = time.perf_counter()
        self.model.pull_back(loss).backward()
        return merged - start, time.perf_counter() - ran


class Moving:
    """Copies or reads so many bytes of memory, through a piece that no cache holds."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.source = torch.zeros(min(nbytes, PIECE), dtype=torch.uint8)
        self.target = torch.zeros_like(self.source)

    def copying(self) -> float:
        """Seconds of one copy, from memory to memory."""
        return self._seconds(lambda piece: self.target[piece].copy_(self.source[piece]))

    def reading(self) -> float:
        """Seconds of one sum."""
        return self._seconds(lambda piece: self.source[piece].view(torch.float32).sum())

    def _seconds(self, run: Callable[[slice], object]) -> float:
        start = time.perf_counter()
        for first in range(0, self.nbytes, PIECE):
            run(slice(0, min(PIECE, self.nbytes - first)))
        return time.perf_counter() - start


def seconds_of(own: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Alternations of floor and step."""
    subject = Subject(own, folder)
    bytes_each = 2 if own.dtype != "float32" and own.storage == "resident" else 4
    moving = Moving((own.experts * bytes_each + 4) * subject.elements)
    times: dict[str, list[float]] = {}
    for _ in range(own.rounds + 1):
        start = time.perf_counter()
        subject.floor()
        floored = time.perf_counter() - start
        read, copy, start = moving.reading(), moving.copying(), time.perf_counter()
        merge, contract = subject.step()
        stepped = time.perf_counter() - start
        row = {"floor": floored, "merge": merge, "contract": contract, "step": stepped, "read": read, "copy": copy}
        for name, value in (row | {"copy_after": moving.copying()}).items():
            times.setdefault(name, []).append(value)
    del moving
    rounds = [dict(zip(times, row, strict=True)) for row in zip(*times.values(), strict=True)][1:]  # the first warms up
    found: dict[str, Any] = {f"{name}_seconds": statistics.median(row[name] for row in rounds) for name in times}
    found |= _spread("ratio", [row["step"] / row["floor"] for row in rounds])
    found |= _spread("merge_and_contract_to_floor", [(row["merge"] + row["contract"]) / row["floor"] for row in rounds])
    copied = [row["merge"] / row["copy"] + row["contract"] / row["copy_after"] for row in rounds]
    found |= _spread("merge_and_contract_to_copy", copied)
    found |= _spread("reading_twice_to_floor", [2 * row["read"] / row["floor"] for row in rounds])
    with Operations() as counted:
        subject.model.merge()
    loss = subject.passes(subject.backbone)
    with counted:
        subject.model.pull_back(loss).backward()
    return found | {"operations": counted.elements / subject.elements, "elements": subject.elements}


def peak_of(own: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Peak of anonymous memory in one side's steps, MiB."""
    subject = Subject(own, folder)
    with own_peak() as peak:
        for _ in range(3):
            subject.floor() if own.side == "floor" else subject.step()
    return {"mib": peak[0] / 1024}


class Operations(TorchDispatchMode):
    """Elements of every operation that is no view: the larger of its input and its output."""

    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        # `set_` points a tensor to a storage: how a memory-mapped file is opened, and no element is touched
        if not function.is_view and function is not torch.ops.aten.set_.source_Storage:
            sizes = [x.numel() for x in tree_leaves((args, kwargs, found)) if isinstance(x, Tensor)]
            self.elements += max(sizes, default=0)
        return found


def measure(own: argparse.Namespace) -> dict[str, Any]:
    """Seconds in one process, memory in one for each side."""
    words = [f"--{name}={getattr(own, name)}" for name in ("arch", "experts", "batch", "storage", "dtype", "precision")]
    words += [f"--{name}" for name in ("checkpointed", "compiled") if getattr(own, name)]
    with tempfile.TemporaryDirectory(prefix="adamerge-step-") as name:
        write_models(own.arch, own.experts, Path(name))

        def child(side: str, environment: Mapping[str, str] | None = None) -> dict[str, Any]:
            line = [sys.executable, __file__, *words, f"--rounds={own.rounds}", f"--side={side}", f"--folder={name}"]
            found: dict[str, Any] = json.loads(run(line, environment).splitlines()[-1])
            return found

        found = child("seconds")
        for suffix, environment in (("", RETURNING), ("_kept", None)):
            floor, step = (child(side, environment)["mib"] for side in SIDES)
            extra = (step - floor) * (1 << 20) / (4 * found["elements"])
            found |= {f"floor_mib{suffix}": floor, f"step_mib{suffix}": step, f"extra_models{suffix}": extra}
    return found


def _spread(name: str, values: list[float]) -> dict[str, Any]:
    quartiles = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return {name: statistics.median(values), f"{name}_quartiles": [quartiles[0], quartiles[2]]}


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
    parser.add_argument("--precision", choices=["32-true", "bf16-mixed"], default="32-true")
    parser.add_argument("--checkpointed", action="store_true", help="the step's blocks run again in its backward pass")
    parser.add_argument("--compiled", action="store_true", help="the step's blocks are compiled, in the first round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print the line of JSON alone")
    parser.add_argument("--side", choices=["seconds", *SIDES], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    own = parser.parse_args()
    if own.side:
        keep_freed_memory()  # as every fit does
        print(json.dumps((seconds_of if own.side == "seconds" else peak_of)(own, own.folder)))
        return
    given = {name: value for name, value in vars(own).items() if name not in {"json", "side", "folder"}}
    line = given | {"threads": torch.get_num_threads(), "load": os.getloadavg()[0]} | measure(own)
    if not own.json:
        table = Table("figure", "value", title=f"{own.arch}, {own.experts} experts, batch {own.batch} per task")
        for name, value in line.items():
            table.add_row(name, f"{value:.4f}" if isinstance(value, float) else str(value))
        Console().print(table)
    print(json.dumps(line))


if __name__ == "__main__":
    main()
