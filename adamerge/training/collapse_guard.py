"""A guard against collapse: predictions that fall onto one class, or away from the experts; the last healthy step is kept."""

from __future__ import annotations

from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from adamerge.errors import CollapsedError
from adamerge.merging.merged_model import MergedModel
from adamerge.training.held_out import fallen
from adamerge.training.module import MergingModule
from adamerge.training.result import Chooser, choosers, values_of

FEWEST_SAMPLES = 4  # of a task in a batch, from which a one-sided batch means something
SURE = 3.0
"""Paired standard errors by which agreement must have fallen: of a thousand looks at what has not, one does by chance."""
TODO = "use fewer steps, a lower model.search.lr, model.penalty, or normalise the entropy"


class CollapseGuard(Callback, Chooser):
    """Ends a fit whose predictions for a task collapsed: entropy is then low and the model useless.

    Every ``every`` steps it looks at the mean over them of each task's most frequent class's share of the batch and of the
    batch's marginal entropy. A task that was one-sided from the start, as with one-class calibration data, is left alone.
    Where the data hold inputs out, it looks at predictions for these, too: a task has collapsed whose agreement with its own
    expert has fallen by more than a share of what it was at the initial coefficients, beyond chance, or whose most frequent
    class takes far more than at the initial coefficients and with the expert. Tasks of negative weight are not judged so.

    An error says then that the fit collapsed, and its result are the coefficients of the last look that found no collapse.
    Where another callback has chosen a step, such as ``KeepBest``, that is the result, and the fit is over and finished.

    Args:
        every: steps between two looks; the device is waited for only then.
        share: of the batch that one class must take.
        spread: normalised marginal entropy that must be left.
        fall: share of the first agreement that must be gone; of language models, of the probability of the expert's tokens.
            A fit that is no collapse may lose half of a task's to the others.
        excess: share of what the most frequent class did not take, at the initial coefficients or with the expert, that it
            must have got.
    """

    def __init__(
        self, every: int = 25, share: float = 0.95, spread: float = 0.1, *, fall: float = 0.75, excess: float = 0.75
    ) -> None:
        self.every, self.share, self.spread, self.fall, self.excess = every, share, spread, fall, excess
        self._forget()

    def _forget(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self._healthy: set[str] = set()
        self._steps = 0
        self._values: dict[str, torch.Tensor] = {}  # of the last look that found no collapse
        self._step = 0
        self._found: dict[str, Any] = {}

    @property
    def has_choice(self) -> bool:
        """Returns whether a collapse was found, so that the last step's coefficients are not the result."""
        return bool(self._found)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forgets the looks of an earlier fit."""
        if stage == "fit":
            self._forget()

    def state_dict(self) -> dict[str, Any]:
        """Returns what a resumed run needs: sums of predictions since the last look, and what was healthy then."""
        own = {"sums": self._sums, "healthy": sorted(self._healthy), "steps": self._steps}
        return {**own, "values": self._values, "step": self._step, "found": self._found}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues with the sums of predictions that a checkpoint holds."""
        self._sums, self._healthy = state_dict["sums"], set(state_dict["healthy"])
        self._steps = state_dict["steps"]
        # earlier versions kept no healthy coefficients
        self._values, self._step = state_dict.get("values", {}), state_dict.get("step", 0)
        self._found = state_dict.get("found", {})

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keeps the coefficients that the fit starts from, and looks at what they make of inputs that are held out."""
        if not isinstance(pl_module, MergingModule):
            return
        if pl_module.held_out.tasks(pl_module.data):
            pl_module.held_out.ask_experts(pl_module)
            if pl_module.held_out.first is None:
                pl_module.held_out.look(pl_module)
        if not self._values:
            self._keep(pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Adds the step's predictions to the sums, and judges them every ``every`` steps."""
        if not isinstance(pl_module, MergingModule):
            return
        if pl_module.data.batch_size >= FEWEST_SAMPLES:  # a sample or two are always of one class
            for task, predictions in pl_module.evaluation.spread.items():
                both = torch.stack([predictions.top_class_share(), predictions.marginal_entropy()])
                # of a checkpoint, they are on the CPU
                self._sums[task] = self._sums.get(task, torch.zeros_like(both)).to(both.device) + both
        self._steps += 1
        if self._steps % self.every == 0:
            collapse = self._of_batches(trainer) or self._of_held_out(pl_module)
            if collapse is None:
                self._keep(pl_module)
            else:
                self._end(trainer, pl_module, collapse)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Makes the last healthy coefficients the result of a fit that collapsed."""
        if isinstance(pl_module, MergingModule):
            pl_module.result.choose(trainer)

    def choose(self, merged: MergedModel) -> dict[str, Any]:
        """Puts the last healthy coefficients in place where a collapse was found."""
        if self._found:
            merged.parametrization.load_state_dict(self._values)
        return self._found

    def _of_batches(self, trainer: Trainer) -> CollapsedError | None:
        """Returns which task's predictions for the steps since the last look are of one class, if any are."""
        # every process must come to the same verdict
        reduced = {task: trainer.strategy.reduce(total, reduce_op="mean") for task, total in self._sums.items()}
        means = {task: [value / self.every for value in total.tolist()] for task, total in reduced.items()}
        self._sums = {}
        for task, (share, spread) in means.items():
            if share < self.share or spread > self.spread:
                self._healthy.add(task)
            elif task in self._healthy:
                return CollapsedError(
                    f"step {trainer.global_step}: predictions for task '{task}' collapsed onto one class",
                    expected=f"a largest class below {self.share:.0%} of a batch",
                    got=f"{share:.0%}, marginal entropy {spread:.3f} of log(classes)",
                    todo=TODO,
                )
        return None

    def _of_held_out(self, module: MergingModule) -> CollapsedError | None:
        """Returns which task's predictions for held-out inputs have left the expert's, if any have."""
        held_out, weights = module.held_out, module.merging.task_weights or {}
        tasks = [task for task in held_out.tasks(module.data) if weights.get(task, 1.0) >= 0]
        if not tasks:
            return None
        now, agreement = held_out.look(module), module.data.metric.agreement
        first, experts = held_out.first, held_out.experts
        assert first is not None and experts is not None
        for task in tasks:
            what = f"step {module.global_step}: predictions for task '{task}' collapsed"
            fall, sure = fallen(agreement, now.agreement[task], first.agreement[task])
            if fall > self.fall and not sure < SURE:
                return CollapsedError(
                    f"{what}: on held-out inputs they are no longer the expert's",
                    expected=f"at most {self.fall:.0%} less agreement than at the initial coefficients",
                    got=f"{fall:.0%} less, {sure:.1f} standard errors",
                    todo=TODO,
                )
            share, usual = now.top_class_share[task], max(first.top_class_share[task], experts.top_class_share[task])
            if share > usual + self.excess * (1 - usual):
                return CollapsedError(
                    f"{what} onto one class of held-out inputs",
                    expected=f"a largest class not far above {usual:.0%}",
                    got=f"{share:.0%}",
                    todo=TODO,
                )
        return None

    def _end(self, trainer: Trainer, module: MergingModule, collapse: CollapsedError) -> None:
        if any(chooser.has_choice for chooser in choosers(trainer) if chooser is not self):
            rank_zero_warn(f"{collapse.what}; the fit is over, and the step that was chosen is its result")
            module.result.end(trainer, collapse.what)
            return
        self._found = {
            "rule": type(self).__name__,
            "split": "calibration inputs, labels never read",
            "labelled": False,
            "step": self._step,
            "collapsed": collapse.what,
        }
        raise collapse

    def _keep(self, module: MergingModule) -> None:
        self._values, self._step = values_of(module.merged.parametrization), module.global_step
