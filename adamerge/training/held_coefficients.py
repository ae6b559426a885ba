"""Held coefficients: those whose gradient is nothing but rounding stay where they begin; which ones is decided once.

The true gradient of some coefficients is 0: a bias of attention's keys shifts all scores of a query alike, which softmax
does not see; a tensor that no expert changed has nothing to weigh. What a pass computes for the former is rounding, and an
optimiser that looks at signs, such as Adam, walks by it as far as by a gradient. One pass cannot tell rounding from a
small gradient: that is in ``G`` already, and no bound of the contraction sees it. More can: at coefficients that are moved
by a thousandth, a true gradient is nearly the same, however small it is, and rounding falls out anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from adamerge.merging.copies import Place
from adamerge.merging.merged_model import MergedModel
from adamerge.merging.merged_tensor import linear_update, updates
from adamerge.merging.pullback import MergeGradients, Probes
from adamerge.parametrizations import Parametrization
from adamerge.parametrizations.hashed_noise import logistic
from adamerge.precision import exact
from adamerge.training.nonfinite_guard import Guard
from adamerge.training.strategy import Strategy

PROBES = 4
"""Sums of each gradient: its own, and others of the same products with random weights. By all of them two roundings are
alike, to ``ALIKE``, less than once in a hundred times; by its own alone once in thirty."""

PASSES = 2
"""At coefficients that are moved, each to other ones. In all of them rounding is alike less than once in 1e4 times."""

MOVED = 0.002
"""How far coefficients are moved, at most, as a share of them; of 0, as a number. Where an update is a
hundredth of its weight, weights move by 1e-5 of themselves: by 160 units of fp32's rounding, 2**-24. Tried from 0.0005 to
0.02 on small networks of every family: true gradients differ by up to 3 times this in fp32, by 0.06 in bfloat16."""

ALIKE = 0.1
"""The share of the larger gradient up to which two differ that are one. Two roundings of one size differ by 1.4 times it."""

SMALL = 1e-3
"""What rounding can be, at most, as a share of the largest gradient, each per unit of its task vectors: 1e-8 in fp32 and
1e-4 in bfloat16 on those networks. A gradient that is no smaller and yet not alike is of samples that took another way
through the network, such as to another of its experts."""


class Held:
    """Decides, remembers and keeps what is held of one merged model's coefficients.

    Args:
        merged: whose coefficients, masks left out: those have gradients of their own.
        guard: of their steps.
        wanted: whether any are held.
    """

    def __init__(self, merged: MergedModel, guard: Guard, wanted: bool = True) -> None:
        self.merged, self.guard, self.wanted = merged, guard, wanted
        self._masks: dict[nn.Parameter, Tensor] = {}
        self._loaded: dict[nn.Parameter, Tensor] | None = None

    @property
    def open(self) -> bool:
        """Returns whether the next fit has yet to decide what is held: it is wanted, and no checkpoint says it."""
        return self.wanted and self._loaded is None

    def begin(self, run: Callable[[], object] | None, device: torch.device, strategy: Strategy) -> None:
        """Holds the coefficients that a checkpoint names, or else those whose first gradient is only rounding.

        Args:
            run: computes that gradient on the merged copy; None where nothing is learned.
            device: of the merges.
            strategy: of the trainer.
        """
        made, loaded, self._loaded, self._masks = self.merged.parametrization, self._loaded, None, {}
        masks = {id(logits) for logits in made.masks().values()}
        learned = [parameter for parameter in self.merged.trained() if id(parameter) not in masks]
        if loaded is not None:
            self._masks = {parameter: mask.to(device) for parameter, mask in loaded.items()}
        elif self.wanted and made.probed and learned and run is not None:
            with strategy.precision_plugin.train_step_context():
                rounding = constant(self.merged, run, learned, 0, strategy)
            self._masks = dict(zip(learned, rounding, strict=True))
        self.guard.hold(self._masks)
        made.hold(by_group(made, self._masks) if self._masks else {})

    def state(self, named: Iterable[tuple[str, nn.Parameter]]) -> dict[str, Tensor]:
        """Returns which elements of each parameter are held, for a checkpoint."""
        return {name: self._masks[parameter].cpu() for name, parameter in named if parameter in self._masks}

    def load(self, state: Mapping[str, Tensor], named: Iterable[tuple[str, nn.Parameter]]) -> None:
        """Takes from a checkpoint which elements the next fit holds."""
        self._loaded = {parameter: state[name] for name, parameter in named if name in state}


def constant(
    merged: MergedModel,
    run: Callable[[], object],
    parameters: Sequence[nn.Parameter],
    draw: int,
    strategy: Strategy,
) -> list[Tensor]:
    """Returns which elements of parameters have a gradient that is nothing but rounding, or that nothing depends on.

    Those whose gradient is exactly 0 in a pass, such as of weights that no sample used, are not among them: another batch
    may need them, and a gradient of 0 moves nothing. Where all would be, none is: the fit begins at a place where the
    objective is flat.

    Args:
        merged: on its device.
        run: evaluates the objective on the merged copy and sends its gradient back; called first at the coefficients as
            they are, and ``PASSES`` times more.
        parameters: of the parametrization; they are as before afterwards.
        draw: number of the search's merge that is evaluated.
        strategy: of the trainer: sums over processes, which all find the same.

    Returns:
        For each parameter, as many booleans, where it is. No host waits for them.
    """
    own = _probed(merged, run, parameters, draw, strategy)
    kept, others = [parameter.detach().clone() for parameter in parameters], []
    try:
        for number in range(PASSES):
            _move(parameters, kept, number)
            others.append(_probed(merged, run, parameters, draw, strategy))
    finally:
        with torch.no_grad():
            for parameter, before in zip(parameters, kept, strict=True):
                parameter.copy_(before)
    reach = _reach(merged, parameters, draw, strategy)
    unused = [gradient == 0 for gradient in reach]
    scaled = [_largest(one) / torch.where(no, 1.0, by.abs()) for one, no, by in zip(own, unused, reach, strict=True)]
    most = SMALL * torch.stack([size.amax() for size in scaled]).amax()
    rounding = [
        torch.stack([_apart(one, other) for other in moved]).any(dim=0) & (size <= most)
        for one, size, *moved in zip(own, scaled, *others, strict=True)
    ]
    flat = torch.stack([(one | other).all() for one, other in zip(rounding, unused, strict=True)]).all()
    return [other | (one & ~flat) for one, other in zip(rounding, unused, strict=True)]


def _move(parameters: Sequence[nn.Parameter], kept: Sequence[Tensor], number: int) -> None:
    with torch.no_grad():
        for place, (parameter, before) in enumerate(zip(parameters, kept, strict=True)):
            share = MOVED * logistic((number, place), before.numel(), before.device).sigmoid().view(before.shape)
            parameter.copy_(torch.where(before == 0, share, before * (1 - share)))


def _apart(own: Tensor, moved: Tensor) -> Tensor:
    """Returns whether two gradients, neither of them 0, differ by more than ``ALIKE`` allows."""
    sizes = _largest(own), _largest(moved)
    return (_largest(own - moved) > ALIKE * torch.maximum(*sizes)) & (torch.minimum(*sizes) > 0)


def _largest(probes: Tensor) -> Tensor:
    """Returns the largest size that each element has among the probes, ``(PROBES, ...)``."""
    return probes.abs().amax(dim=0)


def _probed(
    merged: MergedModel, run: Callable[[], object], parameters: Sequence[nn.Parameter], draw: int, strategy: Strategy
) -> list[Tensor]:
    """Returns the probes of one pass, ``(PROBES, *shape)`` of each parameter, over all processes."""

    def factors(name: str, number: int, gradient: Tensor) -> Tensor:
        return logistic((name, number), gradient.numel(), gradient.device).view(gradient.shape)

    merged.merge(draw, parameters, Probes(parameters, PROBES, factors))
    run()
    return [_summed(probes, strategy) for probes in merged.gradients()]


def _reach(merged: MergedModel, parameters: Sequence[nn.Parameter], draw: int, strategy: Strategy) -> list[Tensor]:
    """Returns gradients that random ``G`` of all tensors give; 0 where no number of a model depends on a parameter."""
    parametrization, gradients = merged.parametrization, MergeGradients(parameters)
    update_of = parametrization.draw(draw)
    rank, processes = getattr(strategy, "global_rank", 0), getattr(strategy, "world_size", 1)
    for name in list(merged.task_vectors)[rank::processes]:  # each process reads its share of the deltas
        deltas = merged.task_vectors[name]
        with exact(merged.device):
            values = updates(parametrization, name, deltas, update_of=update_of, gradients=gradients)
            if linear_update(parametrization, name, update_of) is None:  # a linear one is noted without being computed
                next(values)
        numbers = logistic((name, 0), deltas.shape.numel(), merged.device)
        gradients.hand_on({name: _Given(numbers.view(deltas.shape))})
    return [_summed(gradient, strategy) for gradient in gradients.gradients({})]


class _Given(Place):
    """A place of the copy whose gradient is a given tensor."""

    @property
    def gradient(self) -> Tensor:
        """Returns the given tensor as the gradient of this place."""
        return self.tensor


def _summed(own: Tensor, strategy: Strategy) -> Tensor:
    """Returns the tensor summed over all processes."""
    reduced = strategy.reduce(own, reduce_op="sum")
    return reduced if isinstance(reduced, Tensor) else own


def by_group(parametrization: Parametrization, masks: Mapping[nn.Parameter, Tensor]) -> dict[str, Tensor]:
    """Returns booleans of parameters by group, ``(experts, coefficients of the group)``, for groups that have any."""
    kept = {parameter: parameter.detach().clone() for parameter in masks}
    with torch.no_grad():
        for parameter, mask in masks.items():
            parameter.copy_(mask)
        # raw values are views of the parameters
        by_name = {group: values == 1 for group, values in parametrization.values().items()}
        for parameter, before in kept.items():
            parameter.copy_(before)
    return by_name
