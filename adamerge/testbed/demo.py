"""A demo: it merges the testbed's experts in several ways, compares them, exports one and reloads it elsewhere."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file, save_file

from adamerge.artifacts.coefficients import load_coefficients
from adamerge.artifacts.export import export
from adamerge.io.atomic import write_json
from adamerge.merging.merged_model import MergedModel
from adamerge.runs.compare import LAMBDAS, compare, print_table
from adamerge.runs.comparison_rows import Choices
from adamerge.runs.instantiate import Configured
from adamerge.task_vectors.storage import Disk

POOL = Path("configs/pools/testbed_images.yaml")
SETTINGS = Path(__file__).with_name("demo.yaml")
RECIPE = "auto"
"""What is exported: chosen before anything is scored."""
FOLDER = Path("runs/demo")
PAPER_GAP_CLOSED = 0.51  # AdaMerging, ViT-B/32: (80.1 - 69.1) / (90.5 - 69.1)
SAMPLES_COMPARED = 64

# open_clip alone, as a stranger would: weights, configuration, tokenizer and both towers come from the folder
RELOAD = """
import json, sys
import open_clip, torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import normalize

folder, images, words, logits = sys.argv[1:]
model = open_clip.create_model(f"local-dir:{folder}", require_pretrained=True).eval()
tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
classnames, templates = json.loads(words)
with torch.no_grad():
    prompts = tokenizer([template.format(name) for name in classnames for template in templates])
    words = model.encode_text(prompts, normalize=True).view(len(classnames), len(templates), -1).mean(dim=1)
    features = model.encode_image(load_file(images)["images"], normalize=True)
    save_file({"logits": model.logit_scale.exp() * features @ normalize(words, dim=-1).T}, logits)
"""


def main() -> None:
    """Runs the demo from scratch, and prints where its results are."""
    start = time.monotonic()
    console = Console()
    if not POOL.is_file():
        raise SystemExit(f"run this from the project's folder: {POOL} is not here")
    shutil.rmtree(FOLDER, ignore_errors=True)
    overrides = sys.argv[1:]
    own = settings(overrides)
    console.print(f"pool: {POOL}\nmethods: {', '.join(own)}, with the settings of {SETTINGS.name}", highlight=False)
    grid = tuple(f"{name}:{key}={value}" for name, given in own.items() for key, value in given.items())
    methods, lambdas = [path_of(name) for name in own], LAMBDAS[6:13:2]  # 0.3 to 0.6: each takes a pass over all data
    result = compare(POOL, methods, FOLDER, overrides, lambdas, choices=Choices(grid=grid))
    run = Path(result["runs"][RECIPE])
    folder = export(load_coefficients(run / "coefficients.safetensors"), FOLDER / "merged")
    difference, largest = _reload_elsewhere(run, folder)
    result |= {"seconds": time.monotonic() - start, "export_max_abs_diff": difference, "exported": RECIPE}
    result |= {"export_max_abs_logit": largest, "overrides": list(overrides)}
    write_json(FOLDER / "comparison.json", result)
    print_table(result)
    closed = {
        name: f"{100 * result['methods'][name]['gap_closed']:.0f} %" for name in ("adamerging_layer_wise", RECIPE)
    }
    console.print(
        f"of the way from tuned task arithmetic to the experts: {closed['adamerging_layer_wise']} by layer-wise AdaMerging "
        f"({100 * PAPER_GAP_CLOSED:.0f} % in the paper: ViT-B/32, 8 tasks, on the test inputs themselves), "
        f"{closed[RECIPE]} by {RECIPE}\n"
        f"{RECIPE} is exported to {folder}, and reloaded by open_clip in a new process: logits differ by "
        f"{difference:.1e} at most (largest logit {largest:.1f})\n"
        f"bars: {FOLDER / 'comparison.png'}\nheat map: {run / 'heatmap.png'}\n"
        f"all figures: {FOLDER / 'comparison.json'}\nruns: {FOLDER / 'fits'}\ntook {result['seconds']:.0f} s"
    )
    if difference > 1e-5 * max(1.0, largest):
        raise SystemExit("the exported model does not give the trainer's logits")


def settings(overrides: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
    """Returns the demo's methods by name, and the keys that each has of its own there, but those that are overridden."""
    found: dict[str, dict[str, Any]] = yaml.safe_load(SETTINGS.read_text(encoding="utf-8"))
    given = {word.removeprefix("--").partition("=")[0] for word in overrides}
    return {
        name: {key: value for key, value in own.items() if not {key, key.lstrip("0123456789.")} & given}
        for name, own in found.items()
    }


def path_of(method: str) -> Path:
    """Returns the file of a method, or its folder of stages."""
    folder = Path("configs/methods") / method
    return folder if folder.is_dir() else folder.with_suffix(".yaml")


def _reload_elsewhere(run: Path, folder: Path) -> tuple[float, float]:
    """Returns the largest difference between our logits and those of the reloaded folder, and the largest logit."""
    fit = Configured.of(["--config", str(run / "config.yaml")])
    coefficients = load_coefficients(run / "coefficients.safetensors")
    backbone: Any = fit.model.merged.backbone
    data = fit.datamodule
    data.serve(backbone)
    task = next(iter(data.tasks))
    vectors, parametrization = coefficients.task_vectors, coefficients.parametrization
    model = MergedModel(backbone, vectors, parametrization, storage=Disk(), buffers=coefficients.buffers)
    backbone.build_heads({task: data.tasks[task]}, vectors.checkpoints)
    samples: Any = data.samples(task, "test")
    inputs = torch.stack([samples[i] for i in range(SAMPLES_COMPARED)])
    with torch.no_grad():
        model.merge()
        logits = backbone.output(model(inputs), task).logits
    images, reloaded_logits = folder.parent / "images.safetensors", folder.parent / "logits.safetensors"
    save_file({"images": backbone.normalise(inputs)}, images)
    words = json.dumps([list(data.tasks[task].classnames), list(data.tasks[task].templates)])
    command: Sequence[str] = [sys.executable, "-c", RELOAD, str(folder), str(images), words, str(reloaded_logits)]
    subprocess.run(command, check=True)
    reloaded = load_file(reloaded_logits)["logits"]
    images.unlink()
    reloaded_logits.unlink()
    return float((logits - reloaded).abs().max()), float(logits.abs().max())


if __name__ == "__main__":
    main()
