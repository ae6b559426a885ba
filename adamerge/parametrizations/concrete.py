"""Concrete: a learned mask around another parametrization, shared by the experts and applied to their combined update."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adamerge.deltas.base import Deltas
from adamerge.errors import ConfigError
from adamerge.io.coefficient_file import read_coefficients
from adamerge.io.unwritten import is_unwritten
from adamerge.parametrizations.base import ParametrizationFactory, Update
from adamerge.parametrizations.masks import Mask, SoftMask
from adamerge.parametrizations.wrapper import Wrapper
from adamerge.task_vectors.task_vectors import TaskVectors

Sample = Callable[[Tensor], Tensor]


class Concrete(Wrapper):
    """``inner(tau) * m / mean(m)`` with one logit per weight, ``mean`` over the tensor; an empty mask gives no update.

    A search sees a fresh sample of the relaxed Bernoulli mask at each of its merges; what is evaluated, saved and
    exported has the one declared ``mask``, and a mask from a file is constant: then a search sees that one, too.

    Neither the mask nor the combined update is kept between merge and backward: the noise comes from a hash, the update
    from the deltas again. Of P elements, a mask adds 33 P to merge and contraction of ``inner`` for the coefficients'
    gradient alone and 41 P for the logits' alone, which is what a search asks for; both at once take 56 P and one more
    combination of the deltas (T P of stored ones, 2T P of experts on disk). The hash is half of it, twice.
    The logits, their gradient, and Adam's two moments are four times the model; a guarded step holds a fifth for a while.

    Args:
        task_vectors: names and shapes decide the logits.
        inner: what is masked.
        temperature: of the relaxation; at 0.5 samples are soft, not nearly binary.
        initial_logit: of every weight; at 0 each is kept with probability one half.
        mask: how the logits become the mask that is evaluated, saved and exported; one soft sample when None.
        seed: of the samples in a search.
        mask_from: a coefficient file whose mask is taken, and kept constant while ``inner`` is learned.

    Raises:
        ConfigError: the temperature is not positive, ``inner`` has a mask, or the file has no mask of these tensors.
        CoefficientsError: the file cannot be used.

    Reference: Concrete Subspace Learning (Tang et al., 2023), https://arxiv.org/abs/2312.06173.
    """

    def __init__(
        self,
        task_vectors: TaskVectors,
        inner: ParametrizationFactory,
        *,
        temperature: float = 0.5,
        initial_logit: float = 0.0,
        mask: Mask | None = None,
        seed: int = 0,
        mask_from: str | Path | None = None,
    ) -> None:
        if not 0 < temperature < float("inf"):
            raise ConfigError(f"Concrete: temperature must be positive, got {temperature}")
        super().__init__(task_vectors, inner)
        if self.inner.masks():
            raise ConfigError(
                f"Concrete: {type(self.inner).__name__} has a mask already, and a file has room for one",
                todo="take one of the two",
            )
        self.temperature, self.initial_logit, self.seed = temperature, initial_logit, seed
        self.mask = mask if mask is not None else SoftMask()
        self._numbers = {name: number for number, name in enumerate(task_vectors)}  # names with dots name no parameter
        self.logits = nn.ParameterList(
            torch.full(task_vectors.shape(name), initial_logit, dtype=torch.float32) for name in task_vectors
        )
        self._constant = mask_from is not None
        self.mask_from = None  # whoever reads the recipe finds the logits beside it, and needs no second file
        if self._constant:
            self.logits.requires_grad_(False)
        if mask_from is not None and not is_unwritten(mask_from):
            self._take(Path(mask_from))

    def forward(self, name: str, deltas: Deltas) -> Tensor:
        """Returns the update of ``inner`` under the declared mask."""
        return self._masked(self.inner, self.mask, name, deltas)

    def draw(self, number: int) -> Update:
        """Returns the update under the ``number``-th sample; under the declared mask when the logits are not learned."""
        mask = self.mask if self._constant else SoftMask(self.seed, number)
        return partial(self._masked, self.inner.draw(number), mask)

    def masks(self) -> dict[str, nn.Parameter]:
        """Returns the logits of this mask, tensor name to a parameter of its shape."""
        return {name: self.logits[number] for name, number in self._numbers.items()}

    def _masked(self, inner: Update, mask: Mask, name: str, deltas: Deltas) -> Tensor:
        logits, combine = self.logits[self._numbers[name]], partial(inner, name, deltas)

        def sample(x: Tensor) -> Tensor:
            return mask(name, x.reshape(-1), self.temperature)

        masked: Tensor = _Masked.apply(combine(), logits.detach(), sample)
        if torch.is_grad_enabled() and logits.requires_grad:
            masked = masked + _OfMask.apply(logits, combine, sample, partial(mask.slope, temperature=self.temperature))
        return masked

    def _take(self, path: Path) -> None:
        _, sections = read_coefficients(path)
        try:
            self.load_masks(sections["mask"])
        except (KeyError, ValueError) as error:
            raise ConfigError(
                f"Concrete: the mask of {path} is not one of these tensors: {error.args[0]}",
                todo="take the file of a fit with Concrete on the same base, include and exclude",
            ) from error


class _Masked(torch.autograd.Function):
    """Computes ``combined * m / mean(m)``, and its gradient for ``combined``."""

    @staticmethod
    def forward(ctx: Any, combined: Tensor, logits: Tensor, sample: Sample) -> Tensor:
        m = sample(logits)
        scale = _inverse(m.mean())
        # the parameter itself and a scalar: nothing of the tensor's size waits for the backward pass
        ctx.save_for_backward(logits, scale)
        ctx.sample = sample
        return m.mul_(combined.reshape(-1)).mul_(scale).view(combined.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        logits, scale = ctx.saved_tensors
        m = ctx.sample(logits)
        return m.mul_(gradients[0].reshape(-1)).mul_(scale).view(gradients[0].shape), None, None


class _OfMask(torch.autograd.Function):
    """Computes a zero whose gradient for the logits is that of ``combined * m / mean(m)``.

    Beside ``_Masked`` and not in it: who asks for the coefficients' gradient alone does not pay for this one.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        combine: Callable[[], Tensor],
        sample: Sample,
        slope: Callable[[Tensor], Tensor | None],
    ) -> Tensor:
        ctx.save_for_backward(logits)
        ctx.combine, ctx.sample, ctx.slope = combine, sample, slope
        return logits.new_zeros(()).expand(logits.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (logits,) = ctx.saved_tensors
        m = ctx.sample(logits)
        slope = ctx.slope(m)
        if slope is None:
            return torch.zeros_like(logits), None, None, None
        scale = _inverse(m.mean())
        with torch.no_grad():
            product = ctx.combine().reshape(-1).mul(gradients[0].reshape(-1))
        # d/dm_e of sum_f G_f T_f m_f / mean(m) = (G_e T_e - <G T, m> / sum(m)) / mean(m)
        centre = torch.dot(product, m) * scale / len(m)
        return product.sub_(centre).mul_(slope).mul_(scale).view(logits.shape), None, None, None


def _inverse(mean: Tensor) -> Tensor:
    """Returns ``1 / mean``, and 0 of an empty mask."""
    return torch.where(mean > 0, 1 / mean, 0.0)
