"""The most memory that a process of a sharded step takes, beside one process that takes the same step alone.

    python tests/benchmarks/sharded.py --size 0.1B --processes 2

A Llama-shaped model with random weights, experts on disk, entropy of the next token, the same global batch: merge, passes of
the process's own part of the batch, contraction, and the mean of the coefficients' gradients. Each process is a program
of its own. ``ratio`` is the largest rank's peak of anonymous memory by the single process's; ``ratio_above`` the same of what
is above the process's memory before the model is built, which is what it has imported. ``gradient_difference`` is the
largest over the ranks, in units of the largest gradient. A sharded copy holds its rows in fp32 whatever ``--dtype``, as the
gradients are; the whole copy is in ``--dtype``. On both sides the C library gives freed memory back at once; with
``--as-fit`` as it does in a fit: a rank gives it back once it is sharded, the single process keeps it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from export import SIZES, VOCABULARY
from language_model import write_pool
from rich.console import Console
from rich.table import Table
from torch import distributed
from transformers import LlamaForCausalLM  # noqa: F401  (imported before memory is looked at, not with the model)
from watching import RETURNING, memory, own_environment, own_peak, run

from adamerge import CausalLM, LayerWise, ShardedCopy, TaskVectors, WholeCopy
from adamerge.merging.malloc import keep_freed_memory
from adamerge.merging.merged_model import MergedModel
from adamerge.task_vectors.storage import Disk

PATIENCE = timedelta(minutes=10)  # of a rank with the others


def batch_of(own: argparse.Namespace) -> dict[str, torch.Tensor]:
    """This rank's part of the global batch."""
    shape, generator = (own.experts * own.batch, own.positions), torch.Generator().manual_seed(0)
    ids = torch.randint(0, VOCABULARY, shape, generator=generator)[own.rank :: own.world]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "predicted": torch.ones_like(ids)}


def step(folder: Path, own: argparse.Namespace) -> dict[str, Any]:
    """The step of this process, in MiB and seconds."""
    keep_freed_memory()  # as a fit does, unless the environment says otherwise
    before = memory()["RssAnon"]
    with own_peak() as built:
        if own.world > 1:
            meeting = f"file://{folder / 'meeting'}"
            distributed.init_process_group("gloo", meeting, PATIENCE, rank=own.rank, world_size=own.world)
        backbone = CausalLM(str(folder / "base"), own.dtype, max_length=own.positions)
        experts = {f"expert{number}": folder / f"expert{number}" for number in range(own.experts)}
        vectors = TaskVectors(folder / "base", experts)
        copy = ShardedCopy() if own.world > 1 else WholeCopy()
        merged = MergedModel(backbone, vectors, LayerWise(vectors, init=0.3), Disk(), copy=copy)
    start = time.perf_counter()
    with own_peak() as stepped:
        merged.merge()
        q = backbone.output(merged(batch_of(own)), "expert0").logits.float().log_softmax(dim=-1)
        loss = -(q.exp() * q).sum(dim=-1).mean()
        del q
        loss.backward()
        merged.pull_back(loss.detach()).backward()
        gradient = merged.trained()[0].grad
        assert gradient is not None
        if own.world > 1:
            # the mean: a contraction is of the sum over the processes, of which each has a part of the rows
            distributed.all_reduce(gradient)
            gradient /= own.world
    seconds = time.perf_counter() - start
    torch.save(gradient, folder / f"{own.rank}_of_{own.world}.pt")
    if own.world > 1:
        distributed.destroy_process_group()
    peak = max(built[0], stepped[0])
    found = {"before": before, "built": built[0], "stepped": stepped[0], "peak": peak, "above": peak - before}
    return {f"{name}_mib": value / 1024 for name, value in found.items()} | {"seconds": seconds}


def measure(own: argparse.Namespace) -> dict[str, Any]:
    """Write the models; one process, then all ranks at once."""
    with tempfile.TemporaryDirectory(prefix="adamerge-sharded-", dir=own.where) as name:
        folder = Path(name)
        write_pool(folder, own.size, own.experts)
        words = [f"--{word}={getattr(own, word)}" for word in ("size", "experts", "batch", "positions", "dtype")]
        environment = own_environment({"OMP_NUM_THREADS": str(own.threads)} | ({} if own.as_fit else RETURNING))

        def child(rank: int, world: int) -> dict[str, Any]:
            line = [sys.executable, __file__, *words, f"--rank={rank}", f"--world={world}", f"--folder={folder}"]
            found: dict[str, Any] = json.loads(run(line, environment).splitlines()[-1])
            return found

        single = child(0, 1)
        with ThreadPoolExecutor(own.processes) as pool:
            ranks = list(pool.map(partial(child, world=own.processes), range(own.processes)))
        load = partial(torch.load, weights_only=True)
        right, *both = map(load, [folder / "0_of_1.pt", *sorted(folder.glob(f"*_of_{own.processes}.pt"))])
    return {
        "ratio": max(rank["peak_mib"] for rank in ranks) / single["peak_mib"],
        "ratio_above": max(rank["above_mib"] for rank in ranks) / single["above_mib"],
        "gradient_difference": max(float((one - right).abs().max() / right.abs().max()) for one in both),
        "single": single,
        "ranks": ranks,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="0.1B")
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--batch", type=int, default=1, help="samples per task, of all processes together")
    parser.add_argument("--positions", type=int, default=64)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the merged copy")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="of torch in each process")
    parser.add_argument("--as-fit", action="store_true", help="freed memory as in a fit: one process keeps it")
    parser.add_argument("--where", type=Path, help="folder for the models; they take 2 bytes a weight each")
    parser.add_argument("--json", action="store_true", help="print the line of JSON alone")
    for name, kind in (("rank", int), ("world", int), ("folder", Path)):
        parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
    own = parser.parse_args()
    if own.folder:
        print(json.dumps(step(own.folder, own)))
        return
    if own.processes < 2 or own.experts * own.batch % own.processes:
        parser.error(f"{own.experts} x {own.batch} samples cannot be shared equally by {own.processes} > 1 processes")
    found = measure(own)
    if not own.json:
        title = f"{own.size}, {own.experts} experts, copy in {own.dtype}"
        table = Table("figure", "one process", *(f"rank {rank}" for rank in range(own.processes)), title=title)
        for figure, value in found["single"].items():
            table.add_row(figure, *(f"{x:.4g}" for x in (value, *(rank[figure] for rank in found["ranks"]))))
        Console().print(table)
        Console().print(*(f"{name} {found[name]:.3g}" for name in ("ratio", "ratio_above", "gradient_difference")))
    names = ("size", "experts", "batch", "positions", "dtype", "processes", "threads", "as_fit")
    given = {name: getattr(own, name) for name in names} | {"load": os.getloadavg()[0]}
    print(json.dumps(given | found))


if __name__ == "__main__":
    main()
