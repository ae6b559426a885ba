"""Running statistics of batch normalisation, recomputed for the merged network, whose activations are not its base's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader

from adamerge.backbones import Backbone
from adamerge.backbones.inputs import join, moved
from adamerge.data import Calibration
from adamerge.data.batch_order import Steps
from adamerge.errors import ConfigError, DivergedError
from adamerge.merging.merged_model import MergedModel
from adamerge.training.strategy import Strategy

MOST_BATCHES = 40
"""So many batches of ``data.eval_batch_size`` samples are looked at, or all calibration samples where that is less."""


def normalisations(backbone: Backbone) -> dict[_BatchNorm, tuple[str, str]]:
    """Returns the layers with running statistics that ``encode`` runs, with the on-disk names of mean and variance.

    Counters of batches are no statistics: nothing depends on them, and they stay the base's.
    """
    names = {id(tensor): name for name, tensor in backbone.tensors().items() if backbone.trains(name)}
    return {
        layer: (names[id(layer.running_mean)], names[id(layer.running_var)])
        for layer in backbone.network.modules()
        if isinstance(layer, _BatchNorm) and {id(layer.running_mean), id(layer.running_var)} <= names.keys()
    }


def check_normalised(backbone: Backbone) -> None:
    """Checks whether a network has running statistics that can be recomputed.

    Raises:
        ConfigError: it has none.
    """
    if not normalisations(backbone):
        raise ConfigError(
            f"model.recalibrate_buffers: {type(backbone).__name__} has no running statistics to recompute",
            expected="a network with batch normalisation",
            got=type(backbone.network).__name__,
            todo="leave it out",
        )


class Moments:
    """Pools mean and variance of what enters one layer, over batches and processes; called before each of its forwards.

    The layer stays in eval mode and is given the batch's own statistics to normalise with, over all processes, rounded to
    its buffers' dtype: what it computes is what it would in train mode, while nothing else about it moves.

    Args:
        strategy: of the trainer: sums over processes.
    """

    def __init__(self, strategy: Strategy) -> None:
        self.strategy = strategy
        self._sums: Tensor | None = None

    def __call__(self, layer: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        """Adds the layer's input, ``(samples, channels, ...)``, to the pooled mean and variance."""
        values = arguments[0].to(torch.promote_types(arguments[0].dtype, torch.float32))
        variance, mean = torch.var_mean(values, [0, *range(2, values.ndim)], correction=0)
        # widened after the reduction: sums of squares in fp32 would lose a variance that is small beside the mean
        variance, mean = variance.double(), mean.double()
        count = values.numel() / values.shape[1]
        own = torch.stack([torch.full_like(mean, count), count * mean, count * (variance + mean.square())])
        reduced = self.strategy.reduce(own, reduce_op="sum")
        sums = reduced if isinstance(reduced, Tensor) else own
        self._sums = sums if self._sums is None else self._sums + sums
        _, batch_mean, batch_variance = _moments(sums)
        layer.get_buffer("running_mean").copy_(batch_mean)
        layer.get_buffer("running_var").copy_(batch_variance)

    def pooled(self) -> tuple[Tensor, Tensor] | None:
        """Returns mean and unbiased variance, fp32, of all inputs that entered the layer; None where none did."""
        if self._sums is None:
            return None
        count, mean, variance = _moments(self._sums)
        return mean.float().cpu(), (variance * count / (count - 1).clamp_min(1)).float().cpu()


def _moments(sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    count, total, squares = sums
    mean = total / count
    return count, mean, (squares / count - mean.square()).clamp_min(0)


@torch.no_grad()
def recalibrate(merged: MergedModel, data: Calibration, strategy: Strategy) -> dict[str, Any]:
    """Recomputes the running statistics of the merged network on calibration inputs, and lets the network keep them.

    One pass over batches with as many samples of each task, in the order of a fit's data, without labels; a task with fewer
    samples than the others begins again. In the pass every normalisation uses its batch's own statistics, as in training,
    and so do those before it; dropout stays off. What is kept is exact over all of the pass: the mean and the unbiased
    variance of everything that entered the layer, not an average of the batches' variances. Each task weighs the same.

    Args:
        merged: on its device.
        data: with the backbone it serves.
        strategy: of the trainer: its precision, and the other processes, which share every batch.

    Returns:
        Which data were used, for the coefficient file and the card.

    Raises:
        DivergedError: an activation of the merged network is not finite.
        DataError: a sample cannot be read.

    References: REPAIR (Jordan et al., 2023), https://arxiv.org/abs/2211.08403, section 3.1; the pass is that of stochastic
        weight averaging (Izmailov et al., 2018), https://arxiv.org/abs/1803.05407, section 3.2.
    """
    steps = _steps(data, strategy)
    merged.merge()
    layers = normalisations(merged.backbone)
    moments_of = {layer: Moments(strategy) for layer in layers}
    with ExitStack() as stack:
        for layer, moments in moments_of.items():
            for buffer in (layer.running_mean, layer.running_var):
                assert buffer is not None
                stack.callback(buffer.copy_, buffer.clone())
            stack.callback(layer.register_forward_pre_hook(moments).remove)
        for batch in DataLoader(steps, batch_size=None, num_workers=data.workers):
            inputs = join([part.inputs for part in batch.values()])
            with strategy.precision_plugin.forward_context():
                merged(moved(inputs, merged.device))
    merged.replace_buffers(_values(layers, moments_of))
    return {
        **data.protocol,
        "recalibrated_buffers": f"{len(merged.recalibrated)} running statistics, from {len(steps)} batches of "
        f"{steps.batch_size} calibration samples of each task, labels never read",
    }


def _values(
    layers: Mapping[_BatchNorm, tuple[str, str]], moments_of: Mapping[_BatchNorm, Moments]
) -> dict[str, Tensor]:
    """Returns the recomputed statistics by on-disk name, of the layers that an input entered."""
    values = {}
    for layer, names in layers.items():
        for name, value in zip(names, moments_of[layer].pooled() or (), strict=False):
            if not torch.isfinite(value).all():
                raise DivergedError(
                    f"'{name}' cannot be recomputed: what enters this layer of the merged model is not finite",
                    todo="look at the coefficients with `adamerge inspect`, or leave out model.recalibrate_buffers",
                )
            values[name] = value
    return values


def _steps(data: Calibration, strategy: Strategy) -> Steps:
    """Returns the order of samples: each of the largest task once, or as many as the data allow to be looked at."""
    samples = {task: data.samples(task, "calibration") for task in data.fitted}
    rank, processes = getattr(strategy, "global_rank", 0), getattr(strategy, "world_size", 1)
    most, most_at_once = max(map(len, samples.values())), max(1, data.eval_batch_size // len(samples))
    total = min(MOST_BATCHES, math.ceil(most / most_at_once))
    size = max(processes, min(most_at_once, math.ceil(most / total)))
    return Steps(samples, None, batch_size=size, seed=data.seed, total=total, rank=rank, world_size=processes)
