"""Callbacks: where a fit begins, the coefficient file and heat map, and guards against collapse and runaways."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from adamerge.artifacts.coefficients import save_coefficients
from adamerge.artifacts.heatmap import draw_heatmap
from adamerge.errors import CollapsedError, ConfigError, DivergedError
from adamerge.training.module import MergingModule
from adamerge.training.tracker import hand_over

FEWEST_SAMPLES = 4  # of a task in a batch, from which a one-sided batch means something


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


class CollapseGuard(Callback):
    """Stops a fit whose predictions for a task collapsed onto one class: entropy is then low and the model useless.

    Every ``every`` steps it looks at the mean over them of each task's most frequent class's share of the batch and of the
    batch's marginal entropy. A task that was one-sided from the start, as with one-class calibration data, is left alone.

    Args:
        every: steps between two looks; the device is waited for only then.
        share: of the batch that one class must take.
        spread: normalised marginal entropy that must be left.
    """

    def __init__(self, every: int = 25, share: float = 0.95, spread: float = 0.1) -> None:
        self.every, self.share, self.spread = every, share, spread
        self._sums: dict[str, torch.Tensor] = {}
        self._healthy: set[str] = set()
        self._steps = 0

    def state_dict(self) -> dict[str, Any]:
        """Returns what a resumed run needs: the sums of predictions since the last look, and the healthy tasks."""
        return {"sums": self._sums, "healthy": sorted(self._healthy), "steps": self._steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues with the sums of predictions that a checkpoint holds."""
        self._sums, self._healthy = state_dict["sums"], set(state_dict["healthy"])
        self._steps = state_dict["steps"]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Adds the step's predictions to the sums, and judges them every ``every`` steps."""
        # a sample or two are always of one class
        if isinstance(pl_module, MergingModule) and pl_module.data.batch_size >= FEWEST_SAMPLES:
            for task, predictions in pl_module.evaluation.spread.items():
                both = torch.stack([predictions.top_class_share(), predictions.marginal_entropy()])
                # of a checkpoint, they are on the CPU
                self._sums[task] = self._sums.get(task, torch.zeros_like(both)).to(both.device) + both
        self._steps += 1
        if self._steps % self.every == 0:
            # every process must come to the same verdict
            reduced = {task: trainer.strategy.reduce(total, reduce_op="mean") for task, total in self._sums.items()}
            means = {task: [value / self.every for value in total.tolist()] for task, total in reduced.items()}
            self._sums = {}
            for task, (share, spread) in means.items():
                if share < self.share or spread > self.spread:
                    self._healthy.add(task)
                elif task in self._healthy:
                    raise CollapsedError(
                        f"step {trainer.global_step}: predictions for task '{task}' collapsed onto one class",
                        expected=f"a largest class below {self.share:.0%} of a batch",
                        got=f"{share:.0%}, marginal entropy {spread:.3f} of log(classes)",
                        todo="use fewer steps, a lower model.search.lr, model.penalty, or normalise the entropy",
                    )


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
