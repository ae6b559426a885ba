"""Costs: what a fit takes: seconds, forward passes, peak memory and the number of scalars that it learns."""

from __future__ import annotations

import resource
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from adamerge.backbones.inputs import count
from adamerge.merging.merged_model import MergedModel
from adamerge.training.strategy import Strategy

KINDS = ("merged", "experts", "validation")
"""Whose forward passes are counted apart: of the merged model in the search, of whole models such as experts that teach it,
and of looks at the validation split."""
_PEAK = Path("/proc/self/clear_refs")  # writing a 5 sets the peak of resident memory to what is resident now


class Costs:
    """Counts what a fit takes from where it is made; a resumed fit adds to what it took up to its checkpoint.

    A forward pass is one sample through the network once. They are counted where they are asked for, by the shapes of the
    batches alone, so that no device is waited for; a backward pass, and what activation checkpointing runs again, is not one.

    Attributes:
        passes: forward passes of this process by kind.
        validating: whether what runs now is a look at the validation split.
    """

    def __init__(self) -> None:
        self.passes: dict[str, int] = dict.fromkeys(KINDS, 0)
        self.validating = False
        self._start, self._before = time.monotonic(), 0.0
        self._hook: RemovableHandle | None = None
        with suppress(OSError):  # elsewhere than on Linux the peak is that of the process
            _PEAK.write_text("5")
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    @property
    def seconds(self) -> float:
        """Returns the seconds since the costs were made, and those of the earlier sessions of a resumed fit."""
        return self._before + time.monotonic() - self._start

    def watch(self, merged: MergedModel) -> None:
        """Counts the forward passes of a merged model from here on."""
        self.unwatch()
        self._hook = merged.register_forward_pre_hook(self._count)

    def unwatch(self) -> None:
        """Counts no further passes."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def state_dict(self) -> dict[str, Any]:
        """Returns what a resumed fit adds to: the seconds and passes so far."""
        return {"seconds": self.seconds, "passes": dict(self.passes)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Begins with what an earlier session of the fit took, up to the checkpoint that is gone on from."""
        self._before, self._start = state["seconds"], time.monotonic()
        self.passes |= state["passes"]

    def record(self, merged: MergedModel, learned: bool, strategy: Strategy | None = None) -> dict[str, Any]:
        """Returns the costs for a run's summary.

        Args:
            merged: whose parameters are learned.
            learned: whether any are; a method without an objective has the same parameters, and learns none.
            strategy: of the trainer, all of whose processes come here; the passes are this process's when None.
        """
        passes = torch.tensor([self.passes[kind] for kind in KINDS])
        if strategy is not None:
            passes = strategy.reduce(passes.to(strategy.root_device), reduce_op="sum")
        vectors = merged.task_vectors
        scalars = sum(parameter.numel() for parameter in merged.trained()) if learned else 0
        peaks = {"peak_host_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}
        if torch.cuda.is_available():
            peaks["peak_device_bytes"] = torch.cuda.max_memory_allocated()
        return {
            "seconds": round(self.seconds, 3),
            "forward_passes": dict(zip(KINDS, passes.tolist(), strict=True)),
            "learned": {"scalars": scalars, "of": sum(vectors.shape(name).numel() for name in vectors)},
            **peaks,
        }

    def _count(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        assert isinstance(module, MergedModel)
        kind = "validation" if self.validating else "experts" if module.is_one_model else "merged"
        self.passes[kind] += count(arguments[0])
