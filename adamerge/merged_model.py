"""The merged model: a backbone's own parameters, refilled from base, deltas and coefficients; knows devices and dtypes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from adamerge.agreement import (
    refuse_half_ties,
    refuse_other_network,
    refuse_shared_memory,
    refuse_unlike_leftovers,
    refuse_untrainable,
)
from adamerge.copies import Copy, Place, WholeCopy, owner
from adamerge.merging import merged_tensor, updates
from adamerge.parametrizations import Parametrization, Update
from adamerge.passes import Passes, restore
from adamerge.precision import exact
from adamerge.storage import Storage
from adamerge.task_vectors import TaskVectors
from adamerge.way_back import PullBack, WayBack

if TYPE_CHECKING:
    from adamerge.backbones import (  # only for annotations: export must not load the networks' libraries
        Backbone,
        Encoded,
        Inputs,
    )


class MergedModel(nn.Module):
    """theta(w), realised in the backbone's own parameters; only the parametrization is a submodule.

    ``merge()`` refills them, ordinary ``backward()`` calls accumulate ``G = dL/dtheta`` in their ``.grad``, and
    ``pull_back(loss)`` gives the scalar whose backward contracts ``G`` with the task vectors, once.

    Args:
        backbone: the network; its floating-point parameters become the merged copy.
        task_vectors: base and experts.
        parametrization: holds the coefficients.
        storage: where the deltas are between merges; what fits, when None.
        buffers: on-disk name to the values of a buffer that take the place of the base's.
        copy: whether the merged copy exists at once, block by block, or in parts over processes; at once when None.
        passes: how the network's blocks run; as they are when None.

    Attributes:
        recalibrated: ``buffers``, or what replaced them.
        order: on-disk names of the backbone's tensors in the order of its modules; files have them in the alphabet's.

    Raises:
        CheckpointError: the base's tensors are not those of the backbone.
        ConfigError: the backbone has no blocks.
    """

    def __init__(
        self,
        backbone: Backbone,
        task_vectors: TaskVectors,
        parametrization: Parametrization,
        storage: Storage | None = None,
        buffers: Mapping[str, Tensor] | None = None,
        copy: Copy | None = None,
        passes: Passes | None = None,
    ) -> None:
        super().__init__()
        self.parametrization = parametrization
        # a backbone is no nn.Module: checkpoints, optimisers and DDP's broadcast must see the coefficients alone
        self.backbone = backbone
        self.task_vectors = task_vectors
        self.copy = copy if copy is not None else WholeCopy()
        self.storage = self.copy.stored(storage)
        restore(backbone.network)  # from an earlier merged model
        tensors = backbone.tensors()
        self.order = in_order(backbone.network, tensors)
        self._places: dict[str, Place] = {}  # of what is always there
        self._copy_device: torch.device | None = None
        self._way_back: WayBack | None = None  # of the last merge, until its gradients are contracted
        self._source: Callable[[str], Tensor] | None = None  # of blocks; merged when None
        self._update_of: Update = parametrization.forward  # no module: it would be registered twice
        self._deltas_device: torch.device | None = None
        self.recalibrated: Mapping[str, Tensor] = dict(buffers or {})
        self._astray: set[str] = set()  # buffers that hold something else for now
        refuse_other_network(type(backbone).__name__, tensors, task_vectors.base, backbone.ignores)
        refuse_unlike_leftovers(tensors, task_vectors.base, task_vectors.checkpoints)
        backbone.check_base(task_vectors.base)
        refuse_half_ties(backbone.tied(), task_vectors.checkpoints)
        refuse_shared_memory(tensors, {"the base": task_vectors.base} | task_vectors.checkpoints)
        backbone.network.eval().requires_grad_(False)
        merged = {name: owner(tensors[name]) for name in task_vectors if name in tensors}
        refuse_untrainable(merged, list(task_vectors), task_vectors.base)
        for holder in merged.values():
            holder.requires_grad_(True)
            # G accumulates in fp32 whatever the dtype of the copy
            holder.grad_dtype = torch.float32
        kinds = Counter[torch.dtype]()
        for holder in merged.values():
            kinds[holder.dtype] += holder.numel()
        self.dtype = kinds.most_common(1)[0][0]
        """Of the merged copy; some networks keep a few small tensors in fp32 beside it."""
        if passes is not None:
            passes.begin(backbone.network, self.copy)
        self._passing = self.copy.passing(backbone.network, tensors)
        for part in self._passing:
            part.fetch, part.hand_on = self._fetch, self._hand_on
        if self.copy.ready and not backbone.outlined:
            self.fill(task_vectors.base.__getitem__)

    @property
    def device(self) -> torch.device:
        """Where the coefficients are, and the copy with them."""
        return next(self.parametrization.parameters()).device

    def fill(self, source: Callable[[str], Tensor]) -> None:
        """Fill the copy with whole tensors by name, such as the base's; an expert's by ``fill_expert``."""
        self._place_copy()
        self._source, self._way_back = source, None
        with torch.no_grad():
            for name, place in self._places.items():
                place.forget()  # the gradient of a step that was thrown away
                place.tensor.copy_(place.cut(source(name)), non_blocking=True)
        self._astray = set(self.recalibrated)
        torch.clear_autocast_cache()

    def fill_expert(self, task: str) -> None:
        """Fill the copy with one expert, its own buffers included; other tensors that are not merged stay the base's."""
        self._place_copy()
        base, expert = self.task_vectors.base, self.task_vectors.checkpoints[task]
        buffers = [
            name
            for name, place in self._places.items()
            if not place.is_parameter and name in expert and expert.shape(name) == place.tensor.shape
        ]
        self.fill(lambda name: (expert if name in self.task_vectors or name in buffers else base)[name])
        self._astray.update(buffers)

    def replace_buffers(self, values: Mapping[str, Tensor]) -> None:
        """From the next merge on these buffers hold these values, by on-disk name, and all others the base's."""
        self._astray.update(self.recalibrated, values)
        self.recalibrated = dict(values)

    def merge(
        self,
        draw: int | None = None,
        parameters: Sequence[nn.Parameter] | None = None,
        way_back: WayBack | None = None,
    ) -> None:
        """Refill the merged tensors for the current coefficients; with grad enabled, ready for ``pull_back``.

        Args:
            draw: number of a search's merge, for parametrizations that are random there; None for what is saved.
            parameters: of the parametrization, that ``pull_back`` is for; all that are trained when None.
            way_back: what remembers the way back to them, for whoever asks it and not ``pull_back``; a plain one when None.
        """
        self._place_deltas()
        if way_back is None and torch.is_grad_enabled():
            way_back = WayBack(self.trained() if parameters is None else parameters)
        self._source, self._way_back = None, way_back
        self._update_of = self.parametrization.forward if draw is None else self.parametrization.draw(draw)
        with torch.no_grad():
            for name in self._astray:
                own = self.recalibrated.get(name)
                self._places[name].tensor.copy_(self.task_vectors.base[name] if own is None else own)
        self._astray = set()
        self._fetch(self._standing())

    def pull_back(self, loss: Tensor) -> Tensor:
        """A scalar equal to ``loss`` whose backward gives the coefficients ``sum_e G[e] d(theta[e])/dw``, once.

        Args:
            loss: the detached value of what was back-propagated into the merged copy since ``merge()``.
        """
        if self._way_back is None:
            raise RuntimeError("pull_back needs a merge() with grad enabled since the last one")
        way_back = self._way_back
        scalar: Tensor = PullBack.apply(loss, partial(self._contract, way_back), *way_back.parameters)
        return scalar

    def gradients(self) -> list[Tensor]:
        """What the way back that ``merge`` was given makes of the accumulated ``G``, which is then let go."""
        if self._way_back is None:
            raise RuntimeError("gradients needs a merge() with grad enabled since the last ones")
        return self._contract(self._way_back)

    def forward(self, inputs: Inputs, hidden: Sequence[float] = ()) -> Encoded:
        """What the network makes of preprocessed inputs of any mixture of tasks, with the weights of the last merge."""
        return self.backbone.encode(inputs, hidden)

    def trained(self) -> list[nn.Parameter]:
        """The parameters of the parametrization that are not frozen."""
        return [parameter for parameter in self.parametrization.parameters() if parameter.requires_grad]

    def _standing(self) -> dict[str, Place]:
        """Merged tensors that are always there."""
        return {name: place for name, place in self._places.items() if name in self.task_vectors}

    def _fetch(self, places: Mapping[str, Place]) -> None:
        """Fill tensors of the copy; merged ones with the way back to the coefficients, where grad is enabled."""
        # small ones first: what a processor needs to merge them is in its caches until a large one passes through
        ordered = sorted(places.items(), key=lambda one: one[1].tensor.numel())
        # of a block, only what the backward pass merges has a way back
        way = self._way_back if torch.is_grad_enabled() else None
        with exact(self.device):
            # and before those, for all of them, what needs no values of deltas
            merged = {
                name: updates(
                    self.parametrization, name, self.task_vectors[name], self._update_of, place.part, None, way
                )
                for name, place in ordered
                if self._source is None and name in self.task_vectors
            }
            for name, place in ordered:
                if name in merged:
                    self._merge(place, self.task_vectors.base_tensor(name), merged.pop(name))
                    place.forget()
                    continue
                source = self._source or self.task_vectors.base.__getitem__
                with torch.no_grad():
                    place.tensor.copy_(place.cut(source(name)), non_blocking=True)
        # autocast caches casts of parameters by identity and would serve the previous merge
        torch.clear_autocast_cache()

    def _merge(self, place: Place, base: Tensor, values: Iterator[tuple[slice, Tensor]]) -> None:
        """Fill a tensor of the copy, or the part of one that is there, with base and update."""
        target, base = place.tensor.detach(), place.cut(base).reshape(-1)
        out = target if target.is_contiguous() else torch.empty_like(target, memory_format=torch.contiguous_format)
        flat = out.view(-1)
        for piece, own in values:
            merged_tensor(base[piece], own, flat.dtype, out=flat[piece])
        if out is not target:
            target.copy_(out)

    def _hand_on(self, places: Mapping[str, Place]) -> None:
        """Contract the gradients of a block before they go."""
        if self._way_back is not None:
            self._way_back.hand_on(places)

    def _contract(self, way_back: WayBack) -> list[Tensor]:
        """``dL/dw`` of the parameters that a merge was for, from the accumulated ``G``; which is then let go."""
        if way_back is not self._way_back:
            raise RuntimeError(
                "what this pull_back was of is gone: it has been pulled back, or merge() was called since"
            )
        standing = self._standing()
        found = way_back.gradients(standing)
        self._way_back = None
        for place in standing.values():
            place.forget()
        return found

    @torch.inference_mode(False)  # else a first merge in validation would make parameters that cannot be trained
    def _place_copy(self) -> None:
        """Bring the backbone to the coefficients' device, and find where its tensors are there."""
        if self._copy_device == self.device:
            return
        for part in self._passing:
            part.to(self.device)
        self.copy.move(self.backbone.network, self.device)
        self.backbone.move_heads(self.device)
        passing = {name for part in self._passing for name in part.names}
        standing = {name: tensor for name, tensor in self.backbone.tensors().items() if name not in passing}
        self._places, self._copy_device = self.copy.places(self.backbone.network, standing, self.device), self.device

    @torch.inference_mode(False)
    def _place_deltas(self) -> None:
        """Follow the coefficients to their device, and place the deltas for merges there."""
        self._place_copy()
        if self._deltas_device != self.device:
            self.task_vectors = self.storage.place(self.task_vectors, self.device)
            self._deltas_device = self.device


def in_order(network: nn.Module, tensors: Mapping[str, Tensor]) -> list[str]:
    """Sorts names as the network registers what they fill; pieces of one parameter as they lie in it."""
    ranks = {id(own): rank for rank, own in enumerate((*network.parameters(), *network.buffers()))}
    places = {
        name: (ranks.get(id(owner(tensor)), len(ranks)), tensor.storage_offset()) for name, tensor in tensors.items()
    }
    return sorted(places, key=places.__getitem__)
