"""Teachers: the contract of where the experts' outputs come from, and how they get into the batches of a fit."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar

from adamerge.backbones import Batch
from adamerge.data.batch_order import Steps
from adamerge.data.teacher_outputs import Teach
from adamerge.errors import ConfigError
from adamerge.io.dtypes import torch_dtype
from adamerge.merging.merged_model import MergedModel
from adamerge.training.strategy import Strategy

Show = Callable[[str, Batch], Batch]
"""Task and its samples of a step, on the device of the merged model, to what the network sees of them: their views."""


class Teachers(ABC):
    """Outputs of each task's own expert: what the merged model is to do on the inputs that it sees.

    Args:
        top: keep the largest logits alone, so many of them; all when None.
        dtype: of the kept logits, less their largest where it is narrower than the network's; None for the network's own.

    Attributes:
        changing: whether inputs may be others at each step, as views are; else each sample is run once.

    Raises:
        ConfigError: a number is out of range, or an unknown dtype.
    """

    changing: ClassVar[bool]

    def __init__(self, top: int | None = None, dtype: str | None = None) -> None:
        if top is not None and top < 2:
            raise ConfigError(
                f"{type(self).__name__}: top must be at least 2, got {top}: one class has no distribution"
            )
        if dtype is not None:
            torch_dtype(dtype, type(self).__name__)
        self.top, self.dtype = top, dtype
        self.forwards: dict[str, int] = {}
        self.seconds = 0.0

    @abstractmethod
    def begin(
        self,
        merged: MergedModel,
        steps: Steps,
        hidden: Sequence[float],
        *,
        show: Show,
        batch_size: int,
        strategy: Strategy,
        default_folder: Path,
    ) -> None:
        """Gets ready for a fit; the network may be filled with whatever model afterwards.

        Args:
            merged: with heads, on its device.
            steps: of the fit.
            hidden: numbers of the hidden states to keep, or shares of the depth.
            show: what the network sees of a task's samples of a step.
            batch_size: samples per forward pass.
            strategy: of the trainer: its precision, and the other processes.
            default_folder: for what is kept in files that have no folder of their own.

        Raises:
            ConfigError: there is no such hidden state.
        """

    @abstractmethod
    def of_samples(self) -> Teach | None:
        """Returns what the data loader puts into the batches, by sample; None where only ``taught`` knows the outputs."""

    @abstractmethod
    def taught(self, batch: Mapping[str, Batch]) -> dict[str, Batch]:
        """Returns a step's batch of every task with the experts' outputs in it, before the step merges.

        Args:
            batch: as the network sees it, on its device.
        """

    @abstractmethod
    def in_memory(self) -> Teachers:
        """Returns empty teachers of the same settings, which keep outputs in memory."""

    def told(self) -> str:
        """Returns what the experts' passes are going to cost, a line for people; empty where ``begin`` has done all."""
        return ""

    @abstractmethod
    def report(self) -> dict[str, Any]:
        """Returns forward passes of this process and seconds, for the summary."""

    def state_dict(self) -> dict[str, Any]:
        """Returns what a resumed fit must know, plain data."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Has the next ``begin`` go on as a checkpoint says."""
        return


def forward_context(strategy: Strategy) -> AbstractContextManager[Any]:
    """Returns the fit's own precision as a context, so that an expert merged with itself has a distance of 0."""
    context: AbstractContextManager[Any] = strategy.precision_plugin.forward_context()
    return context
