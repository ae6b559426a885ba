"""Seconds and CPU seconds until a command answers, beside ``python -c pass`` and ``import torch``.

    python tests/benchmarks/startup.py --rounds 5

Each in a process of its own; runs alternate, and ``to_torch`` and ``cpu_to_torch`` are the
medians of the rounds' ratios to ``import torch``.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import sys
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from watching import Watched, spread, watch

ROOT = Path(__file__).parents[2]
CONFIGURED = [str(ROOT / f"configs/{name}.yaml") for name in ("pools/testbed_images", "methods/adamerging_layer_wise")]
REFUSED = """
import sys
from adamerge.cli import main
assert main(["fit", *sys.argv[1:], "--model.search.lr=-1"]) == 2
"""


def measure(rounds: int) -> dict[str, dict[str, float]]:
    """All commands, alternating."""
    python = [sys.executable, "-c"]
    adamerge = [sys.executable, "-m", "adamerge"]
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model.safetensors"
        save_file({f"layers.{number}.weight": torch.zeros(4, 4) for number in range(100)}, model)
        commands = {
            "python -c pass": [*python, "pass"],
            "import torch": [*python, "import torch"],
            "import adamerge": [*python, "import adamerge"],
            "adamerge --help": [*adamerge, "--help"],
            "adamerge export --help": [*adamerge, "export", "--help"],
            "adamerge inspect --help": [*adamerge, "inspect", "--help"],
            "adamerge inspect MODEL": [*adamerge, "inspect", str(model)],
            "adamerge fit --help": [*adamerge, "fit", "--help"],
            "adamerge check POOL METHOD": [*adamerge, "check", *CONFIGURED],
            "adamerge fit, refused": [sys.executable, "-c", REFUSED, *CONFIGURED],
        }
        for command in commands.values():
            watch(command)  # from disk the first time, for all alike
        runs: dict[str, list[Watched]] = {name: [] for name in commands}
        spent: dict[str, list[float]] = {name: [] for name in commands}
        for _ in range(rounds):
            for name, command in commands.items():
                before = _spent()
                runs[name].append(watch(command))
                spent[name].append(_spent() - before)
    torches = [run.seconds for run in runs["import torch"]]
    return {
        name: spread([run.seconds for run in watched])
        | {
            "to_torch": statistics.median(run.seconds / own for run, own in zip(watched, torches, strict=True)),
            "cpu_seconds": statistics.median(spent[name]),
            "cpu_to_torch": statistics.median(
                one / own for one, own in zip(spent[name], spent["import torch"], strict=True)
            ),
            "anonymous_mib": max(run.anonymous for run in watched),
        }
        for name, watched in runs.items()
    }


def _spent() -> float:
    """CPU seconds of all processes that have ended; of other processes on the machine they depend less than its clock."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print the line of JSON alone")
    own = parser.parse_args()
    found = measure(own.rounds)
    if not own.json:
        table = Table(
            "command",
            "seconds",
            "least",
            "most",
            "of import torch",
            "CPU s",
            "of import torch",
            "anonymous MiB",
            title="start-up",
        )
        for name, row in found.items():
            table.add_row(name, *(f"{value:.2f}" for value in row.values()))
        Console().print(table)
    print(json.dumps({"rounds": own.rounds, "load": os.getloadavg()[1], "commands": found}))


if __name__ == "__main__":
    main()
