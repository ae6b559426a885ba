"""The merged model: a backbone's own parameters, refilled from base, deltas and coefficients; knows devices and dtypes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from adamerge.backbones.structure import names_in_order, owner, prevailing_dtype
from adamerge.merging.block_execution import Passes, restore
from adamerge.merging.copies import Copy, Place, WholeCopy
from adamerge.merging.merged_tensor import Contents, Merge, OneModel
from adamerge.merging.network_checks import check_network, refuse_untrainable
from adamerge.merging.pullback import MergeGradients, PullBack
from adamerge.parametrizations import Parametrization
from adamerge.precision import exact
from adamerge.task_vectors.storage import Storage
from adamerge.task_vectors.task_vectors import TaskVectors

if TYPE_CHECKING:  # only for annotations: export must not load the networks' libraries
    from adamerge.backbones import Backbone, Encoded, Inputs


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
        *,
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
        self.choose_storage(storage)
        restore(backbone.network)  # from an earlier merged model
        tensors = backbone.tensors()
        self.order = names_in_order(backbone.network, tensors)
        self._contents: Contents = OneModel(task_vectors.base.__getitem__)  # of the copy
        self._places: Mapping[str, Place] = {}  # of what is always there
        self._copy_device: torch.device | None = None
        self._deltas_device: torch.device | None = None
        self.recalibrated: Mapping[str, Tensor] = dict(buffers or {})
        check_network(backbone, tensors, task_vectors.base, task_vectors.checkpoints)
        backbone.network.eval().requires_grad_(False)
        merged = {name: owner(tensors[name]) for name in task_vectors if name in tensors}
        refuse_untrainable(merged, list(task_vectors), task_vectors.base)
        for holder in merged.values():
            holder.requires_grad_(True)
            holder.grad_dtype = torch.float32  # G accumulates in fp32 whatever the dtype of the copy
        self.dtype = prevailing_dtype(merged.values())
        """Dtype of the merged copy; some networks keep a few small tensors in fp32 beside it."""
        if passes is not None:
            passes.begin(backbone.network, self.copy)
        self._transient = self.copy.transient(backbone.network, tensors, self._fetch, self._hand_on)
        if self.copy.ready and not backbone.outlined:
            self.fill(task_vectors.base.__getitem__)

    @property
    def storage(self) -> Storage:
        """Returns the storage of the deltas between merges, from the next time on that they are placed on a device."""
        return self._storage

    def choose_storage(self, storage: Storage | None) -> None:
        """Decides where the deltas are between merges: as configured at first, then as a plan has chosen.

        The one place that sets it. Deltas that are on a device already stay as they are.

        Args:
            storage: what fits, when None.

        Raises:
            ConfigError: the copy does not go with it.
        """
        self._storage = self.copy.storage_for(storage)

    @property
    def device(self) -> torch.device:
        """Returns the device of the coefficients, which the copy follows."""
        return next(self.parametrization.parameters()).device

    @property
    def is_one_model(self) -> bool:
        """Returns whether the copy holds one model as it is, such as an expert, and not what was merged."""
        return isinstance(self._contents, OneModel)

    def fill(self, source: Callable[[str], Tensor]) -> None:
        """Fills the copy with whole tensors by name, such as the base's; an expert's by ``fill_expert``."""
        self._hold(OneModel(source, self.recalibrated))

    def fill_expert(self, task: str) -> None:
        """Fills the copy with one expert, its own buffers included; other tensors that are not merged stay the base's."""
        self._place_copy()
        base, expert = self.task_vectors.base, self.task_vectors.checkpoints[task]
        buffers = [
            name
            for name, place in self._places.items()
            if not place.is_parameter and name in expert and expert.shape(name) == place.tensor.shape
        ]

        def source(name: str) -> Tensor:
            return (expert if name in self.task_vectors or name in buffers else base)[name]

        self._hold(OneModel(source, (*self.recalibrated, *buffers)))

    def replace_buffers(self, values: Mapping[str, Tensor]) -> None:
        """Has these buffers hold these values from the next merge on, by on-disk name, and all others the base's."""
        self._contents.foreign |= {*self.recalibrated, *values}
        self.recalibrated = dict(values)

    def merge(
        self,
        draw: int | None = None,
        parameters: Sequence[nn.Parameter] | None = None,
        gradients: MergeGradients | None = None,
    ) -> None:
        """Refills the merged tensors for the current coefficients; with grad enabled, ready for ``pull_back``.

        Args:
            draw: number of a search's merge, for parametrizations that are random there; None for what is saved.
            parameters: of the parametrization, that ``pull_back`` is for; all that are trained when None.
            gradients: what maps the gradients back to them, for whoever asks it and not ``pull_back``; a plain one when None.
        """
        self._place_deltas()
        if gradients is None and torch.is_grad_enabled():
            gradients = MergeGradients(self.trained() if parameters is None else parameters)
        with torch.no_grad():
            for name in self._contents.foreign:
                own = self.recalibrated.get(name)
                self._places[name].tensor.copy_(self.task_vectors.base[name] if own is None else own)
        update_of = None if draw is None else self.parametrization.draw(draw)
        self._contents = Merge(self.task_vectors, self.parametrization, update_of, gradients)
        self._fetch(self._standing())

    def pull_back(self, loss: Tensor) -> Tensor:
        """Returns a scalar equal to ``loss`` whose backward gives the coefficients ``sum_e G[e] d(theta[e])/dw``, once.

        Args:
            loss: the detached value of what was back-propagated into the merged copy since ``merge()``.
        """
        gradients = self._contents.gradients
        if gradients is None:
            raise RuntimeError("pull_back needs a merge() with grad enabled since the last one")
        scalar: Tensor = PullBack.apply(loss, partial(self._contract, gradients), *gradients.parameters)
        return scalar

    def gradients(self) -> list[Tensor]:
        """Returns what the last merge's ``gradients`` make of the accumulated ``G``, which is then let go."""
        if self._contents.gradients is None:
            raise RuntimeError("gradients needs a merge() with grad enabled since the last ones")
        return self._contract(self._contents.gradients)

    def forward(self, inputs: Inputs, hidden: Sequence[float] = ()) -> Encoded:
        """Returns what the network makes of preprocessed inputs of any mixture of tasks, with what the copy holds."""
        return self.backbone.encode(inputs, hidden)

    def trained(self) -> list[nn.Parameter]:
        """Returns the parameters of the parametrization that are not frozen."""
        return [parameter for parameter in self.parametrization.parameters() if parameter.requires_grad]

    def _standing(self) -> dict[str, Place]:
        """Returns the merged tensors that are always there."""
        return {name: place for name, place in self._places.items() if name in self.task_vectors}

    def _hold(self, model: OneModel) -> None:
        """Fills the copy with one model; blocks that come and go are filled with it when they run."""
        self._place_copy()
        self._contents = model
        for place in self._places.values():
            place.forget()  # the gradient of a step that was thrown away
        model.fill(self._places)
        torch.clear_autocast_cache()

    def _fetch(self, places: Mapping[str, Place]) -> None:
        """Fills tensors of the copy with what it holds."""
        with exact(self.device):
            self._contents.fill(places)
        # autocast caches casts of parameters by identity and would serve the previous merge
        torch.clear_autocast_cache()

    def _hand_on(self, places: Mapping[str, Place]) -> None:
        """Contracts the gradients of a block before they go."""
        self._contents.hand_on(places)

    def _contract(self, gradients: MergeGradients) -> list[Tensor]:
        """Returns ``dL/dw`` of the parameters that a merge was for, from the accumulated ``G``; which is then let go."""
        if gradients is not self._contents.gradients:
            raise RuntimeError(
                "what this pull_back was of is gone: it has been pulled back, or merge() was called since"
            )
        standing = self._standing()
        contracted = gradients.gradients(standing)
        self._contents.gradients = None
        for place in standing.values():
            place.forget()
        return contracted

    @torch.inference_mode(False)  # else a first merge in validation would make parameters that cannot be trained
    def _place_copy(self) -> None:
        """Brings the backbone to the coefficients' device, and finds where its tensors are there."""
        if self._copy_device == self.device:
            return
        for block in self._transient:
            block.to(self.device)
        self.copy.move(self.backbone.network, self.device)
        self.backbone.move_heads(self.device)
        transient = {name for block in self._transient for name in block.names}
        standing = {name: tensor for name, tensor in self.backbone.tensors().items() if name not in transient}
        self._places, self._copy_device = self.copy.places(self.backbone.network, standing, self.device), self.device

    @torch.inference_mode(False)
    def _place_deltas(self) -> None:
        """Follows the coefficients to their device with the copy, and places the deltas for merges there."""
        self._place_copy()
        if self._deltas_device != self.device:
            self.task_vectors = self.storage.place(self.task_vectors, self.device)
            self._deltas_device = self.device
