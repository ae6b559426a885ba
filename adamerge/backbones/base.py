"""The contract of a backbone: a network whose parameters hold the merged copy, its inputs, and its frozen heads."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from adamerge.backbones.inputs import Inputs, rows
from adamerge.backbones.structure import owner
from adamerge.checkpoints.checkpoint import Checkpoint
from adamerge.io.model_folder import Layout

IGNORED = -100
"""Label of a position that does not count."""


class Teacher(NamedTuple):
    """Outputs of a task's own expert for the samples of a batch; constant during a fit.

    Attributes:
        logits: ``(samples, [positions,] classes)``, or the largest ``k`` of them.
        classes: which classes these are, ``(samples, [positions,] k)``; None for all, in order.
        hidden: the chosen hidden states, each ``(samples, positions, width)``.
    """

    logits: Tensor
    classes: Tensor | None = None
    hidden: tuple[Tensor, ...] = ()

    def rows(self, which: slice) -> Teacher:
        """Returns the teacher's outputs of some of the samples."""
        classes = None if self.classes is None else self.classes[which]
        return Teacher(self.logits[which], classes, tuple(states[which] for states in self.hidden))


class Batch(NamedTuple):
    """Samples of one task: preprocessed inputs, with labels and teacher where an objective asks for them.

    Attributes:
        inputs: preprocessed, ``(samples, ...)``.
        labels: ``(samples,)`` classes or ``(samples, positions)`` tokens, ``IGNORED`` where nothing is to be predicted;
            None for objectives that are not labelled, so that labels cannot reach them.
        teacher: for objectives that declare it.
        indices: ``(samples,)``, the samples' numbers in their split; on the CPU wherever the rest is, so that nobody who
            reads samples by them waits for a device.
        step: number of the step they are drawn for.
        targets: ``(samples, classes)``, probabilities that an objective set itself, from predictions, when it prepared
            the batch.
        marginal: ``(classes,)``, the mean prediction of all of the step's samples of this task, of all processes, that an
            objective set in the same way; the same for any of the samples.
    """

    inputs: Inputs
    labels: Tensor | None = None
    teacher: Teacher | None = None
    indices: Tensor | None = None
    step: int = 0
    targets: Tensor | None = None
    marginal: Tensor | None = None

    def rows(self, which: slice) -> Batch:
        """Returns a batch of some of the samples, with their labels and teacher."""
        return Batch(
            rows(self.inputs, which),
            None if self.labels is None else self.labels[which],
            None if self.teacher is None else self.teacher.rows(which),
            None if self.indices is None else self.indices[which],
            self.step,
            None if self.targets is None else self.targets[which],
            self.marginal,
        )


@dataclass(frozen=True)
class Encoded:
    """Features that the network makes of inputs of any mixture of tasks, before any head.

    Attributes:
        features: ``(samples, width)``, or ``(samples, positions, width)`` where every position gets a prediction.
        hidden: the chosen hidden states, each ``(samples, positions, width)``.
        mask: bool ``(samples, positions)``, the positions whose prediction counts; None where there is one per sample.
        hidden_mask: bool ``(samples, positions)``, the positions of ``hidden`` that count; None for all.
    """

    features: Tensor
    hidden: tuple[Tensor, ...] = ()
    mask: Tensor | None = None
    hidden_mask: Tensor | None = None

    def rows(self, which: slice) -> Encoded:
        """Returns features, hidden states and masks of some of the samples."""
        return Encoded(
            self.features[which],
            tuple(states[which] for states in self.hidden),
            None if self.mask is None else self.mask[which],
            None if self.hidden_mask is None else self.hidden_mask[which],
        )


@dataclass(frozen=True)
class Output:
    """Logits that network and head make of one task's inputs.

    Attributes:
        logits: ``(samples, classes)``, or ``(samples, positions, classes)``.
        encoded: what the head was given.
    """

    logits: Tensor
    encoded: Encoded

    @property
    def features(self) -> Tensor:
        """Returns the features before the head, ``(samples, [positions,] width)``."""
        return self.encoded.features

    @property
    def mask(self) -> Tensor | None:
        """Returns which positions' predictions count, bool ``(samples, positions)``; None with one per sample."""
        return self.encoded.mask

    def mean(self, values: Tensor) -> Tensor:
        """Returns each sample's mean over the positions that count: ``(samples, [positions])`` to ``(samples,)``."""
        return values if self.mask is None else masked_mean(values, self.mask[:, : values.shape[1]])

    def cropped(self, positions: int) -> Tensor:
        """Returns logits of the first ``positions``: the rest is padding that other tasks' samples asked for."""
        return self.logits if self.mask is None else self.logits[:, :positions]


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Returns the mean of ``(samples, positions)`` over positions in ``mask``: ``(samples,)``, 0 where none is."""
    counted = torch.where(mask, values, 0.0).sum(dim=1)
    return counted / mask.sum(dim=1).clamp_min(1)


class Task(Protocol):
    """Class names and templates: what a backbone must know of a task to build its head."""

    @property
    def classnames(self) -> Sequence[str]:
        """Returns the names of the classes, in label order."""

    @property
    def templates(self) -> Sequence[str]:
        """Returns prompts with ``{}`` where the class name goes."""


class Backbone(ABC):
    """A network that is refilled in place; functional towards the outside: same weights and inputs, same outputs.

    Attributes:
        network: the module; always in eval mode.
        heads: frozen head of each task, on the device of the network; none where the network predicts by itself.
        outlined: whether it has names and shapes alone, and cannot be filled or run.
    """

    network: nn.Module
    heads: dict[str, nn.Module]
    outlined: bool = False

    @classmethod
    def refuse_early(cls, arguments: Mapping[str, Any]) -> None:
        """Refuses arguments of the constructor that are known to be wrong before a library is imported or a file opened.

        Args:
            arguments: by name, as configured.

        Raises:
            ConfigError: one is wrong.
        """
        return

    @abstractmethod
    def tensors(self) -> Mapping[str, Tensor]:
        """Returns, by on-disk name, the parameter or buffer it fills, or a view of one; one name per storage."""

    def ignores(self, name: str) -> bool:
        """Returns whether the network has no place for this on-disk tensor; exports copy it from the base."""
        return False

    def trains(self, name: str) -> bool:
        """Returns whether ``encode`` depends on the tensor of this name; the others must be equal in all experts."""
        return True

    def tied(self) -> frozenset[str]:
        """Returns on-disk names of the parameters that the network uses in several places."""
        uses = Counter(id(parameter) for _, parameter in self.network.named_parameters(remove_duplicate=False))
        return frozenset(name for name, tensor in self.tensors().items() if uses[id(owner(tensor))] > 1)

    def check_base(self, base: Checkpoint) -> None:
        """Checks whether files beside the base's weights say something else than the network was made by.

        Raises:
            CheckpointError: they do.
        """
        return

    def check_tasks(self, tasks: Mapping[str, Task]) -> None:
        """Checks whether heads can be made of the tasks' words, before anything is written; no network runs.

        Raises:
            ConfigError, DataError: they cannot.
        """
        return

    @abstractmethod
    def build_heads(self, tasks: Mapping[str, Task], experts: Mapping[str, Checkpoint]) -> None:
        """Makes the frozen heads; called when the network holds the base's weights.

        Args:
            tasks: of the data.
            experts: by task; a head that is the expert's own is read from there.
        """

    @abstractmethod
    def layout(self) -> Layout:
        """Returns how a folder with this network's weights looks to the library that loads it."""

    @abstractmethod
    def preprocess(self, sample: Any) -> Inputs:
        """Returns one decoded sample as the compact tensors that are cached; sequences are not padded."""

    @abstractmethod
    def encode(self, inputs: Inputs, hidden: Sequence[float] = ()) -> Encoded:
        """Returns features of preprocessed inputs ``(samples, ...)``, of any mixture of tasks.

        Args:
            inputs: a batch.
            hidden: numbers of the hidden states wanted: 0 is what enters the first block, ``i`` what leaves the i-th;
                negative ones count from the last, and what lies between 0 and 1 is a share of the depth.

        Raises:
            ConfigError: there is no such hidden state.
        """

    def output(self, encoded: Encoded, task: str) -> Output:
        """Returns what the task's head makes of features."""
        return Output(self.heads[task](encoded.features), encoded)

    def labels(self, sample: Inputs) -> Tensor:
        """Returns what a language model should predict in one sample: ``(positions,)``, ``IGNORED`` elsewhere.

        Raises:
            TypeError: the network predicts classes, whose labels are in the data.
        """
        raise TypeError(f"{type(self).__name__} predicts classes")

    def move_heads(self, device: torch.device) -> None:
        """Moves the heads to the device where the network runs."""
        for head in self.heads.values():
            head.to(device)
