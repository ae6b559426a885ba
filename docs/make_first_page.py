"""Makes the picture of the README, docs/first_page.png, from fits on the bundled image testbed.

    python docs/make_first_page.py            # fits, scores, writes docs/first_page.json and draws: about fifteen minutes
    python docs/make_first_page.py --draw     # draws docs/first_page.json again

Run it from the project's folder. Finished fits in runs/first_page are not repeated, so the command may be given again after
it was ended. Every figure is the accuracy on the test split, which no fit has seen.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt

DOCS = Path(__file__).parent
FIGURES, PICTURE = DOCS / "first_page.json", DOCS / "first_page.png"
POOL, RUNS = "configs/pools/testbed_images.yaml", Path("runs/first_page")
SEEDS = (0, 1, 2)
LEARNED = {  # of each: the command's words behind the pool
    "adamerging_layer_wise": ["--trainer.max_steps=200", "--model.search.lr=1e-2"],
    "expert_merging": [],
    "auto": [],
    "atlas_addition": ["--trainer.max_steps=200", "--model.search.lr=3e-2"],
}
SHOWN = "expert_merging"  # whose coefficients the heat map shows, of the first seed
NOTHING_LEARNED = ("weight_average", "ties")
BARS = (  # name in the figures, label, colour
    ("pretrained", "the base", "#b8bcc2"),
    ("weight_average", "average of the weights", "#b8bcc2"),
    ("ties", "TIES", "#b8bcc2"),
    ("task_arithmetic_tuned", "task arithmetic, best of 21 coefficients\n(chosen on the test labels)", "#e3b27a"),
    ("adamerging_layer_wise", "AdaMerging, learned without labels", "#4c9f9a"),
    ("expert_merging", "Expert Merging, learned without labels", "#4c9f9a"),
    ("atlas_addition", "aTLAS, learned with labels", "#e3b27a"),
    ("auto", "our recipe, learned without labels", "#1f7a74"),
    ("individual", "the seven experts, each on its own task", "#5a6472"),
)


def measured() -> dict[str, Any]:
    """Fits and scores everything that is drawn.

    Returns:
        ``pool``, ``metric`` and ``tasks``; ``methods``, of each its ``command``, ``average`` in % for each seed and the
        ``labels`` that it read; ``coefficients`` of one run, ``{tensor: {expert: number}}``.
    """
    adamerge("compare", POOL, *(f"configs/methods/{name}.yaml" for name in NOTHING_LEARNED), f"--folder={RUNS}")
    compared = json.loads((RUNS / "comparison.json").read_text(encoding="utf-8"))
    methods = {
        name: {"average": [100 * row["average"]], "labels": "of the test split" if name.endswith("tuned") else "none"}
        for name, row in compared["methods"].items()
    }
    for name, words in LEARNED.items():
        command, averages, labelled = [POOL, f"configs/methods/{name}.yaml", *words], [], False
        for seed in SEEDS:
            run = RUNS / name / str(seed)
            if summary(run).get("status") != "finished":
                where = [f"--runs={RUNS}", f"--name={name}", f"--id={seed}"]
                adamerge("fit", *command, f"--data.seed={seed}", f"--seed_everything={seed}", *where)
            if "test" not in summary(run):
                adamerge("test", str(run))
            averages.append(100 * summary(run)["test"]["average"])
            labelled |= bool(summary(run)["protocol"].get("labelled"))
        labels = "of the calibration and validation splits" if labelled else "none"
        methods[name] = {"average": averages, "labels": labels, "command": " ".join(["adamerge fit", *command])}
    return {
        "pool": POOL,
        "metric": "accuracy on the test split in %, mean of the tasks",
        "tasks": compared["tasks"],
        "tuned_coefficient": compared["tuned_lambda"],
        "seeds": list(SEEDS),
        "methods": methods,
        "coefficients": coefficients(RUNS / SHOWN / str(SEEDS[0])),
    }


def adamerge(*words: str) -> None:
    """Runs the program."""
    subprocess.run([sys.executable, "-m", "adamerge", *words], check=True)


def summary(run: Path) -> dict[str, Any]:
    """The summary of a run, empty where there is none."""
    path = run / "summary.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def coefficients(run: Path) -> dict[str, dict[str, float]]:
    """One number of every tensor and expert."""
    from adamerge import load_coefficients

    table = load_coefficients(run).table()
    return {tensor: {task: round(value[0], 4) for task, value in row.items()} for tensor, row in table.items()}


def draw(figures: dict[str, Any], path: Path) -> None:
    """Draws the bars and the heat map."""
    plt.rcParams.update({"font.family": "DejaVu Sans", "font.size": 10, "axes.spines.top": False})
    figure, (bars, heat) = plt.subplots(1, 2, figsize=(12, 4.3), width_ratios=(1.15, 1), layout="constrained")
    draw_bars(bars, figures["methods"])
    draw_heat(heat, figures["coefficients"])
    figure.savefig(path, dpi=120, metadata={"Software": None})
    plt.close(figure)


def draw_bars(axes: Any, methods: dict[str, Any]) -> None:
    """One bar a method: the mean of its seeds, with a line from the lowest to the highest."""
    for place, (name, _, colour) in enumerate(reversed(BARS)):
        averages = methods[name]["average"]
        middle = mean(averages)
        axes.barh(place, middle, color=colour, height=0.72)
        axes.plot([min(averages), max(averages)], [place, place], color="black", linewidth=1.2)
        axes.text(max(averages) + 1.2, place, f"{middle:.1f}", va="center", fontweight="bold")
    axes.set_yticks(range(len(BARS)), [label for _, label, _ in reversed(BARS)])
    axes.tick_params(axis="y", length=0)
    axes.set_xlim(0, 100)
    axes.spines["right"].set_visible(False)
    axes.set_xlabel("accuracy on the test split, %, mean of seven tasks")
    axes.set_title("One merged model for seven tasks", loc="left", fontweight="bold")


def draw_heat(axes: Any, table: dict[str, dict[str, float]]) -> None:
    """The learned coefficients: a row for each tensor, from the input to the output, and a column for each expert."""
    tensors = sorted(table, key=depth)
    experts = list(table[tensors[0]])
    values = [[table[tensor][expert] for expert in experts] for tensor in tensors]
    image = axes.imshow(values, aspect="auto", cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
    places: dict[str, list[int]] = {}
    for place, tensor in enumerate(tensors):
        places.setdefault(group(tensor), []).append(place)
    for rows in list(places.values())[1:]:
        axes.axhline(rows[0] - 0.5, color="white", linewidth=1.6)
    axes.set_yticks([mean(rows) for rows in places.values()], list(places))
    axes.tick_params(axis="y", length=0)
    axes.set_xticks(range(len(experts)), experts, rotation=30, ha="right", rotation_mode="anchor")
    axes.set_title("What Expert Merging learned", loc="left", fontweight="bold")
    axes.figure.colorbar(
        image, ax=axes, fraction=0.05, pad=0.02, label=f"{len(tensors)} x {len(experts)} coefficients, 0.3 at the start"
    )


def group(tensor: str) -> str:
    """The part of the image tower that a tensor belongs to."""
    words = tensor.split(".")
    if "resblocks" in words:
        return f"block {int(words[words.index('resblocks') + 1]) + 1}"
    return "output" if words[1] in ("ln_post", "proj") else "input"


def depth(tensor: str) -> tuple[int, str, str]:
    """Sorts tensors from the input to the output."""
    part = group(tensor)
    return {"input": 0, "output": 2}.get(part, 1), part, tensor


def main() -> None:
    """Measures unless told to draw alone, and draws."""
    if sys.argv[1:] not in ([], ["--draw"]):
        raise SystemExit(__doc__)
    if not sys.argv[1:]:
        FIGURES.write_text(json.dumps(measured(), indent=1) + "\n", encoding="utf-8")
    draw(json.loads(FIGURES.read_text(encoding="utf-8")), PICTURE)
    print(f"{FIGURES}\n{PICTURE}")


if __name__ == "__main__":
    main()
