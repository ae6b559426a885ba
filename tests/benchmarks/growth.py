"""Seconds and memory of one step as the experts become more and the model larger: figures, a table and a picture.

    python tests/benchmarks/growth.py          # measures what is missing, draws, prints the tables
    python tests/benchmarks/growth.py --plot   # draws and prints from the figures alone

Each point is a run of ``step.py``, on disk first, then resident. All figures are written to ``--out`` after each point, the
picture beside them at the end. What is there is not measured again, so that an interrupted run goes on where it ended. A
resident point that would take more than is available is skipped, and says so; the next run tries it again, as it does what
failed. The model's size is that of the image tower. fusion_bench's line is of ``results/peers.json``: its peak above that of
the side on disk with the same batches, and on top what the latter takes above its floor here, both with the C library's own
allocator.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from step import PIECE
from watching import own_environment

from adamerge.io.atomic import staged_file, write_json
from adamerge.task_vectors.memory import Available

HERE = Path(__file__).parent
STORAGES = ("disk", "resident")
COLOURS = {"disk": "C0", "resident": "C1"}
MARGIN = 0.1  # of the available memory stays free
MEBI = 1 << 20
Row = dict[str, Any]
Record = dict[str, Any]


def points(own: argparse.Namespace) -> Iterator[Row]:
    """Both sweeps; where they meet, one point."""
    pairs = [(own.arch, experts) for experts in own.experts] + [(arch, own.at) for arch in own.archs]
    for arch, experts in dict.fromkeys(pairs):
        for storage in STORAGES:
            yield {"arch": arch, "experts": experts, "storage": storage}


def found(record: Record, point: Row) -> Row | None:
    """The row of a point."""
    return next((row for row in record["rows"] if point.items() <= row.items()), None)


def measure(record: Record, point: Row) -> Row:
    """The point's row: figures, or why there are none."""
    given = record["arguments"]
    if point["storage"] == "resident":
        short = shortage(found(record, point | {"storage": "disk"}))
        if short:
            return point | {"skipped": short}
    shared = {name: given[name] for name in ("batch", "dtype", "precision", "rounds")}
    words = [f"--{name}={value}" for name, value in (point | shared).items()]
    done = subprocess.run(
        [sys.executable, str(HERE / "step.py"), "--json", *words],
        env=own_environment({"OMP_NUM_THREADS": str(given["threads"])}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        return point | {"failure": f"ended with {done.returncode}: {done.stdout[-300:]}"}
    row: Row = json.loads(done.stdout.splitlines()[-1])
    return row


def shortage(on_disk: Row | None) -> str | None:
    """Why a point cannot be resident, of the same on disk; None when it can.

    ``step.py`` holds the deltas, and beside them what it copies, and where to.
    """
    there = Available.on(torch.device("cpu"), 1).host
    if on_disk is None or "elements" not in on_disk or there is None:
        return None
    each = 4 if on_disk["dtype"] == "float32" else 2
    deltas = on_disk["experts"] * each * on_disk["elements"]
    needed = on_disk["step_mib_kept"] * MEBI + deltas + 2 * PIECE
    if needed <= (1 - MARGIN) * there:
        return None
    return f"takes {needed / 2**30:.1f} GiB, and {there / 2**30:.1f} are available"


def run(own: argparse.Namespace, record: Record) -> None:
    """Measure what is missing."""
    for point in points(own):
        row = found(record, point)
        if row is not None and "ratio" in row:
            continue
        start = time.perf_counter()
        record["rows"] = [other for other in record["rows"] if other is not row] + [measure(record, point)]
        write_json(own.out, record)
        last = record["rows"][-1]
        said = last.get("skipped") or last.get("failure") or f"{time.perf_counter() - start:.0f} s"
        print(f"{point['arch']}, {point['experts']} experts, {point['storage']}: {said}", file=sys.stderr)


def against_experts(record: Record, storage: str) -> list[tuple[float, Row]]:
    """T and row."""
    rows = [row for row in record["rows"] if row["arch"] == record["arguments"]["arch"] and row["storage"] == storage]
    return sorted(((row["experts"], row) for row in rows), key=lambda pair: pair[0])


def against_size(record: Record, storage: str) -> list[tuple[float, Row]]:
    """Millions of parameters of the image tower, and row; where they are known."""
    sizes = {row["arch"]: row["elements"] / 1e6 for row in record["rows"] if "elements" in row}
    rows = [row for row in record["rows"] if row["experts"] == record["arguments"]["at"] and row["storage"] == storage]
    return sorted(((sizes[row["arch"]], row) for row in rows if row["arch"] in sizes), key=lambda pair: pair[0])


def peer_extra(record: Record, path: Path) -> dict[int, float]:
    """T to what fusion_bench takes above the floor, in models, where both files have the figures; of ViT-B/32 alone."""
    if not path.is_file() or not record["arguments"]["arch"].startswith("ViT-B-32"):
        return {}
    content = json.loads(path.read_text(encoding="utf-8"))
    peaks = {
        (row["side"], row["experts"]): row["anonymous_mib"]
        for run in (content if isinstance(content, list) else [content])
        for row in run["rows"]
        if "anonymous_mib" in row and "failure" not in row
    }
    extra = {}
    for _, row in against_experts(record, "disk"):
        peer, same = (peaks.get((side, row["experts"])) for side in ("fusion_bench", "adamerge-disk"))
        if peer is not None and same is not None and "extra_models_kept" in row:
            extra[row["experts"]] = (peer - same) * MEBI / (4 * row["elements"]) + row["extra_models_kept"]
    return extra


def draw(record: Record, path: Path, peer: dict[int, float]) -> None:
    """Four panels: seconds and memory, against experts and against size."""
    given = record["arguments"]
    figure = Figure(figsize=(11, 7), layout="constrained")
    panels = figure.subplots(2, 2)
    columns = (
        (against_experts, f"experts T, {given['arch']}"),
        (against_size, f"million parameters of the image tower, T = {given['at']}"),
    )
    for (series, label), (seconds, memory) in zip(columns, panels.T, strict=True):
        ratio = seconds.twinx()
        for storage in STORAGES:
            rows = [(at, row) for at, row in series(record, storage) if "ratio" in row]
            if not rows:
                continue
            at, colour = [place for place, _ in rows], COLOURS[storage]
            took = [row["merge_seconds"] + row["contract_seconds"] for _, row in rows]
            seconds.plot(at, took, "o-", color=colour, label=f"{storage}, seconds")
            middle = [row["ratio"] for _, row in rows]
            spread = [[abs(row["ratio_quartiles"][end] - row["ratio"]) for _, row in rows] for end in (0, 1)]
            ratio.errorbar(at, middle, spread, fmt="^--", color=colour, alpha=0.5, label=f"{storage}, step / floor")
            memory.plot(at, [row["extra_models"] for _, row in rows], "o-", color=colour, label=storage)
        if peer and series is against_experts:
            memory.plot(list(peer), list(peer.values()), "s-", color="C7", label="fusion_bench")
        _name(seconds, label, "merge and contraction, seconds")
        _name(memory, label, "memory above the floor, models in fp32")
        ratio.set_ylabel("step / floor, dashed")
        ratio.set_ylim(bottom=0)
        (handles, names), (more, others) = (axes.get_legend_handles_labels() for axes in (seconds, ratio))
        if handles:
            above = {
                "loc": "lower center",
                "bbox_to_anchor": (0.5, 1.0),
                "ncols": 4,
                "frameon": False,
                "columnspacing": 1.0,
            }
            seconds.legend(handles + more, names + others, fontsize=7, **above)
            memory.legend(fontsize=8)
    figure.suptitle(f"One step. {_setting(given)}", fontsize=11)
    with staged_file(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")


def _setting(given: Row) -> str:
    threads = f"{given['threads']} thread{'s' if given['threads'] > 1 else ''}"
    return f"Batch {given['batch']} per task, {given['dtype']} deltas, {given['precision']}, {threads}"


def _name(axes: Axes, across: str, up: str) -> None:
    axes.set_xlabel(across).set_parse_math(False)
    axes.set_ylabel(up)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)


def tables(record: Record, peer: dict[int, float]) -> str:
    """Both sweeps in Markdown."""
    given = record["arguments"]
    columns = ["storage", "merge, s", "contraction, s", "step, s", "step / floor", "merge and contraction / floor"]
    columns += ["/ copying the bytes", "peak, MiB", "extra models"]
    parts = []
    for series, first in ((against_experts, "T"), (against_size, "image tower")):
        others = ["fusion_bench's"] if peer and series is against_experts else []
        pairs = [pair for storage in STORAGES for pair in series(record, storage)]
        lines = [first, *columns, *others], ["---"] * (1 + len(columns) + len(others))
        body = []
        for at, row in sorted(pairs, key=lambda pair: pair[0]):
            name = str(at) if series is against_experts else f"{row['arch']}, {at:.1f} M"
            cells = [name, row["storage"], *_cells(row, len(columns) - 1)]
            if others:
                told = peer.get(row["experts"]) if row["storage"] == "disk" else None
                cells.append("" if told is None else f"{told:.1f}")
            body.append(cells)
        parts.append("\n".join(f"| {' | '.join(cells)} |" for cells in (*lines, *body)))
    loads = [row["load"] for row in record["rows"] if "load" in row]
    said = f"`{given['arch']}` against T; then at T = {given['at']} against the image tower. {_setting(given)}, "
    said += f"medians of {given['rounds']} rounds"
    said += f", load {min(loads):.1f} to {max(loads):.1f}" if loads else ""
    return "\n\n".join([f"{said}.", *parts])


def _cells(row: Row, count: int) -> list[str]:
    if "ratio" not in row:
        text = row.get("skipped") or "failed: " + " ".join(row["failure"].split())[-80:]
        return [text.replace("|", "/"), *[""] * (count - 1)]
    low, high = row["ratio_quartiles"]
    return [
        f"{row['merge_seconds']:.3f}",
        f"{row['contract_seconds']:.3f}",
        f"{row['step_seconds']:.2f}",
        f"{row['ratio']:.2f} ({low:.2f} to {high:.2f})",
        f"{row['merge_and_contract_to_floor']:.3f}",
        f"{row['merge_and_contract_to_copy']:.1f}",
        f"{row['step_mib']:.0f}",
        f"{row['extra_models']:.2f}",
    ]


def main() -> None:
    """Measure, draw and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="ViT-B-32-quickgelu", help="of the sweep over experts")
    parser.add_argument("--experts", type=int, nargs="*", default=[2, 4, 8, 12, 16, 20])
    parser.add_argument(
        "--archs",
        nargs="*",
        default=["ViT-S-32-alt", "ViT-M-32-alt", "ViT-B-32-quickgelu", "ViT-B-32-plus-256", "ViT-L-14"],
        help="of the sweep over sizes",
    )
    parser.add_argument("--at", type=int, default=4, help="experts in the sweep over sizes")
    parser.add_argument("--batch", type=int, default=1, help="samples per task")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="of resident deltas"
    )
    parser.add_argument("--precision", choices=["32-true", "bf16-mixed"], default="32-true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "growth.json")
    parser.add_argument("--plot", action="store_true", help="measure nothing")
    parser.add_argument("--json", action="store_true", help="print the line of JSON alone")
    own = parser.parse_args()
    given = {name: getattr(own, name) for name in ("arch", "at", "batch", "dtype", "precision", "rounds", "threads")}
    record: Record = {"arguments": given, "rows": []}
    if own.out.is_file():
        record = json.loads(own.out.read_text(encoding="utf-8"))
    elif own.plot:
        parser.error(f"{own.out} is not there: run without --plot")
    if not own.plot:
        if record["arguments"] != given:
            parser.error(f"{own.out} was made with {record['arguments']}, not with {given}: name another file by --out")
        run(own, record)
    peer = peer_extra(record, HERE / "results" / "peers.json")
    draw(record, own.out.with_suffix(".png"), peer)
    if not own.json:
        print(tables(record, peer))
    print(json.dumps(record))


if __name__ == "__main__":
    main()
