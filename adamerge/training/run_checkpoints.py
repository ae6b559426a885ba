"""Checkpoints of a run: written whole or not at all, and also of the last finished step when a fit ends early."""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, Timer
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities.exceptions import SIGTERMException

import adamerge
from adamerge.errors import CheckpointError
from adamerge.io.atomic import staged_file
from adamerge.io.versions import refuse_later

WRITER = "adamerge_version"  # key of a checkpoint, beside Lightning's own


class AtomicCheckpoints(TorchCheckpointIO):
    """Writes checkpoints beside their target, syncs and renames them; a corrupt one is an error that names the file."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Writes the checkpoint so that its file appears whole or not at all."""
        # of a full disk torch says so only through a file that it was given open
        with staged_file(Path(path)) as temporary, temporary.open("wb") as file:
            torch.save({**checkpoint, WRITER: adamerge.__version__}, file)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Reads a checkpoint file without executing anything in it."""
        try:
            loaded: dict[str, Any] = torch.load(path, map_location=map_location or "cpu", weights_only=True)
        except Exception as error:
            # torch's own advice, of which there is more than a line, is to trust the file
            reason = (str(error).strip() or type(error).__name__).splitlines()[0].partition(". Re-running")[0][:200]
            raise CheckpointError(f"{path} is corrupt or not a checkpoint of a run: {reason}") from error
        refuse_later(loaded.get(WRITER), path, CheckpointError)
        return loaded


class StepCheckpoints(ModelCheckpoint):
    """Adds to Lightning's checkpoints one of the last finished step when the fit or the process is asked to end.

    A first interrupt from the keyboard waits for the end of the step, as SIGTERM does, and a second one does not. Of several
    processes each may be asked at another step, and they end where they are.

    Attributes:
        interrupted: whether it was the keyboard that asked.
    """

    interrupted = False
    _default: Any = None  # what an interrupt did before
    _alone = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lets interrupts wait for the end of a step, from here on."""
        super().on_train_start(trainer, pl_module)
        self._alone = trainer.world_size == 1
        if self._alone and threading.current_thread() is threading.main_thread():
            self._default = signal.signal(signal.SIGINT, self._interrupt)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Puts a fit that was over, and has more steps now, back into its one pass, after the step it did last."""
        loops = checkpoint["loops"]["fit_loop"]
        batches, epochs = loops["epoch_loop.batch_progress"], loops["epoch_progress"]
        if checkpoint["global_step"] < trainer.max_steps and batches["is_last_batch"]:
            batches["is_last_batch"] = False
            for count in ("total", "current"):
                batches[count]["completed"] = batches[count]["ready"] - 1
                epochs[count] |= {"ready": 1, "started": 1, "processed": 0, "completed": 0}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Writes a checkpoint also after a step that a callback made the last; a resumed fit goes on from it."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if trainer.should_stop and not self._should_skip_saving_checkpoint(trainer):
            candidates = self._monitor_candidates(trainer)
            self._save_topk_checkpoint(trainer, candidates)
            self._save_last_checkpoint(trainer, candidates)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lets interrupts act at once again, since there are no more steps to wait for."""
        super().on_train_end(trainer, pl_module)
        self._restore()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Writes a checkpoint when the process is asked to end, where no step is half done."""
        self._restore()
        if self._alone and isinstance(exception, SIGTERMException):
            self.save_on_exception = True
            super().on_exception(trainer, pl_module, exception)

    def _interrupt(self, number: int, frame: Any) -> None:
        self.interrupted = True
        self._restore()
        print("stopping after this step; once more stops now", file=sys.stderr)
        os.kill(os.getpid(), signal.SIGTERM)  # for which the trainer waits until the step has ended

    def _restore(self) -> None:
        if self._default is not None:
            signal.signal(signal.SIGINT, self._default)
            self._default = None


class SessionTimer(Timer):
    """Ends a fit, after the step that it is in, when its time is over; a resumed run has all of the time again.

    Args:
        duration: ``DD:HH:MM:SS``, or what ``datetime.timedelta`` is made of: ``trainer.max_time``.
    """

    def __init__(self, duration: Any) -> None:
        super().__init__(duration, interval="step", verbose=False)

    def state_dict(self) -> dict[str, Any]:
        """Returns no state: else a run that ended because of its time would do so again at once."""
        return {}
