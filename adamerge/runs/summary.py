"""Summary: how far a run came and how it ended, its figures, timings and data protocol, in one file that is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Timer

from adamerge.errors import AdamergeError, CollapsedError, DivergedError
from adamerge.io.atomic import write_json
from adamerge.io.untrusted_files import read_json
from adamerge.training.costs import Costs
from adamerge.training.evaluation import average
from adamerge.training.module import MergingModule


class Summary(Callback):
    """Keeps ``summary.json``: status, figures per task, what the fit took and the data protocol.

    Args:
        folder: of the run.

    Attributes:
        plan: what the fit is expected to take, once that is known.
        stopped: how far a fit came that ended before its last step, as a sentence; empty where it did all of them.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "summary.json"
        self.plan: dict[str, Any] = {}
        self.stopped = ""
        self.costs = Costs()
        self._content: dict[str, Any] = {}
        self._metrics: dict[str, Any] = {}
        self._chosen: dict[str, float] = {}  # figures of the step that is the result, where that is not the last

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the first summary: the run is under way, with its data protocol and memory plan."""
        if isinstance(pl_module, MergingModule):
            self.costs.watch(pl_module.merged)
        if trainer.is_global_zero and isinstance(pl_module, MergingModule):
            self._content = {"protocol": pl_module.coefficients().protocol}
            if self.plan:
                self._content["plan"] = self.plan
            if self.path.is_file():
                self._go_on(trainer, read_json(self.path))
            self._write(trainer, "running", self.costs.record(pl_module.merged, True))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Counts forward passes as those of the validation split from here on."""
        self.costs.validating = True

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Counts forward passes as the search's again."""
        self.costs.validating = False

    def state_dict(self) -> dict[str, Any]:
        """Returns what the fit took so far, which a resumed one adds to."""
        return self.costs.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Adds to what the fit took up to the checkpoint."""
        self.costs.load_state_dict(state_dict)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes that the run is finished or was stopped, with the figures of the step that is the result."""
        if not isinstance(pl_module, MergingModule):
            return
        pl_module.finish()  # in every process
        took = self.costs.record(pl_module.merged, True, trainer.strategy)  # likewise
        self.costs.unwatch()
        if trainer.is_global_zero:
            self._choose(pl_module)
            if pl_module.objective is not None and pl_module.objective.taught:
                self._content["teachers"] = pl_module.teachers.report()
            ended = pl_module.result.ended
            if ended:
                self._content["ended"] = ended
                print(f"over after {trainer.global_step} of {trainer.max_steps} steps: {ended}")
            elif trainer.global_step < trainer.max_steps:
                cause = _cause(trainer)
                self.stopped = f"stopped by {cause} after {trainer.global_step} of {trainer.max_steps} steps"
                self._content["stopped"] = cause
            self._write(trainer, "stopped" if self.stopped else "finished", took)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Writes how an exception ended the run: interrupted, diverged, collapsed or failed."""
        statuses: dict[type, str] = {DivergedError: "diverged", CollapsedError: "collapsed"}
        asked = isinstance(exception, KeyboardInterrupt) or type(exception).__name__ == "SIGTERMException"
        status = "interrupted" if asked else statuses.get(type(exception), "failed")
        if trainer.is_global_zero and self._content:  # else the fit had not begun, and there is no run
            if not asked:
                self._content["error"] = exception.what if isinstance(exception, AdamergeError) else repr(exception)
            if isinstance(pl_module, MergingModule):
                pl_module.result.choose(trainer)
                if pl_module.result.choice:
                    self._choose(pl_module)
                self._write(trainer, status, self.costs.record(pl_module.merged, True))

    def _go_on(self, trainer: Trainer, before: dict[str, Any]) -> None:
        """Takes over an earlier session's figures, and records a change of the length and with it of the schedule."""
        self._metrics = before.get("metrics", {})  # a resumed run whose steps are all done measures nothing anew
        lengths, length = before.get("lengths", []), before.get("max_steps")
        if length is not None and length != trainer.max_steps:
            rates = "rebuilt for the new length" if trainer.lr_scheduler_configs else "constant"
            change = {"from": length, "to": trainer.max_steps, "after": before.get("step"), "learning_rate": rates}
            print(f"goes on to {trainer.max_steps} steps instead of {length}; learning rate: {rates}")
            lengths = [*lengths, change]
        if lengths:
            self._content["lengths"] = lengths

    def _choose(self, module: MergingModule) -> None:
        """Records the data protocol, and the figures by which the coefficients that were written were chosen."""
        self._content["protocol"] = module.coefficients().protocol
        choice = module.result.choice
        if choice.get("scores"):
            name, scores = choice["scored"], choice["scores"]
            self._chosen = {f"{name}/{task}": value for task, value in scores.items()} | {name: average(scores)}

    def _write(self, trainer: Trainer, status: str, took: dict[str, Any]) -> None:
        self._metrics |= {name: float(value) for name, value in trainer.logged_metrics.items()}
        content = {
            "status": status,
            "step": trainer.global_step,
            "max_steps": trainer.max_steps,
            **took,
            "metrics": {**self._metrics, **self._chosen},
        }
        write_json(self.path, {**content, **self._content})


def _cause(trainer: Trainer) -> str:
    """Returns what most likely ended a fit early: ``trainer.max_time`` or a callback."""
    timers = [callback for callback in trainer.callbacks if isinstance(callback, Timer)]  # type: ignore[attr-defined]
    over = [remaining <= 0 for timer in timers if (remaining := timer.time_remaining()) is not None]
    return "trainer.max_time" if any(over) else "a callback"
