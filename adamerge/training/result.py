"""Result: which coefficients and buffers a fit ends with, settled once and in one order, whoever asks first."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from adamerge.data import Calibration
from adamerge.merging.merged_model import MergedModel
from adamerge.training.batchnorm import recalibrate
from adamerge.training.strategy import Strategy

if TYPE_CHECKING:
    from lightning import Trainer


class Chooser(ABC):
    """A callback of the trainer's that knows which step's coefficients are the result."""

    @abstractmethod
    def choose(self, merged: MergedModel) -> dict[str, Any]:
        """Puts the chosen step's coefficients in place.

        Returns:
            Which step it was and why, for the coefficient file and the card; empty where nothing was to be chosen from.
        """


class Result:
    """What a fit ends with: first a step is chosen, then the buffers are recomputed for its coefficients.

    Callbacks and the module ask for it when a fit ends, in whatever order Lightning calls them: the first one has it done,
    and for all of them it is the same.

    Args:
        merged: whose coefficients are learned.
        recalibrated: whether buffers are recomputed; else they are the base's.

    Attributes:
        choice: which step's coefficients these are, and why; empty where they are the last step's.
        recalibration: which data the buffers are of; empty while they are the base's.
    """

    def __init__(self, merged: MergedModel, recalibrated: bool) -> None:
        self.merged, self.recalibrated = merged, recalibrated
        self.choice: dict[str, Any] = {}
        self.recalibration: dict[str, Any] = {}
        self._chosen = False

    def begin(self) -> None:
        """Lets nothing of an earlier fit count: the buffers are the base's again."""
        self.choice, self.recalibration, self._chosen = {}, {}, False
        self.merged.replace_buffers({})

    def choose(self, trainer: Trainer) -> None:
        """Lets the trainer's ``Chooser``, if there is one, put its step's coefficients in place; once for a fit."""
        if self._chosen:
            return
        self._chosen = True
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        for callback in callbacks:
            if isinstance(callback, Chooser):
                self.choice = callback.choose(self.merged)

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
