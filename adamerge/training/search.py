"""Search: the contract of how coefficients are learned; each of its steps is one that Lightning counts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from adamerge.backbones import Batch
from adamerge.parametrizations import Parametrization

if TYPE_CHECKING:
    from adamerge.training.search_step import SearchStep


class Learner(Protocol):
    """Has the parameters of a search: a merged model, or its parametrization alone where there is no network."""

    @property
    def parametrization(self) -> Parametrization:
        """Returns what holds the coefficients."""

    def trained(self) -> list[nn.Parameter]:
        """Returns the parameters of the parametrization that are not frozen."""


class Search(ABC):
    """How coefficients are learned: what one step evaluates, and how it moves them.

    The constructor takes the search's numbers; a module then makes a copy of the search and ``begin``s it, so that one
    object can serve several modules. Each step moves the coefficients through exactly one optimiser step that Lightning
    counts, also where there are no gradients: the trainer's number of steps, checkpoints and the order of data hang on it.

    Attributes:
        automatic: whether ``step`` returns a scalar of which Lightning takes the gradient, and the optimiser step after it;
            else ``step`` moves the coefficients itself, and ends with ``SearchStep.count``.
        penalised: whether ``step`` adds ``model.penalty`` to what it minimises; a penalty is refused where it does not.
        uses_gradients: whether the objective's gradient is asked for. Where it is not, no coefficient is held at its initial
            value for want of a gradient, and the search itself must refuse values that are not finite.
    """

    automatic: bool = True
    penalised: bool = True
    uses_gradients: bool = True

    @abstractmethod
    def begin(self, merged: Learner) -> None:
        """Takes the parameters to be learned, at the values where a fit begins; nothing has been merged yet.

        Raises:
            ConfigError: the parametrization has not what this search learns.
        """

    def check(self, steps: int, batch_size: int, processes: int = 1) -> None:
        """Refuses a fit that the search's own numbers do not go with, before anything is written.

        Args:
            steps: of the fit.
            batch_size: samples per task and step, over all processes.
            processes: of the run; 1 where that is not known yet.

        Raises:
            ConfigError: they do not.
        """
        return

    @abstractmethod
    def optimizers(self, steps: int) -> list[tuple[Optimizer, LRScheduler | None]]:
        """Makes the optimisers of a fit of so many steps, each with the schedule of its rate; the last one's steps count.

        Where ``automatic`` there is one. As torch's optimisers do, their ``step`` calls the closure that it is given:
        Lightning runs its hooks there, and the guard against values that are not finite is one of them.
        """

    def first_batch(self, batch: Mapping[str, Batch]) -> Mapping[str, Batch]:
        """Returns what of a step's batch the first gradient of the step is computed on; it tells what can be held."""
        return batch

    @abstractmethod
    def step(self, step: SearchStep, batch: Mapping[str, Batch]) -> Tensor | None:
        """Takes one step of the search, with one optimiser step that counts.

        Args:
            step: the operations that a step is made of.
            batch: of every task.

        Returns:
            Where ``automatic``, the scalar whose gradient moves the coefficients; else None.
        """

    def state_dict(self) -> dict[str, Any]:
        """Returns what a resumed fit must know beside coefficients and optimisers: tensors and plain data."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from a ``state_dict``; called after ``begin``, and only where a checkpoint has one."""
        return
