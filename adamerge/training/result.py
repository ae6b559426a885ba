"""Result: which coefficients and buffers a fit ends with, settled once and in one order, whoever asks first."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from adamerge.data import Calibration
from adamerge.merging.merged_model import MergedModel
from adamerge.parametrizations import Parametrization
from adamerge.training.batchnorm import recalibrate
from adamerge.training.strategy import Strategy

if TYPE_CHECKING:
    from lightning import Trainer


class Chooser(ABC):
    """A callback of the trainer's that knows which step's coefficients are the result."""

    @property
    def has_choice(self) -> bool:
        """Returns whether there is a step that it would choose now."""
        return True

    @abstractmethod
    def choose(self, merged: MergedModel) -> dict[str, Any]:
        """Puts the chosen step's coefficients in place.

        Returns:
            Which step it was and why, for the coefficient file and the card; empty where nothing was to be chosen from.
        """


def choosers(trainer: Trainer) -> list[Chooser]:
    """Returns the callbacks of a trainer that know which step's coefficients are the result."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if isinstance(callback, Chooser)]


def values_of(parametrization: Parametrization) -> dict[str, Tensor]:
    """Returns a copy of all values of a parametrization, on the CPU, for its ``load_state_dict``."""
    return {name: value.detach().cpu().clone() for name, value in parametrization.state_dict().items()}


class Result:
    """What a fit ends with: first a step is chosen, then the buffers are recomputed for its coefficients.

    Callbacks and the module ask for it when a fit ends, in whatever order Lightning calls them: the first one has it done,
    and for all of them it is the same.

    Args:
        merged: whose coefficients are learned.
        recalibrated: whether buffers are recomputed; else they are the base's.

    Attributes:
        choice: which step's coefficients these are, and why; empty where they are the last step's.
        ended: why the fit is over for good before its last step; empty where it is not.
        recalibration: which data the buffers are of; empty while they are the base's.
    """

    def __init__(self, merged: MergedModel, recalibrated: bool) -> None:
        self.merged, self.recalibrated = merged, recalibrated
        self.choice: dict[str, Any] = {}
        self.recalibration: dict[str, Any] = {}
        self.ended = ""
        self._chosen = False

    def begin(self) -> None:
        """Lets nothing of an earlier fit count: the buffers are the base's again."""
        self.choice, self.recalibration, self.ended, self._chosen = {}, {}, "", False
        self.merged.replace_buffers({})

    def state_dict(self) -> dict[str, Any]:
        """Returns whether the fit is over for good, and why."""
        return {"ended": self.ended}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Has a fit that was over stay so when it is resumed."""
        self.ended = state["ended"]

    def end(self, trainer: Trainer, why: str) -> None:
        """Ends the fit after this step, for good: a resumed one, with more steps too, has nothing left to do.

        Args:
            trainer: of the fit; all of its processes come here.
            why: for the summary, as what has happened.
        """
        self.ended = self.ended or why
        trainer.should_stop = True

    def choose(self, trainer: Trainer) -> None:
        """Lets one ``Chooser`` of the trainer's, if there is any, put its step's coefficients in place; once for a fit.

        It is the first that has a choice, in the order of the callbacks.
        """
        if self._chosen:
            return
        self._chosen = True
        for chooser in sorted(choosers(trainer), key=lambda one: not one.has_choice):
            self.choice = chooser.choose(self.merged)
            if self.choice:
                return

    def recalibrate(self, data: Calibration, strategy: Strategy) -> None:
        """Recomputes the buffers for the coefficients as they are, where that is wanted and not done yet.

        Args:
            data: that the coefficients were learned on.
            strategy: of the trainer; every process comes here.

        Raises:
            DivergedError: the merged network computes what is not finite.
        """
        if self.recalibrated and not self.recalibration:
            self.merged.to(strategy.root_device)  # after a fit the trainer has moved all to the CPU
            self.recalibration = recalibrate(self.merged, data, strategy)
            self.merged.cpu()
