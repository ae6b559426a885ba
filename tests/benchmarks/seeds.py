"""Several methods on one pool, each with several seeds, scored on the test split beside tuned task arithmetic.

    python tests/benchmarks/seeds.py POOL --seeds 0 1 2 --out FILE.json METHOD [--key=value ...] -- METHOD [--key=value ...]

Every fit is a run of its own under ``runs/seeds``; finished ones are found again and killed ones go on, so that the command
may be repeated until it ends. The seed decides the order of the calibration batches, and whatever else a method draws.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from adamerge.io.atomic import write_json
from adamerge.io.untrusted_files import read_json
from adamerge.parametrizations import TaskWise
from adamerge.runs.compare import LAMBDAS, fitted
from adamerge.runs.instantiate import Configured
from adamerge.runs.scoring import run_coefficients
from adamerge.task_vectors.task_vectors import TaskVectors
from adamerge.training.evaluation import average, means
from adamerge.training.scorer import Scorer


def measure(pool: Path, methods: list[tuple[Path, list[str]]], seeds: list[int], folder: Path) -> dict[str, Any]:
    """Fit and score."""
    runs: dict[str, list[Path]] = {}
    for method, overrides in methods:
        for seed in seeds:
            words = [*overrides, f"--data.seed={seed}", f"--seed_everything={seed}"]
            runs.setdefault(method.stem, []).append(fitted(pool, method, folder, words))
    cli = Configured.of(["--config", str(runs[methods[0][0].stem][0] / "config.yaml")])
    given_vectors = cli.model.merged.task_vectors
    vectors = TaskVectors(
        given_vectors.base, given_vectors.checkpoints, [], given_vectors.include, given_vectors.exclude
    )
    metric, scorer = cli.datamodule.metric, Scorer(cli.model.merged.backbone, cli.datamodule, vectors, "test")
    arithmetic = {value: average(means(scorer.merged(vectors, partial(TaskWise, init=value)))) for value in LAMBDAS}
    best = metric.best(arithmetic)
    found: dict[str, Any] = {
        "pretrained": average(means(scorer.base())),
        "individual": average(means(scorer.experts())),
        "task_arithmetic_0.3": arithmetic[0.3],
        f"task_arithmetic_tuned ({best})": arithmetic[best],
    }
    table: dict[str, Any] = {
        "pool": str(pool),
        "metric": metric.name,
        "seeds": seeds,
        "references": found,
        "methods": {},
    }
    for (method, overrides), paths in zip(methods, runs.values(), strict=True):
        scores = []
        for run in paths:
            scores.append(means(scorer.of(run_coefficients(run))))
        summaries = [read_json(run / "summary.json") for run in paths]
        table["methods"][method.stem] = {
            "overrides": overrides,
            "per_task": scores,
            "average": [average(score) for score in scores],
            "runs": [str(run) for run in paths],
            "labelled": [bool(summary["protocol"].get("labelled")) for summary in summaries],
        }
    return table


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pool", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--folder", type=Path, default=Path("runs/seeds"))
    words = sys.argv[1:]
    split = next(i for i, word in enumerate(words) if word.startswith("configs/methods/"))
    own = parser.parse_args(words[:split])
    methods: list[tuple[Path, list[str]]] = []
    for word in words[split:]:
        if word.startswith("configs/methods/"):
            methods.append((Path(word), []))
        elif word != "--":
            methods[-1][1].append(word)
    found = measure(own.pool, methods, own.seeds, own.folder)
    write_json(own.out, found)
    rows = Table("method", "average over tasks, each seed", "mean", title=f"{found['metric']} on the test split")
    for name, value in found["references"].items():
        rows.add_row(name, "", f"{value:.4f}")
    for name, row in found["methods"].items():
        rows.add_row(name, ", ".join(f"{v:.4f}" for v in row["average"]), f"{statistics.mean(row['average']):.4f}")
    Console(width=120).print(rows)
    print(json.dumps({name: row["average"] for name, row in found["methods"].items()} | found["references"]))


if __name__ == "__main__":
    main()
