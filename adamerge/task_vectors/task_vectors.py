"""Task vectors: what each expert changed, tau_k = theta_k - theta_0, read one tensor at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from adamerge.checkpoints.checkpoint import Checkpoint
from adamerge.checkpoints.compatibility import extra_names, names_to_merge, refuse_extra, refuse_other, refuse_twin
from adamerge.checkpoints.lora_factors import matrix_shape
from adamerge.checkpoints.opening import open_checkpoint, opening
from adamerge.deltas.base import Deltas
from adamerge.deltas.streamed import StoredDeltas
from adamerge.errors import ConfigError
from adamerge.io.unwritten import is_unwritten
from adamerge.precision import exact
from adamerge.task_vectors.component_file import ComponentFile
from adamerge.task_vectors.raw_deltas import raw_deltas
from adamerge.task_vectors.start import StartOf, no_start, open_start
from adamerge.transforms import State, Transform, check_states

Source = str | Path | Mapping[str, Tensor]


class TaskVectors(Mapping[str, Deltas]):
    """Tensor name to ``Deltas``, for every floating-point tensor of the base that ``include`` and ``exclude`` leave.

    Tensors they do not leave are the base's in the merged model, and need not exist in the experts. So are those that
    no expert can have changed: LoRA adapters touch few, and only their factors are kept. An expert whose names have
    another prefix than the base's (a bare ``BertModel`` beside a ``BertForMaskedLM``) goes by the base's names.

    Args:
        base: file, folder, Hub id (``org/name[@revision]``) or state dict of the model the experts come from.
        experts: task name to the expert's file, folder, Hub id or state dict, or to a LoRA adapter's folder or Hub id,
            also as ``base+adapter``.
        transforms: applied in this order, at each read.
        include: glob patterns of tensor names to merge; all when empty.
        exclude: glob patterns of tensor names to leave at the base.
        start: a file of deltas that are added to the base with coefficient 1, as a solver writes it; transforms do not see
            it. The coefficients' sum goes on top.
        components: a file of factors that these experts' task vectors are read from, as ``adamerge.Components`` writes it;
            the experts are then those of that stage, after its transforms.
        states: what the transforms learned earlier, one per transform; learned now where None.

    Raises:
        CheckpointError: a file is unusable, or an expert's tensors do not match the base's.
        ConfigError: no experts, or no tensor left to merge.
    """

    def __init__(
        self,
        base: Source,
        experts: Mapping[str, Source],
        transforms: Sequence[Transform] = (),
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        *,
        start: str | Path | None = None,
        components: str | Path | None = None,
        states: Sequence[State] | None = None,
    ) -> None:
        if not experts:
            raise ConfigError("experts: there are none", expected="a mapping {task: path or hub id}", got="nothing")
        with opening("base"):
            self.base = open_checkpoint(base)
        self.checkpoints: dict[str, Checkpoint] = {}
        for task, source in experts.items():
            with opening(f"expert '{task}'"):
                self.checkpoints[task] = open_checkpoint(source, self.base)
        self.transforms, self.include, self.exclude = tuple(transforms), tuple(include), tuple(exclude)
        self.device = torch.device("cpu")
        self._stored: dict[str, Deltas] = {}
        self._stored_base: dict[str, Tensor] = {}
        self._stored_start: dict[str, Deltas] = {}
        self._names = names_to_merge(self.base, self.checkpoints.values(), self.include, self.exclude)
        self._selected = frozenset(self._names)
        for task, checkpoint in self.checkpoints.items():
            refuse_other(task, checkpoint, self.base, self._names)
            refuse_extra(task, checkpoint, self.base, extra_names(self.base, checkpoint, self.include, self.exclude))
        if not self._names:
            raise ConfigError(
                f"include={list(include)}, exclude={list(exclude)} leave no tensor of {self.base.location} to merge"
            )
        self.start = None if start is None or is_unwritten(start) else open_start(start, self.base, self._names)
        self._start_of: StartOf = no_start if self.start is None else self.start.delta
        self._awaits_start = start is not None and is_unwritten(start)
        self._awaits_components = components is not None and is_unwritten(components)
        self.components: ComponentFile | None = None
        if components is not None and not self._awaits_components:
            self.components = ComponentFile(components, self.base)
            self.components.refuse_others(self.checkpoints, self._names)
        # names of the experts before each transform, and after the last
        self._experts = [tuple(self.checkpoints) if self.components is None else self.components.experts]
        for transform in self.transforms:
            self._experts.append(transform.experts(self._experts[-1]))
        self._states: list[State] | None = None if states is None else list(states)
        if self._states is not None:
            check_states(self.transforms, self._states, self._experts)

    @property
    def experts(self) -> tuple[str, ...]:
        """Names of the experts in the order of the coefficients' first dimension: ``checkpoints``, after the transforms."""
        return self._experts[-1]

    @property
    def states(self) -> list[State]:
        """Numbers that each transform learned from all tensors; learned at the first use."""
        if self._states is None:
            learned: list[State] = []
            with exact(self.device):
                for transform in self.transforms:
                    learned.append(transform.prepare({name: self._read(name, learned) for name in self._names}))
            self._states = learned
        return self._states

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, name: str) -> Deltas:
        if name not in self._selected:
            raise KeyError(name)
        if name in self._stored:
            return self._stored[name]
        return self._read(name, self.states)

    def __contains__(self, name: object) -> bool:
        return name in self._selected

    def shape(self, name: str) -> torch.Size:
        """Returns the shape of tensor ``name``, from the header."""
        return self.base.shape(name)

    def base_tensor(self, name: str) -> Tensor:
        """Returns the base's tensor, as stored, on ``device``."""
        tensor = self._stored_base[name] if name in self._stored_base else self.base[name]
        return tensor.to(self.device, non_blocking=True)

    def start_deltas(self, name: str) -> Deltas | None:
        """Returns what the start adds to tensor ``name``, as the deltas of one expert; None where it adds nothing."""
        if name in self._stored_start:
            return self._stored_start[name]
        read = self._start_of(name)
        return None if read is None else StoredDeltas([read], self.shape(name), self.device)

    def starts(self, name: str) -> bool:
        """Returns whether a start changes tensor ``name``; of one that is not written yet, any."""
        return self._awaits_start or self.start_deltas(name) is not None

    def terms(self, name: str) -> int | None:
        """Returns the most products ``u v^T`` that an expert's delta of a tensor is a sum of; None where one is dense.

        Of components that are not written yet, as many as there can be.
        """
        if self._awaits_components:
            return min(matrix_shape(self.shape(name)))
        every = self.unlearned(name).terms(len(self.experts))
        return max((own for own in every if own is not None), default=0) if None not in every else None

    def to(self, device: torch.device | str) -> TaskVectors:
        """Returns the same task vectors, summed on ``device``; still read from where they are."""
        _ = self.states  # learned where the weights are, before anything moves
        moved = copy.copy(self)
        moved.device = torch.device(device)
        moved._stored, moved._stored_base, moved._stored_start = {}, {}, {}
        return moved

    def begun(self, start: StartOf) -> TaskVectors:
        """Returns the same task vectors with another start: by name what reads its delta, which may come to be later."""
        other = copy.copy(self)
        other._start_of, other._stored_start = start, {}
        return other

    def in_memory(
        self,
        device: torch.device | str,
        store: Callable[[Deltas, int], Deltas],
        store_base: Callable[[Tensor], Tensor],
    ) -> TaskVectors:
        """Returns the same task vectors, summed on ``device``, read once and from then on stored in memory.

        Args:
            device: where sums are computed.
            store: gives the stored deltas of dense ones, after the transforms, and their number of experts.
            store_base: gives what is stored of a tensor of the base.
        """
        stored, count = self.to(device), len(self.experts)
        stored._stored_base = {name: store_base(self.base[name]) for name in self._names}
        with exact(stored.device):
            stored._stored = {name: stored._read(name, self.states).in_memory(store, count) for name in self._names}
            starts = {name: own for name in self._names if (own := stored.start_deltas(name)) is not None}
            stored._stored_start = {name: own.in_memory(store, 1) for name, own in starts.items()}
        return stored

    def unlearned(self, name: str) -> Deltas:
        """Returns the deltas of tensor ``name`` but for what transforms learn, which changes values alone; reads nothing."""
        return self._read(name, [{} for _ in self.transforms])

    def check(self) -> None:
        """Reads every weight once, to see whether the models can be merged.

        Raises:
            CheckpointError: a weight is NaN or infinite, a file changed since it was opened, an expert equals the base
                or another expert.
        """
        if self.start is not None:
            self.start.check()
        if self.components is not None:
            self.components.check_models(self.checkpoints)
        seen: dict[str, Checkpoint] = {}
        for who, model in self.models().items():
            model.check()
            refuse_twin(who, model, seen, self._names)
            seen[who] = model

    def models(self) -> dict[str, Checkpoint]:
        """Returns the base and the experts, by what messages call them."""
        return {"the base": self.base} | {f"expert '{task}'": model for task, model in self.checkpoints.items()}

    @property
    def files(self) -> dict[str, Checkpoint]:
        """Returns the files of deltas beside the models: ``start`` and ``components``, those that there are."""
        files = {"start": self.start, "components": self.components}
        return {which: file for which, file in files.items() if file is not None}

    def fingerprints(self) -> dict[str, str]:
        """Returns the fingerprints of models and files, by what messages call them; reads every weight, once."""
        files = {f"the {which}": file for which, file in self.files.items()}
        return {who: model.fingerprint for who, model in (self.models() | files).items()}

    def _read(self, name: str, states: Sequence[State]) -> Deltas:
        deltas = self._raw(name)
        for transform, state, names in zip(self.transforms, states, self._experts, strict=False):
            deltas = transform.deltas(name, deltas, state, names)
        return deltas

    def _raw(self, name: str) -> Deltas:
        """Returns the deltas before any transform."""
        if self.components is not None:
            return self.components.deltas(name, self.device)
        base = partial(self.base_tensor, name)
        return raw_deltas(name, base, self.checkpoints.values(), self.shape(name), self.device)
