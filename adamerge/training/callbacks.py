"""Callbacks: where a fit begins, the coefficient file and heat map, and a guard against runaways."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from adamerge.artifacts.coefficients import save_coefficients
from adamerge.artifacts.heatmap import draw_heatmap
from adamerge.errors import ConfigError, DivergedError
from adamerge.training.module import MergingModule
from adamerge.training.tracker import hand_over


class Beginning(Callback):
    """Calls when a fit begins: model, data and optimisers are set up, and nothing has been computed yet.

    Args:
        begin: called with the trainer, in every process.
    """

    def __init__(self, begin: Callable[[Trainer], None]) -> None:
        self.begin = begin

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Calls the function that the callback was made with."""
        self.begin(trainer)


class CoefficientFile(Callback):
    """Writes ``coefficients.safetensors`` when the fit ends, however it ends, and gives it to wandb as an artifact.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "coefficients.safetensors"

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Settles the result, writes, draws and logs it; also when a resumed run has no step left to do."""
        if not isinstance(pl_module, MergingModule):
            return
        pl_module.finish()  # in every process
        if trainer.is_global_zero:
            coefficients = pl_module.coefficients()
            save_coefficients(coefficients, self.path)
            heatmap = self.path.with_name("heatmap.png")
            title = f"Merging coefficients after {coefficients.step} steps"
            draw_heatmap(
                coefficients.table(),
                heatmap,
                title,
                held=coefficients.held_table(),
                masks=coefficients.mask_table(),
                order=pl_module.merged.order,
            )
            hand_over(trainer.loggers, coefficients, self.path, heatmap)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Writes the last good coefficients when a fit ends by an error."""
        if trainer.is_global_zero and isinstance(pl_module, MergingModule) and trainer.global_step > 0:
            pl_module.result.choose(trainer)
            save_coefficients(pl_module.coefficients(), self.path)


class RunawayGuard(Callback):
    """Warns when a coefficient's size passes ``bound``, and stops the fit at ``STOP`` times as much.

    Sizes are factors of task vectors; where coefficients are of rows or elements, that of a tensor's task vector as a whole.

    Args:
        bound: the largest size of a coefficient that is thought sound.
        every: steps between two looks, and one at the end; the device is waited for only then.

    Raises:
        ConfigError: one of them is not positive.
    """

    STOP = 10

    def __init__(self, bound: float = 10.0, every: int = 25) -> None:
        if not (bound > 0 and every > 0):
            raise ConfigError("RunawayGuard: bound and every must be positive", got=f"bound={bound}, every={every}")
        self.bound, self.every = bound, every
        self._told = False

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Looks at the largest coefficient every ``every`` steps."""
        if (batch_idx + 1) % self.every == 0:
            self._look(trainer.global_step, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Looks at the largest coefficient that the fit ends with."""
        self._look(trainer.global_step, pl_module)

    def _look(self, step: int, module: LightningModule) -> None:
        if not isinstance(module, MergingModule):
            return
        groups = module.merged.parametrization.sizes()
        largest, at = torch.stack([own.amax() for own in groups.values()]).max(dim=0)
        size = float(largest)
        if not size > self.bound:
            return
        group = list(groups)[int(at)]
        expert = module.merged.task_vectors.experts[int(groups[group].argmax())]
        what = f"step {step}: a coefficient ran away: of expert '{expert}' for '{group}', {size:.4g} in size"
        todo = (
            "lower model.search.lr or constrain the coefficients; if they are meant, set RunawayGuard.bound in "
            "trainer.callbacks"
        )
        if size > self.STOP * self.bound:
            raise DivergedError(what, expected=f"at most {self.bound:g}", got=f"{size:.4g}", todo=todo)
        if not self._told:
            rank_zero_warn(f"{what}, more than {self.bound:g}: {todo}")
            self._told = True
