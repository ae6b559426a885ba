"""A language model of a few hundred numbers, its experts and its data: fits in milliseconds, in fp32 or float64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import torch
from lightning import Trainer
from torch import Tensor, nn

from adamerge import Calibration
from adamerge.backbones import Backbone, Encoded, Inputs
from adamerge.backbones.hidden_states import state_number
from adamerge.data import Vocabulary
from adamerge.io.model_folder import Layout
from adamerge.task_vectors.task_vectors import TaskVectors

VOCABULARY, WIDTH = 11, 6
QUIET = {
    "logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False,
    "accelerator": "cpu", "use_distributed_sampler": False, "num_sanity_val_steps": 0, "limit_val_batches": 0,
}  # fmt: skip


class ToyNetwork(nn.Module):
    """Tokens to logits at every position, through two hidden layers, without any mixing of positions."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList([nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)])
        self.out = nn.Linear(WIDTH, VOCABULARY, bias=False)


class Tied(nn.Module):
    """Two blocks, a head that is the embedding's, and a parameter beside the modules."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(4, 2), nn.Linear(2, 4, bias=False)
        self.head.weight = self.embed.weight
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)) for _ in range(2)])
        self.scale = nn.Parameter(torch.ones(2))


class ToyLanguage(Backbone):
    """Counts its forward passes; positions with ``counts`` False are padding or context."""

    def __init__(self, dtype: str = "float32") -> None:
        self.dtype = dtype
        self.network: Any = ToyNetwork().to(getattr(torch, dtype))
        self.heads: dict[str, nn.Module] = {}
        self.samples_seen = 0

    def tensors(self) -> Mapping[str, Tensor]:
        return dict(self.network.named_parameters())

    def build_heads(self, tasks: object, experts: object) -> None:
        self.heads = {}

    def layout(self) -> Layout:
        return Layout()

    def preprocess(self, sample: Any) -> Inputs:
        return {"tokens": torch.tensor(sample["tokens"]), "counts": torch.tensor(sample["counts"])}

    def encode(self, inputs: Inputs, hidden: Sequence[int] = ()) -> Encoded:
        assert isinstance(inputs, dict)
        self.samples_seen += len(inputs["tokens"])
        states = [self.network.embed(inputs["tokens"])]
        for block in self.network.blocks:
            states.append(torch.tanh(block(states[-1])))
        chosen = tuple(states[state_number(number, len(states))] for number in hidden)
        return Encoded(self.network.out(states[-1]), chosen, inputs["counts"], inputs["counts"])

    def output(self, encoded: Encoded, task: str) -> Any:
        from adamerge.backbones import Output

        return Output(encoded.features, encoded)


def toy_weights(tasks: Sequence[str], scale: float = 0.4) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """A random base, and experts near it that leave nothing out."""
    generator = torch.Generator().manual_seed(7)
    shapes = {name: value.shape for name, value in ToyNetwork().named_parameters()}
    base = {name: 0.7 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    experts = {
        task: {name: value + scale * torch.randn(value.shape, generator=generator) for name, value in base.items()}
        for task in tasks
    }
    return base, experts


def toy_vectors(tasks: Sequence[str] = ("one", "two"), **arguments: Any) -> TaskVectors:
    return TaskVectors(*toy_weights(tasks), **arguments)


def forward(weights: dict[str, Tensor], tokens: Tensor) -> tuple[list[Tensor], Tensor]:
    """States after the embedding and each block, and logits, of one sequence ``(positions,)``, in any dtype."""
    states = [weights["embed.weight"][tokens]]
    for i in (0, 1):
        states.append(torch.tanh(states[-1] @ weights[f"blocks.{i}.weight"].T + weights[f"blocks.{i}.bias"]))
    return states, states[-1] @ weights["out.weight"].T


class ToyTexts(Calibration):
    """Random tokens of random length, some of which do not count."""

    def columns(self, task):
        return ("tokens", "counts")

    def __init__(
        self,
        names: Sequence[str] = ("one", "two"),
        rows: int = 10,
        batch_size: int = 4,
        seed: int = 0,
        workers: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, seed=seed, workers=workers)
        self.names, self.rows_each = tuple(names), rows

    @property
    def tasks(self) -> Any:
        return {name: Vocabulary((), ()) for name in self.names}

    def load(self, task: str) -> Mapping[str, datasets.Dataset]:
        generator = torch.Generator().manual_seed(sum(map(ord, task)))
        tokens, counts = [], []
        for _ in range(self.rows_each):
            length = int(torch.randint(2, 9, (), generator=generator))
            tokens.append(torch.randint(0, VOCABULARY, (length,), generator=generator).tolist())
            kept = torch.rand(length, generator=generator) < 0.7
            kept[1] = True
            counts.append(kept.tolist())
        return {"calibration": datasets.Dataset.from_dict({"tokens": tokens, "counts": counts})}


def toy_fit(module: Any, data: Calibration, steps: int = 3, **arguments: Any) -> Any:
    Trainer(max_steps=steps, max_epochs=1, **{**QUIET, **arguments}).fit(module, data)
    return module
