"""A classifier of a few dozen numbers, its experts and its points: fits in milliseconds, in fp32 or float64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import torch
from lightning import Trainer
from torch import Tensor, nn

from adamerge import Calibration
from adamerge.backbones import Backbone, Encoded, Inputs
from adamerge.data.vocabulary import Vocabulary
from adamerge.io.model_folder import Layout
from adamerge.task_vectors.task_vectors import TaskVectors

INPUTS, WIDTH, CLASSES = 4, 5, 3
TASKS = ("one", "two")
# a merge of two experts, the longest sum of a layer or of the classes, and a function of it; as many on the way back, and the
# sum over a batch of eight
ROUNDINGS = 2 * (5 + WIDTH + 4) + 8
QUIET = {
    "logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False,
    "accelerator": "cpu", "use_distributed_sampler": False, "num_sanity_val_steps": 0, "limit_val_batches": 0,
}  # fmt: skip


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(INPUTS, WIDTH), nn.Linear(WIDTH, WIDTH)


class ToyClassifier(Backbone):
    """Points to features through two layers, then a fixed head per task."""

    def __init__(self, dtype: str = "float32") -> None:
        self.dtype = dtype
        self.network: Any = Network()
        self.heads: dict[str, nn.Module] = {}

    def tensors(self) -> Mapping[str, Tensor]:
        return dict(self.network.named_parameters())

    def build_heads(self, tasks: Mapping[str, Any], experts: object) -> None:
        self.heads = {}
        for task in tasks:
            self.heads[task] = nn.Linear(WIDTH, CLASSES, bias=False)
            self.heads[task].weight.data.copy_(head_of(task))

    def layout(self) -> Layout:
        return Layout()

    def preprocess(self, sample: Any) -> Inputs:
        return torch.tensor(sample)

    def encode(self, inputs: Inputs, hidden: Sequence[int] = ()) -> Encoded:
        return Encoded(self.network.second(torch.tanh(self.network.first(inputs))))


def head_of(task: str) -> Tensor:
    return 2 * torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(sum(map(ord, task))))


def weights_of(tasks: Sequence[str] = TASKS) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """A random base, and experts near it."""
    generator = torch.Generator().manual_seed(7)
    shapes = {name: value.shape for name, value in Network().named_parameters()}
    base = {name: 0.7 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    experts = {
        task: {name: value + 0.6 * torch.randn(value.shape, generator=generator) for name, value in base.items()}
        for task in tasks
    }
    return base, experts


def vectors_of(tasks: Sequence[str] = TASKS) -> TaskVectors:
    return TaskVectors(*weights_of(tasks))


def logits_of(weights: Mapping[str, Tensor], task: str, points: Tensor) -> Tensor:
    """The network again, for any dtype."""
    hidden = torch.tanh(points @ weights["first.weight"].T + weights["first.bias"])
    return (hidden @ weights["second.weight"].T + weights["second.bias"]) @ head_of(task).to(points.dtype).T


class ToyPoints(Calibration):
    """Random points, labelled by each task's own expert."""

    def __init__(
        self, names: Sequence[str] = TASKS, rows: int = 40, wrong_labels: bool = False, **arguments: Any
    ) -> None:
        super().__init__(**{"batch_size": 8, **arguments})
        self.names, self.rows_each, self.wrong_labels = tuple(names), rows, wrong_labels

    @property
    def tasks(self) -> Any:
        return {name: Vocabulary(("a", "b", "c"), ("{}",)) for name in self.names}

    def columns(self, task: str) -> tuple[str, ...]:
        return ("point",)

    def load(self, task: str) -> Mapping[str, datasets.Dataset]:
        generator = torch.Generator().manual_seed(sum(map(ord, task)))
        _, experts = weights_of(("one", "two", "three"))
        found = {}
        for split in ("calibration", "validation", "test"):
            points = 1.5 * torch.randn(self.rows_each, INPUTS, generator=generator)
            logits = logits_of(experts[task], task, points)
            labels = (logits - logits.mean(dim=0)).argmax(dim=1)  # so that every class has some
            if self.wrong_labels and split == "calibration":
                labels = (labels + 1) % CLASSES
            found[split] = datasets.Dataset.from_dict({"point": points.tolist(), "label": labels.tolist()})
        return found


def fit_toy(module: Any, data: Calibration, steps: int = 3, **arguments: Any) -> Any:
    Trainer(max_steps=steps, max_epochs=1, **{**QUIET, **arguments}).fit(module, data)
    return module
