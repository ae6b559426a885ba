"""The contract of a backbone: a network whose parameters hold the merged copy, its inputs, and its frozen heads."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from adamerge.backbones.capture import Capture, GroupCapture, Rows
from adamerge.backbones.inputs import Inputs, TextPlace
from adamerge.backbones.linears import LinearMap, Recording
from adamerge.backbones.output import Encoded, Output
from adamerge.backbones.structure import owner
from adamerge.backbones.zero_shot_head import Task, check_task
from adamerge.checkpoints.checkpoint import Checkpoint
from adamerge.io.model_folder import Layout


class Backbone(ABC):
    """A network that is refilled in place; functional towards the outside: same weights and inputs, same outputs.

    Attributes:
        network: the module; always in eval mode.
        heads: frozen head of each task, on the device of the network; none where the network predicts by itself.
        outlined: whether it has names and shapes alone, and cannot be filled or run.
        zero_shot: whether heads are made of class names in templates.
    """

    network: nn.Module
    heads: dict[str, nn.Module]
    outlined: bool = False
    zero_shot: ClassVar[bool] = False

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

        A zero-shot head needs distinct class names, and templates with a place for them.

        Raises:
            ConfigError, DataError: they cannot.
        """
        if self.zero_shot:
            for name, task in tasks.items():
                check_task(name, task)

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

    def text_place(self) -> TextPlace | None:
        """Returns where the text is in preprocessed inputs, for views of it; None where there is none to change."""
        return None

    def attended(self, inputs: Inputs, weight: str) -> tuple[Tensor, ...]:
        """Returns which positions of what enters a linear map are no padding, as bool masks ``(samples, positions)``.

        Args:
            inputs: preprocessed, a batch.
            weight: on-disk name of the map's matrix.

        Returns:
            Masks that may be the map's: the first whose shape fits is; none where all positions count.
        """
        mask = inputs.get("attention_mask") if isinstance(inputs, dict) else None
        return () if mask is None else (mask.bool(),)

    def capture(self, names: Collection[str], inputs: Inputs) -> Capture:
        """Returns what keeps the inputs of linear maps while ``encode`` runs on a batch inside its ``with``.

        Args:
            names: on-disk names of matrices; those of tensors that no linear map has as its weight are not captured.
            inputs: the batch, on the host where it can be, which says what is padding.
        """
        return Capture(self.tensors(), names, self._rows(inputs))

    def capture_group(self, group: Sequence[LinearMap], inputs: Inputs) -> GroupCapture:
        """Returns what keeps that of linear maps that share their inputs, and lets ``encode`` run no further than to them.

        Args:
            group: one of those that ``linear_maps`` returns.
            inputs: the batch, as for ``capture``.
        """
        return GroupCapture(self.tensors(), group, self._rows(inputs))

    @torch.no_grad()
    def linear_maps(self, inputs: Inputs) -> list[tuple[LinearMap, ...]]:
        """Returns the linear maps that run once in ``encode``, in their order; those that share their inputs together.

        Maps whose weight is used elsewhere too, as that of tied embeddings, are left out; so are those whose weight is a
        piece of a larger parameter, as in a mixture of experts, whose inputs depend on the model.

        Args:
            inputs: of a sample or two, on the device of the network.
        """
        tied = self.tied()
        own = {name: tensor for name, tensor in self.tensors().items() if name not in tied and owner(tensor) is tensor}
        with Recording(own) as recording:
            self.encode(inputs)
        return recording.groups()

    def _rows(self, inputs: Inputs) -> Rows:
        masks: dict[str, tuple[Tensor, ...]] = {}

        def attended(weight: str) -> tuple[Tensor, ...]:
            if weight not in masks:
                masks[weight] = self.attended(inputs, weight)
            return masks[weight]

        return Rows(attended)

    def move_heads(self, device: torch.device) -> None:
        """Moves the heads to the device where the network runs."""
        for head in self.heads.values():
            head.to(device)
