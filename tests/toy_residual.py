"""A network with a residual stream of a few dozen numbers, its experts, and the same in float64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from toy_points import INPUTS, TASKS

from adamerge.backbones import Backbone, Encoded, Inputs
from adamerge.io.model_folder import Layout
from adamerge.task_vectors.task_vectors import TaskVectors

WIDTH, INNER, OUT = 5, 7, 3
ORDER = ["first.weight", "first.bias", "up.weight", "up.bias", "gate.weight", "down.weight", "down.bias", "last"]
"""Tensors of linear maps, as they run: ``up`` and ``gate`` share their inputs, ``last`` is registered first."""


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Parameter(torch.empty(WIDTH, OUT))
        self.norm = nn.Parameter(torch.empty(WIDTH))
        self.down = nn.Linear(INNER, WIDTH)
        self.first, self.up = nn.Linear(INPUTS, WIDTH), nn.Linear(WIDTH, INNER)
        self.gate = nn.Linear(WIDTH, INNER, bias=False)

    def forward(self, points: Tensor) -> Tensor:
        stream = self.first(points)
        scaled = self.norm * torch.tanh(stream)
        stream = stream + self.down(torch.tanh(self.up(scaled)) * self.gate(scaled))
        return stream @ self.last


class ToyResidual(Backbone):
    """Points to features; ``asked`` counts the samples that went in."""

    def __init__(self, dtype: str = "float32") -> None:
        self.dtype, self.asked = dtype, 0
        self.network: Any = Network().to(getattr(torch, dtype))
        self.heads: dict[str, nn.Module] = {}

    def tensors(self) -> Mapping[str, Tensor]:
        return dict(self.network.named_parameters())

    def build_heads(self, tasks: object, experts: object) -> None:
        self.heads = {}

    def layout(self) -> Layout:
        return Layout()

    def preprocess(self, sample: Any) -> Inputs:
        return torch.tensor(sample)

    def encode(self, inputs: Inputs, hidden: Sequence[float] = ()) -> Encoded:
        assert isinstance(inputs, Tensor)
        self.asked += len(inputs)
        return Encoded(self.network(inputs.to(self.network.last.dtype)))


Weights = dict[str, Tensor]


def weights(tasks: Sequence[str] = TASKS, scale: float = 0.4) -> tuple[Weights, dict[str, Weights]]:
    """A random base, and experts near it."""
    generator = torch.Generator().manual_seed(7)
    shapes = {name: value.shape for name, value in Network().named_parameters()}
    base = {name: 0.7 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    experts = {
        task: {name: value + scale * torch.randn(value.shape, generator=generator) for name, value in base.items()}
        for task in tasks
    }
    return base, experts


def vectors(tasks: Sequence[str] = TASKS, **arguments: Any) -> TaskVectors:
    return TaskVectors(*weights(tasks), **arguments)


def entering(model: Mapping[str, Tensor], points: Tensor) -> dict[str, tuple[Tensor, Tensor | None]]:
    """What enters each linear map, by its weight, and the stream that it writes into; in any dtype, from the formula."""
    stream = points @ model["first.weight"].T + model["first.bias"]
    scaled = model["norm"] * torch.tanh(stream)
    inner = torch.tanh(scaled @ model["up.weight"].T + model["up.bias"]) * (scaled @ model["gate.weight"].T)
    behind = stream + inner @ model["down.weight"].T + model["down.bias"]
    return {
        "first.weight": (points, None),
        "up.weight": (scaled, None),
        "gate.weight": (scaled, None),
        "down.weight": (inner, stream),
        "last": (behind, None),
    }
