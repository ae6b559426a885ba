"""Task arithmetic before anything is learned: negation, scaling, and sums of task vectors as one expert."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from adamerge.deltas.base import Deltas
from adamerge.errors import ConfigError
from adamerge.transforms.base import State, Transform


class Scale(Transform):
    """``tau_k -> f_k tau_k``; -1 negates a task vector, to learn how much of a task should be forgotten.

    Args:
        factors: expert name to its factor; the others keep 1.

    Raises:
        ConfigError: an expert has no task vector.

    Reference: Editing Models with Task Arithmetic (Ilharco et al., 2023), https://arxiv.org/abs/2212.04089.
    """

    def __init__(self, factors: Mapping[str, float] | None = None) -> None:
        self.factors = {name: float(factor) for name, factor in (factors or {}).items()}

    def experts(self, names: Sequence[str]) -> tuple[str, ...]:
        """Returns the experts' names, which stay as they are."""
        _refuse_unknown("Scale", self.factors, names)
        return tuple(names)

    def deltas(self, name: str, deltas: Deltas, state: State, experts: Sequence[str]) -> Deltas:
        """Returns each expert's deltas times its factor; factors of low rank stay factors."""
        return deltas.mapped(torch.diag(torch.tensor([self.factors.get(expert, 1.0) for expert in experts])))


class Combine(Transform):
    """New experts that are sums of the old ones: ``{"d": {"a": -1, "b": 1, "c": 1}}`` is the analogy a : b = c : d.

    Args:
        sums: name of each new expert to the old experts in it and their factors; the old ones are gone, unless they are
            among the new ones. Without any, the experts stay as they are.

    Raises:
        ConfigError: a sum is empty, or names an expert that has no task vector.

    Reference: Editing Models with Task Arithmetic (Ilharco et al., 2023), https://arxiv.org/abs/2212.04089, section 5.
    """

    def __init__(self, sums: Mapping[str, Mapping[str, float]] | None = None) -> None:
        self.sums = {new: {old: float(f) for old, f in parts.items()} for new, parts in (sums or {}).items()}
        for new, parts in self.sums.items():
            if not parts:
                raise ConfigError(f"Combine: '{new}' is a sum of nothing", expected="{expert: factor, ...}", got="{}")

    def experts(self, names: Sequence[str]) -> tuple[str, ...]:
        """Returns the names of the new experts, in the order of the sums."""
        for parts in self.sums.values():
            _refuse_unknown("Combine", parts, names)
        return tuple(self.sums) or tuple(names)

    def deltas(self, name: str, deltas: Deltas, state: State, experts: Sequence[str]) -> Deltas:
        """Returns the sums of the experts' deltas; sums of low-rank factors stay factors."""
        if not self.sums:
            return deltas
        rows = [[parts.get(expert, 0.0) for expert in experts] for parts in self.sums.values()]
        return deltas.mapped(torch.tensor(rows))


def _refuse_unknown(who: str, given: Mapping[str, float], names: Sequence[str]) -> None:
    unknown = [name for name in given if name not in names]
    if unknown:
        raise ConfigError(f"{who}: there is no expert '{unknown[0]}'", expected=f"one of {list(names)}", got=unknown[0])
