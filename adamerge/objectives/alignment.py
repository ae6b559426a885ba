"""Alignment: on its own task's inputs the merged model should do what the task's expert does; no labels are needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from adamerge.backbones import Batch, Output, Teacher, masked_mean
from adamerge.errors import ConfigError, DataError
from adamerge.objectives.base import Objective


class LogitAlignment(Objective):
    """``T^2 KL(softmax(z_k / T) || softmax(z / T))``, z_k the logits of the task's expert and z those of the merged model.

    Of classes, one divergence per sample; of tokens, the mean over the positions that count: padding and the positions of
    images and prompts do not, as the backbone's mask says. The soft cross-entropy of the released code is this plus the
    entropy of the expert, a constant: same gradient, but its minimum is not 0.

    Where the cache kept the expert's ``k`` largest logits only, both softmaxes are over these ``k`` classes, each
    renormalised there: 0 when the merged model has the expert's odds among them; the other classes are left free.

    Args:
        temperature: T; a larger one looks more at the classes that the expert holds for unlikely.

    Raises:
        ConfigError: the temperature is not positive.
        DataError: the batch has no teacher.

    Reference: Expert Merging (Zhang et al., 2025), https://arxiv.org/abs/2509.25712, L_logit; knowledge
    distillation (Hinton et al., 2015), https://arxiv.org/abs/1503.02531, for the factor T^2.
    """

    taught = True

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        if not 0 < temperature < float("inf"):
            raise ConfigError(f"LogitAlignment: temperature must be positive, got {temperature}")
        self.temperature = temperature

    def forward(self, output: Output, batch: Batch) -> Tensor:
        """Returns divergences ``(samples,)`` of logits ``(samples, [positions,] classes)`` of model and expert."""
        teacher = _teacher(self, batch)
        logits = output.cropped(teacher.logits.shape[1])
        if teacher.classes is not None:
            logits = logits.gather(-1, teacher.classes.long())
        ours = (logits.float() / self.temperature).log_softmax(dim=-1)
        theirs = (teacher.logits.float() / self.temperature).log_softmax(dim=-1)
        p = theirs.exp()
        # 0 log 0 is 0, also where a class is masked out by -inf
        divergence = torch.where(p > 0, p * (theirs - ours), 0.0).sum(dim=-1)
        return self.temperature**2 * output.mean(divergence)


class HiddenAlignment(Objective):
    """Mean over chosen layers of the mean squared difference between hidden states of the merged model and the expert.

    A layer's mean is over the positions that count and over the width, in fp32; the states are not normalised.

    Args:
        layers: numbers of the hidden states: 0 is what enters the first block, ``i`` what leaves the i-th; negative ones
            count from the last, and what lies between 0 and 1 is a share of the depth: 0.5 is the middle. One whole number
            instead of a list is how many, evenly through the depth: the number of blocks takes what leaves each of them.
            Of a network of fewer blocks some count twice.

    Raises:
        ConfigError: there are no layers, or one that no network has; once the network runs, a layer that it has not.
        DataError: the batch has no teacher.

    Reference: Expert Merging (Zhang et al., 2025), https://arxiv.org/abs/2509.25712, L_hid; which layers the
    paper takes is not public.
    """

    taught = True

    def __init__(self, layers: int | Sequence[int | float]) -> None:
        super().__init__()
        if isinstance(layers, int):
            chosen = [*(place / layers for place in range(1, layers)), -1] if layers > 0 else []
        else:
            chosen = list(layers)
        if not chosen:
            raise ConfigError(f"{type(self).__name__}: layers must name at least one hidden state, such as [-1]")
        wrong = [layer for layer in chosen if not (0 < layer < 1 or layer % 1 == 0)]
        if wrong:
            raise ConfigError(
                f"{type(self).__name__}: layers must be whole numbers, or shares of the depth between 0 and 1, got {wrong[0]}"
            )
        self.layers, self.hidden = layers if isinstance(layers, int) else chosen, tuple(chosen)

    def forward(self, output: Output, batch: Batch) -> Tensor:
        """Returns distances ``(samples,)`` of hidden states ``(samples, positions, width)`` of model and expert."""
        return torch.stack(self._distances(output, batch, torch.mean)).mean(dim=0)

    def _distances(self, output: Output, batch: Batch, over_width: Callable[..., Tensor]) -> list[Tensor]:
        """Returns, per layer, the mean over positions of the squares' mean or sum over the width: ``(samples,)``."""
        distances = []
        for ours, theirs in zip(output.encoded.hidden, _teacher(self, batch).hidden, strict=True):
            # positions of this task's longest sample; those of other tasks may be longer
            squared = (ours[:, : theirs.shape[1]].float() - theirs.float()).square()
            distances.append(_over_positions(over_width(squared, dim=-1), output))
        return distances


class SummedHiddenAlignment(HiddenAlignment):
    """Sum over chosen layers of ``||h - h_k||^2``: the squared norms of the differences, mean over the positions that count.

    This reads the paper's formula as it stands. Of states of one width it is ``HiddenAlignment`` times width and layers,
    and so weighs that much more beside other objectives.

    Args:
        layers: as of ``HiddenAlignment``.

    Raises:
        ConfigError: there are no layers, or one that no network has; once the network runs, a layer that it has not.
        DataError: the batch has no teacher.

    Reference: Expert Merging (Zhang et al., 2025), https://arxiv.org/abs/2509.25712, L_hid; which layers the
    paper takes is not public.
    """

    def forward(self, output: Output, batch: Batch) -> Tensor:
        """Returns distances ``(samples,)`` of hidden states ``(samples, positions, width)``, summed over the width."""
        return torch.stack(self._distances(output, batch, torch.sum)).sum(dim=0)


class NormalisedHiddenAlignment(HiddenAlignment):
    """Mean over chosen layers of ``mean (h - h_k)^2 / var(h_k)``: the share of the expert's variance that is missed.

    Both means are over the positions that count and the width, of one sample and one layer: ``var`` is the mean square of the
    expert's states less their mean there. It is a number of the sample, so that micro-batches and processes change
    nothing. A model that says the mean for everything has 1. Layers count alike, however large their states are, and so do
    tasks; the weight beside a divergence need not be found anew for each network.

    Args:
        layers: as of ``HiddenAlignment``.

    Raises:
        ConfigError: there are no layers, or one that no network has; once the network runs, a layer that it has not.
        DataError: the batch has no teacher.

    Reference: normalised targets of hidden states: data2vec (Baevski et al., 2022), https://arxiv.org/abs/2202.03555; here
    divided by the variance of all of a sample's states.
    """

    def forward(self, output: Output, batch: Batch) -> Tensor:
        """Returns shares ``(samples,)`` of hidden states ``(samples, positions, width)`` of model and expert."""
        shares = [
            distance / _variance(theirs.float(), output).clamp_min(torch.finfo(torch.float32).eps)
            for distance, theirs in zip(
                self._distances(output, batch, torch.mean), _teacher(self, batch).hidden, strict=True
            )
        ]
        return torch.stack(shares).mean(dim=0)


def _variance(states: Tensor, output: Output) -> Tensor:
    """Returns the variance of each sample's states over the positions that count and the width, ``(samples,)``."""
    mean = _over_positions(states.mean(dim=-1), output)
    return _over_positions((states - mean[:, None, None]).square().mean(dim=-1), output)


def _over_positions(values: Tensor, output: Output) -> Tensor:
    """Returns the mean over the positions whose hidden states count, of ``(samples, positions)``: ``(samples,)``."""
    mask = output.encoded.hidden_mask
    return values.mean(dim=1) if mask is None else masked_mean(values, mask[:, : values.shape[1]])


def _teacher(objective: Objective, batch: Batch) -> Teacher:
    if batch.teacher is None:
        raise DataError(f"{type(objective).__name__}: the batch has no teacher")
    return batch.teacher
