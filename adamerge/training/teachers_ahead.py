"""Teachers that run ahead: every n steps each expert is filled once and runs the next n steps' inputs, whatever they are."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adamerge.backbones import Batch, Teacher
from adamerge.backbones.inputs import join_tensors
from adamerge.data.batch_order import Steps
from adamerge.data.loaders import on_device
from adamerge.data.teacher_outputs import narrowed
from adamerge.errors import ConfigError
from adamerge.merging.merged_model import MergedModel
from adamerge.task_vectors.memory import Available, size
from adamerge.training.length_groups import grouped
from adamerge.training.strategy import Strategy
from adamerge.training.teachers import Show, Teachers, forward_context

SHARE = 0.125
"""Of the memory that is available where the network runs when a fit begins: deltas and activations come on top."""

UNKNOWN = 1 << 30
"""Bytes that outputs may take where the system does not say what is available."""


class TeachersAhead(Teachers):
    """Outputs of the experts for inputs that change at every step, such as views of the samples.

    The steps are cut into spans of n, counted from step 0. Before the first step of a span each task's expert is filled once
    into the network and runs what that task's samples will look like in the span's steps; the next merge makes the network
    the merged model again. Each step's samples of a task are passes of their own, of the same shapes in every step, so that
    n changes no bit of a fit; it only decides how often an expert is filled, and how much memory the outputs take. They stay
    on the device of the network until their step is over, and no host waits for them. A resumed fit runs what is left of
    the span it falls into again.

    Args:
        every: n; as many steps as go into ``memory`` when None. A resumed fit keeps the number that it began with.
        memory: bytes that the outputs of n steps may take; an eighth of what is available when a fit begins, when None.
        top: keep the largest logits alone, so many of them; all when None.
        dtype: of the kept logits, less their largest where it is narrower than the network's; None for the network's own.

    Raises:
        ConfigError: a number is out of range, or an unknown dtype.
    """

    changing = True

    def __init__(
        self, every: int | None = None, memory: int | None = None, *, top: int | None = None, dtype: str | None = None
    ) -> None:
        super().__init__(top, dtype)
        for name, value in (("every", every), ("memory", memory)):
            if value is not None and value < 1:
                raise ConfigError(f"TeachersAhead: {name} must be at least 1, got {value}")
        self.every, self.memory = every, memory
        self.fills = 0
        self._begun: int | None = None  # n of the run that a checkpoint is of
        self._fit: _Fit | None = None
        self._kept: dict[int, dict[str, Teacher]] = {}  # by step

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
        """Decides how far to run ahead; what the merged model makes of one step tells the size of the outputs."""
        self.forwards, self.fills, self.seconds, self._kept = dict.fromkeys(steps.samples, 0), 0, 0.0, {}
        fit = self._fit = _Fit(merged, steps, tuple(hidden), show, batch_size, strategy, 1, 0, 0)
        every, self._begun = self._begun or self.every, None
        if every is None:
            with torch.no_grad():
                merged.merge(0)  # what the fit keeps on the device is there when the memory is looked at
            nbytes = max(1, sum(_nbytes(self._outputs(fit, task, 0)) for task in steps.samples))
            budget = self._budget(merged.device)
            every = strategy.broadcast(max(1, min(budget // nbytes, steps.total)))
            fit = fit._replace(nbytes=nbytes, budget=budget)
        self._fit = fit._replace(every=every)

    def of_samples(self) -> None:
        """Returns None: a sample looks otherwise at each step."""
        return

    def taught(self, batch: Mapping[str, Batch]) -> dict[str, Batch]:
        """Returns the step's batch with the experts' outputs; at the first step of a span all experts run before."""
        assert self._fit is not None, "begin() comes first"
        number = next(iter(batch.values())).step
        self._kept = {step: kept for step, kept in self._kept.items() if step >= number}
        if number not in self._kept:
            self._run_ahead(self._fit, number)
        return {task: part._replace(teacher=self._kept[number][task]) for task, part in batch.items()}

    def in_memory(self) -> TeachersAhead:
        """Returns teachers of the same settings: nothing of them stays anyway."""
        return TeachersAhead(self.every, self.memory, top=self.top, dtype=self.dtype)

    def told(self) -> str:
        """Returns how far the experts run ahead, what that costs in each step, and what it takes in memory."""
        if self._fit is None:
            return ""
        steps, n, tasks = self._fit.steps, self._fit.every, len(self._fit.steps.samples)
        samples = tasks * steps.batch_size
        line = (
            f"teachers run ahead: every {n} steps each of {tasks} experts is filled once, {tasks / n:.2g} fillings a step, "
            f"and runs its samples of the next {n}; a step of {samples} samples costs {samples} expert forward passes on top"
        )
        if self._fit.nbytes:
            whence = "of model.teachers.memory" if self.memory else f"that are 1/{1 / SHARE:.0f} of what is available"
            line += (
                f"; outputs take {size(self._fit.nbytes)} a step, {size(n * self._fit.nbytes)} at once of the "
                f"{size(self._fit.budget)} {whence}"
            )
        return line

    def report(self) -> dict[str, Any]:
        """Returns n, forward passes and fillings of this process, and seconds as the host saw them."""
        every = None if self._fit is None else self._fit.every
        return {"every": every, "forwards": self.forwards, "fills": self.fills, "seconds": round(self.seconds, 3)}

    def state_dict(self) -> dict[str, Any]:
        """Returns n, which depends on the memory that there was."""
        return {} if self._fit is None else {"every": self._fit.every}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Has the next fit run as far ahead as the one that is gone on with."""
        self._begun = state.get("every")

    def _budget(self, device: torch.device) -> int:
        if self.memory is not None:
            return self.memory
        there = Available.on(device)
        available = there.device if device.type == "cuda" else there.host
        return UNKNOWN if available is None else int(SHARE * available)

    def _run_ahead(self, fit: _Fit, number: int) -> None:
        """Fills each expert once and keeps its outputs for this step and those after it in its span."""
        start = time.monotonic()
        span = range(number, min((number // fit.every + 1) * fit.every, fit.steps.total))
        self._kept = {step: {} for step in span}
        for task in fit.steps.samples:
            fit.merged.fill_expert(task)
            self.fills += 1
            for step in span:
                self._kept[step][task] = self._outputs(fit, task, step)
                self.forwards[task] += len(self._kept[step][task].logits)
        self.seconds += time.monotonic() - start

    def _outputs(self, fit: _Fit, task: str, step: int) -> Teacher:
        """Returns what the network as it is filled makes of a task's samples of a step."""
        part = fit.show(task, on_device(fit.steps.part(task, step), fit.merged.device))
        groups, parts = grouped({task: part}, fit.batch_size, fit.merged), []
        with torch.no_grad(), forward_context(fit.strategy):
            for inputs, _ in groups.passes():
                encoded = fit.merged(inputs, fit.hidden)
                output = fit.merged.backbone.output(encoded, task)
                logits, classes = narrowed(output.logits, self.top, self.dtype)
                parts.append(Teacher(logits, classes, encoded.hidden))
        teacher, places = _joined(parts), groups.back(task)
        return teacher if places is None else teacher.rows(places)


class _Fit(NamedTuple):
    """What ``begin`` was told of a fit, and what it decided.

    Attributes:
        every: n.
        nbytes: of the outputs of a step; 0 where nobody asked.
        budget: bytes that the outputs of n steps may take; 0 where nobody asked.
    """

    merged: MergedModel
    steps: Steps
    hidden: tuple[float, ...]
    show: Callable[[str, Batch], Batch]
    batch_size: int
    strategy: Strategy
    every: int
    nbytes: int
    budget: int


def _joined(parts: Sequence[Teacher]) -> Teacher:
    """Returns the outputs of a batch from those of its passes; positions are padded at their end to the longest."""
    if len(parts) == 1:
        return parts[0]
    classes = [part.classes for part in parts if part.classes is not None]
    hidden: Iterable[tuple[Tensor, ...]] = zip(*(part.hidden for part in parts), strict=True)
    return Teacher(
        join_tensors([part.logits for part in parts]),
        join_tensors(classes) if classes else None,
        tuple(join_tensors(states) for states in hidden),
    )


def _nbytes(teacher: Teacher) -> int:
    tensors = [teacher.logits, *teacher.hidden, *([] if teacher.classes is None else [teacher.classes])]
    return sum(tensor.nbytes for tensor in tensors)
