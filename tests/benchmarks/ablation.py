"""What each part of a method gives, and how far its settings matter: one part changed at a time, all else as in its file.

    python tests/benchmarks/ablation.py POOL METHOD CHANGES.yaml --folder FOLDER --out FILE.json [--seeds 0,1,2] \
      [--split validation] [--only AXIS ...] [--lambdas 0.4]

The changes are by axis and name the overrides of a fit: ``rate: {halved: {model.search.lr: 0.05}}``. Fits and scores are
those of ``adamerge compare`` in the folder: what is finished is not repeated, so that the command may be given again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import yaml

from adamerge.io.atomic import write_json
from adamerge.io.untrusted_files import read_json
from adamerge.runs.compare import compare
from adamerge.runs.comparison_rows import Choices

KEPT = ("average", "spread", "per_task", "gap_closed", "worst_task", "costs", "protocol")


def words_of(change: dict[str, Any]) -> list[str]:
    """The overrides of one change."""
    return [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in change.items()]


def main() -> None:
    """Measures what the file does not hold yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("pool", "method", "changes"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--split", default="test", choices=("test", "validation"))
    parser.add_argument("--only", nargs="*", default=None, help="axes; all of the file when not given")
    parser.add_argument("--lambdas", type=float, nargs="+", default=None, help="that the oracle chooses from")
    own = parser.parse_args()
    axes: dict[str, dict[str, dict[str, Any]]] = yaml.safe_load(own.changes.read_text(encoding="utf-8"))
    choices = Choices(seeds=tuple(map(int, own.seeds.split(","))), split=own.split)
    found: dict[str, Any] = read_json(own.out) if own.out.is_file() else {"axes": {}}
    found |= {"pool": str(own.pool), "method": str(own.method), "seeds": own.seeds, "split": own.split}
    for axis, changes in {"none": {"as the file is": {}}, **axes}.items():
        if own.only is not None and axis not in (*own.only, "none"):
            continue
        for name, change in changes.items():
            rows = found["axes"].setdefault(axis, {})
            if name in rows and rows[name]["change"] == change:
                continue
            method = Path(str(change.get("method", own.method)))
            words = words_of({key: value for key, value in change.items() if key != "method"})
            words = ["--trainer.limit_val_batches=0", *words]
            result = compare(own.pool, [method], own.folder, words, own.lambdas, choices=choices)
            row = result["methods"].get(method.stem)  # none where all seeds collapsed or diverged
            kept = {key: row[key] for key in KEPT} if row is not None else {"left_out": result["left_out"]}
            rows[name] = {"change": change, **kept}
            found["references"] = {
                who: result["methods"][who]["average"] for who in ("pretrained", "task_arithmetic_tuned", "individual")
            }
            write_json(own.out, found)
            print(f"{axis:12s} {name:40s}", "left out" if row is None else f"{row['gap_closed']:7.1%}", flush=True)


if __name__ == "__main__":
    main()
