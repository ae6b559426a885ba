"""Adaptation without labels to one target at a time, from the experts of the other tasks, each with several seeds.

    python tests/benchmarks/targets.py POOL METHOD --targets greek digits --seeds 0 1 2 --out FILE.json \
      --way NAME [--key=value ...] --way NAME [--key=value ...]

A way is the method with some changes. Every fit is a run of its own under ``runs/targets``; finished ones are found again,
killed ones go on, and what was scored stands in the file, so that the command may be repeated until it ends.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from adamerge.io.atomic import write_json
from adamerge.io.untrusted_files import read_json
from adamerge.runs.command_line import Words
from adamerge.runs.comparison_fits import fitted
from adamerge.runs.instantiate import Configured
from adamerge.runs.scoring import run_coefficients
from adamerge.training.evaluation import means
from adamerge.training.scorer import Scorer


def ways_of(words: list[str]) -> tuple[list[str], dict[str, list[str]]]:
    """What comes before the first ``--way``, and the changes of each way by its name."""
    own: list[str] = []
    ways: dict[str, list[str]] = {}
    current = own
    words = [*words]
    while words:
        word = words.pop(0)
        if word == "--way":
            current = ways.setdefault(words.pop(0), [])
        else:
            current.append(word)
    return own, ways


def measure(
    pool: Path, method: Path, targets: list[str], seeds: list[int], ways: dict[str, list[str]], out: Path, folder: Path
) -> dict[str, Any]:
    """Fit and score what the file does not hold yet."""
    found: dict[str, Any] = read_json(out) if out.is_file() else {"pool": str(pool), "method": str(method)}
    found |= {"seeds": seeds, "ways": ways}
    for target in targets:
        rows = found.setdefault("targets", {}).setdefault(target, {})
        for seed in seeds:
            for way, changes in ways.items():
                scores = rows.setdefault(way, {})
                if str(seed) in scores:
                    continue
                words = [f"--data.only=[{target}]", f"--leave_out=[{target}]", *changes, f"--seed={seed}"]
                run = fitted(method, Words([str(pool), str(method)], words), folder)
                cli = Configured.of(["--config", str(run / "config.yaml")])
                scorer = Scorer(cli.model.merged.backbone, cli.datamodule, cli.model.merged.task_vectors, "test")
                rows.setdefault("base", means(scorer.base())[target])
                scores[str(seed)] = means(scorer.of(run_coefficients(run)))[target]
                write_json(out, found)
                print(target, way, seed, scores[str(seed)], flush=True)
    return found


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pool", type=Path)
    parser.add_argument("method", type=Path)
    parser.add_argument("--targets", nargs="+", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--folder", type=Path, default=Path("runs/targets"))
    words, ways = ways_of(sys.argv[1:])
    own = parser.parse_args(words)
    found = measure(own.pool, own.method, own.targets, own.seeds, ways, own.out, own.folder)
    for target, rows in found["targets"].items():
        shown = {way: round(statistics.mean(row.values()), 4) for way, row in rows.items() if way != "base"}
        print(target, json.dumps({"base": rows["base"], **shown}))


if __name__ == "__main__":
    main()
