"""The same optimisation step by fusion_bench's layer-wise wrapper, from its published package: seconds, memory, gradients.

    python tests/benchmarks/peers.py --experts 2 4 8 20 --rounds 2

ViT-B/32 with random weights, entropy, SGD, the same batches and threads; each side in a process of its own, the peer in an
environment that is made once under ``--cache``. Processes alternate. Seconds are medians over the steps after the first.
``gradient_difference`` is the largest in the first step, of the largest gradient; ``coefficient_difference`` after all steps,
of the largest coefficient. A side that fails, or passes ``--limit`` GiB of anonymous memory, is recorded with what it said.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from peer_step import INIT, Head, entropy, network
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from watching import CommandFailed, environment_of, spread, watch

PEER = "fusion_bench==0.2.33"
SIDES = ("adamerge", "adamerge-disk", "fusion_bench")


def write_inputs(folder: Path, experts: int, batch: int, steps: int) -> None:
    """Base, heads, images, and experts: noise, and a step down the gradient of the task's own loss, as training leaves it.

    Of noise alone, the gradient of a coefficient would be a sum of terms that cancel, and the rounding of either side would
    be a part in 1e5 of it.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    torch.manual_seed(0)
    tower = network()
    base = dict(tower.named_parameters())
    save_file({name: value.detach().clone() for name, value in base.items()}, folder / "base.safetensors")
    tensors = {}
    for number in range(experts):
        task = f"task{number:02}"
        tensors[f"head/{task}"] = torch.nn.functional.normalize(normal(10 + 5 * number, 512), dim=-1)
        for step in range(steps):
            tensors[f"images/{task}/{step}"] = normal(batch, 3, 224, 224)
        logits = Head(tensors[f"head/{task}"])(tower(pixel_values=tensors[f"images/{task}/0"]).image_embeds)
        gradients = torch.autograd.grad(entropy(logits), list(base.values()))
        length = 1.0 / torch.stack([gradient.norm() for gradient in gradients]).norm()
        moved = {
            name: value.detach() + 1e-4 * normal(*value.shape) - length * gradient
            for (name, value), gradient in zip(base.items(), gradients, strict=True)
        }
        save_file(moved, folder / f"{task}.safetensors")
    save_file(tensors, folder / "inputs.safetensors")


def measure(experts: int, batch: int, steps: int, rounds: int, cache: Path, limit: float) -> list[dict[str, Any]]:
    """A row for each side."""
    pythons = dict.fromkeys(SIDES, sys.executable)
    pythons["fusion_bench"] = str(environment_of(PEER, cache) / "python")
    script = str(Path(__file__).parent / "peer_step.py")
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    rows: dict[str, dict[str, Any]] = {side: {"experts": experts, "side": side} for side in SIDES}
    with tempfile.TemporaryDirectory(prefix="adamerge-peers-") as name:
        folder = Path(name)
        write_inputs(folder, experts, batch, steps)
        for _ in range(rounds):
            for side, row in rows.items():
                if "failure" in row:
                    continue
                command = [pythons[side], script, str(folder), side, str(folder / f"{side}.out")]
                try:
                    run = watch(command, limit=1024 * limit)
                except CommandFailed as error:
                    row["failure"] = str(error)[-300:]
                    continue
                seconds[side] += json.loads(run.output.splitlines()[-1])["seconds"][1:]
                row["anonymous_mib"] = max(row.get("anonymous_mib", 0.0), run.anonymous)
        for side, row in rows.items():
            if "failure" not in row:
                row |= {f"seconds_{name}": value for name, value in spread(seconds[side]).items()}
        theirs = rows["fusion_bench"]
        for side in SIDES[:2]:
            if "failure" not in rows[side] and "failure" not in theirs:
                rows[side]["of_peer_seconds"] = rows[side]["seconds_median"] / theirs["seconds_median"]
                rows[side]["of_peer_memory"] = rows[side]["anonymous_mib"] / theirs["anonymous_mib"]
                rows[side] |= differences(folder / f"{side}.out", folder / "fusion_bench.out")
    return list(rows.values())


def differences(ours: Path, theirs: Path) -> dict[str, float]:
    """How far apart the two sides are."""
    one, other = load_file(ours), load_file(theirs)
    if one.keys() != other.keys():
        raise CommandFailed(f"the two sides name other tensors: {sorted(one.keys() ^ other.keys())[:4]}")

    def both(kind: str) -> tuple[torch.Tensor, torch.Tensor]:
        names = [name for name in one if name.startswith(f"{kind}/")]
        return torch.stack([one[name] for name in names]).double(), torch.stack([other[n] for n in names]).double()

    (gradient, theirs_gradient), (last, theirs_last) = both("gradient"), both("coefficients")
    return {
        "gradient_difference": float((gradient - theirs_gradient).abs().max() / theirs_gradient.abs().max()),
        "coefficient_difference": float((last - theirs_last).abs().max() / theirs_last.abs().max()),
        "largest_movement": float((theirs_last - INIT).abs().max()),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, nargs="+", default=[2, 4, 8, 20])
    parser.add_argument("--batch", type=int, default=4, help="samples per task")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch, on both sides")
    parser.add_argument("--limit", type=float, default=12.0, help="GiB of anonymous memory")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "adamerge-benchmarks")
    parser.add_argument("--json", action="store_true", help="print the line of JSON alone")
    own = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(own.threads)
    rows = [
        row
        for experts in own.experts
        for row in measure(experts, own.batch, own.steps, own.rounds, own.cache, own.limit)
    ]
    if not own.json:
        columns = ("experts", "side", "seconds_median", "anonymous_mib", "of_peer_seconds", "of_peer_memory")
        columns += ("gradient_difference", "coefficient_difference", "failure")
        table = Table(*columns, title=f"one step of ViT-B/32, {own.batch} images a task, {own.threads} threads")
        for row in rows:
            cells = (row.get(column, "") for column in columns)
            table.add_row(*(f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in cells))
        Console(width=160).print(table)
    given = {"batch": own.batch, "steps": own.steps, "rounds": own.rounds, "threads": own.threads}
    print(json.dumps(given | {"load": os.getloadavg()[1], "rows": rows}))


if __name__ == "__main__":
    main()
