"""Keeping the best step: which step's coefficients are a fit's result, by a rule and looks now and then; else the last's."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

from adamerge.errors import ConfigError
from adamerge.merging.merged_model import MergedModel
from adamerge.training.module import MergingModule
from adamerge.training.result import Chooser, values_of
from adamerge.training.selection import Selection


class KeepBest(Callback, Chooser):
    """Looks now and then at inputs that no step sees, and lets the best step's coefficients be the fit's result.

    It looks before the first step, so that a fit never ends worse than it began, after each ``every`` steps and after the
    last. What is best, and whether labels are read for it, is up to the selection. The coefficient file and ``summary.json``
    say which step was chosen, by what, and whether labels were read.

    Args:
        selection: what is best; of equals, the earliest.
        every: steps between two looks.
        patience: looks in a row without a better step after which the fit is over; it does all of its steps when None.

    Raises:
        ConfigError: a number is below 1; in use: the data have not what the selection looks at.
    """

    def __init__(self, selection: Selection, every: int = 10, patience: int | None = None) -> None:
        for name, value in (("every", every), ("patience", patience)):
            if value is not None and value < 1:
                raise ConfigError(f"KeepBest: {name} must be at least 1, got {value}")
        self.selection, self.every, self.patience = selection, every, patience
        self._forget()

    def _forget(self) -> None:
        self._seen = self.selection.looked_at()
        self._best: dict[str, Any] = {}
        self._values: dict[str, torch.Tensor] = {}
        self._last: dict[str, torch.Tensor] = {}  # the last step's coefficients, while the best ones are validated
        self._looks = self._since = 0

    @property
    def validates(self) -> bool:
        """Returns whether the labelled validation split is looked at."""
        return self.selection.looked_at().labelled

    @property
    def has_choice(self) -> bool:
        """Returns whether there is a step that may be chosen."""
        return bool(self._best)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forgets the looks of an earlier fit, and refuses data that have nothing to look at."""
        if stage == "fit":
            self._forget()
            module = _merging(pl_module)
            self._seen.check(module, type(self.selection).__name__)
            self.selection.check(module.data.fitted, module.merging.task_weights or {})

    def state_dict(self) -> dict[str, Any]:
        """Returns what a resumed run needs: the best step so far, its coefficients, and the scores to compare with."""
        own = {"best": self._best, "values": self._values, "looks": self._looks, "since": self._since}
        return {**self._seen.state_dict(), **own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues with the best step that a checkpoint holds."""
        self._seen.load_state_dict(state_dict)
        self._best, self._values, self._looks = state_dict["best"], state_dict["values"], state_dict["looks"]
        self._since = state_dict.get("since", 0)  # earlier versions had no patience

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finds out what looks are compared with, and looks at the coefficients that the fit starts from."""
        self._seen.begin(_merging(pl_module))
        if self._looks == 0:
            self._look(_merging(pl_module))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Looks at the step before its checkpoint is written, so that a resumed run chooses among the same steps."""
        if trainer.global_step % self.every == 0 or trainer.global_step == trainer.max_steps:
            self._look(_merging(pl_module))
            # each process has looked for itself, and all must stop at once
            over = self.patience is not None and trainer.strategy.broadcast(self._since >= self.patience)
            if over:
                _merging(pl_module).result.end(trainer, f"{self.patience} looks in a row found no better step")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Has the best step's coefficients validated when the fit is over, for they are its result."""
        over = trainer.global_step >= trainer.max_steps or trainer.should_stop
        if trainer.state.fn == "fit" and over and self._best:
            parametrization = _merging(pl_module).merged.parametrization
            self._last = values_of(parametrization)
            parametrization.load_state_dict(self._values)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Puts the last step's coefficients back: a checkpoint is of them, and a longer fit goes on from there."""
        if self._last:
            _merging(pl_module).merged.parametrization.load_state_dict(self._last)
            self._last = {}

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Makes the best step so far the result of a fit that ends early, too."""
        if isinstance(pl_module, MergingModule):
            pl_module.result.choose(trainer)

    def choose(self, merged: MergedModel) -> dict[str, Any]:
        """Puts the best step's coefficients in place; where no step may be chosen, the last one's stand."""
        if not self._looks:
            return {}
        if not self._best:
            warnings.warn(f"{type(self.selection).__name__}: no step may be chosen; the last one stands", stacklevel=2)
        else:
            merged.parametrization.load_state_dict(self._values)
        return {
            "rule": type(self.selection).__name__,
            "split": self._seen.split,
            "labelled": self._seen.labelled,
            "looks": self._looks,
            **(self._best or {"step": None}),
        }

    def _look(self, module: MergingModule) -> None:
        look = self._seen.look(module)
        value = self.selection.value(look)
        self._looks, self._since = self._looks + 1, self._since + 1
        if value is not None and math.isfinite(value) and (not self._best or value > self._best["value"]):
            self._best = {
                "step": module.global_step,
                "value": value,
                "scored": self._seen.name(module),
                "scores": dict(look.scores),
            }
            self._values, self._since = values_of(module.merged.parametrization), 0


def _merging(module: LightningModule) -> MergingModule:
    if not isinstance(module, MergingModule):
        raise ConfigError(
            "KeepBest chooses among merging coefficients", expected="a MergingModule", got=type(module).__name__
        )
    return module
