"""One side of ``peers.py`` in a process and an environment of its own: a few optimisation steps, timed.

    python tests/benchmarks/peer_step.py FOLDER adamerge|adamerge-disk|fusion_bench OUT

FOLDER has ``base.safetensors``, ``<task>.safetensors`` of each expert, and ``inputs.safetensors``: a head and the images of
each step for every task. OUT receives the first gradients, the losses and the last coefficients; seconds are printed.
Both sides see the same network, batches, objective and SGD. Only what both environments have is imported at the top.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

INIT = 0.3
RATE = 0.1
Found = tuple[list[float], dict[str, Tensor], dict[str, Tensor], list[float]]


def network(weights: Path | None = None) -> Any:
    """CLIP's ViT-B/32 image tower with its projection."""
    tower = CLIPVisionModelWithProjection(CLIPVisionConfig()).eval()
    if weights is not None:
        tower.load_state_dict(load_file(weights))
    return tower


class Head(nn.Module):
    """Cosines with the embeddings of a task's classes, times 10.

    Args:
        classes: ``(classes, width)``.
    """

    def __init__(self, classes: Tensor) -> None:
        super().__init__()
        self.register_buffer("classes", classes)

    def forward(self, features: Tensor) -> Tensor:
        """``(samples, width)`` to logits."""
        return 10 * nn.functional.normalize(features, dim=-1) @ self.classes.T


def entropy(logits: Tensor) -> Tensor:
    """The mean over the samples, in nats."""
    logarithms = logits.log_softmax(dim=-1)
    return -(logarithms.exp() * logarithms).sum(dim=-1).mean()


def inputs_of(folder: Path) -> tuple[list[str], int, dict[str, Tensor]]:
    """Names of the tasks, number of steps, and all tensors."""
    tensors = load_file(folder / "inputs.safetensors")
    tasks = sorted(name.split("/")[1] for name in tensors if name.startswith("head/"))
    return tasks, sum(name.startswith(f"images/{tasks[0]}/") for name in tensors), tensors


def adamerge(folder: Path, storage: str) -> Found:
    """Merge once, back-propagate every task into the merged copy, contract once."""
    from functools import partial

    from adamerge.backbones import Backbone, Batch, Encoded
    from adamerge.io.model_folder import Layout
    from adamerge.merging.merged_model import MergedModel
    from adamerge.objectives import Entropy
    from adamerge.parametrizations import LayerWise
    from adamerge.task_vectors.storage import Disk, Resident
    from adamerge.task_vectors.task_vectors import TaskVectors

    class Tower(Backbone):
        def __init__(self, heads: dict[str, nn.Module]) -> None:
            self.network, self.heads = network(), heads

        def tensors(self) -> dict[str, Tensor]:
            return dict(self.network.named_parameters())

        def build_heads(self, tasks: object, experts: object) -> None:
            pass

        def layout(self) -> Layout:
            return Layout()

        def preprocess(self, sample: Any) -> Tensor:
            return sample

        def encode(self, inputs: Any, hidden: Any = ()) -> Encoded:
            return Encoded(self.network(pixel_values=inputs).image_embeds)

    tasks, steps, tensors = inputs_of(folder)
    backbone = Tower({task: Head(tensors[f"head/{task}"]) for task in tasks})
    vectors = TaskVectors(folder / "base.safetensors", {task: folder / f"{task}.safetensors" for task in tasks})
    kept = {"resident": Resident(), "disk": Disk()}[storage]
    model = MergedModel(backbone, vectors, partial(LayerWise, init=INIT)(vectors), kept)
    objective, weights = Entropy(), model.parametrization.w
    optimizer = torch.optim.SGD([weights], RATE)
    seconds, losses, first = [], [], {}
    for step in range(steps):
        start = time.perf_counter()
        model.merge()
        total = torch.zeros(())
        for task in tasks:
            images = tensors[f"images/{task}/{step}"]
            loss = objective(backbone.output(model(images), task), Batch(images)).mean()
            loss.backward()
            total += loss.detach()
        model.pull_back(total).backward()
        if step == 0:
            first = named(list(vectors), weights.grad)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
        losses.append(float(total))
    return seconds, first, named(list(vectors), weights.detach()), losses


def fusion_bench(folder: Path) -> Found:
    """The published wrapper, driven as the package's own layer-wise algorithm drives it."""
    from fusion_bench.models.wrappers.layer_wise_fusion import LayerWiseMergedModel, get_layer_wise_weights

    tasks, steps, tensors = inputs_of(folder)
    heads = {task: Head(tensors[f"head/{task}"]) for task in tasks}
    base = network(folder / "base.safetensors")
    names = [name for name, parameter in base.named_parameters() if parameter.requires_grad]
    model = LayerWiseMergedModel(
        layer_wise_weight=get_layer_wise_weights(len(tasks), len(names), INIT),
        pretrained_model=base,
        finetuned_models=[network(folder / f"{task}.safetensors") for task in tasks],
        clamp_weights=False,
        tie_weights=True,  # this and the other two as in its configuration for CLIP
        strict=False,
    )
    optimizer = torch.optim.SGD([model.merge_weight], RATE)
    seconds, losses, first = [], [], {}
    model.merge_weights()
    for step in range(steps):
        start = time.perf_counter()
        total = 0.0
        for task in tasks:
            logits = heads[task](model(pixel_values=tensors[f"images/{task}/{step}"]).image_embeds)
            loss = entropy(logits)
            loss.backward(retain_graph=True)
            total += float(loss.detach())
        if step == 0:
            first = named(names, model.merge_weight.grad)
        optimizer.step()
        optimizer.zero_grad()
        model.merge_weights()
        seconds.append(time.perf_counter() - start)
        losses.append(total)
    return seconds, first, named(names, model.merge_weight.detach()), losses


def named(names: list[str], columns: Tensor) -> dict[str, Tensor]:
    """``(experts, tensors)`` by tensor name."""
    return {name: columns[:, place].clone() for place, name in enumerate(names)}


def main() -> None:
    """Run one side."""
    folder, side, out = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    run = {
        "adamerge": lambda: adamerge(folder, "resident"),
        "adamerge-disk": lambda: adamerge(folder, "disk"),
        "fusion_bench": lambda: fusion_bench(folder),
    }[side]
    seconds, first, last, losses = run()
    kept = {f"gradient/{name}": value for name, value in first.items()}
    save_file(kept | {f"coefficients/{name}": value for name, value in last.items()}, out)
    print(json.dumps({"seconds": seconds, "losses": losses}))


if __name__ == "__main__":
    main()
