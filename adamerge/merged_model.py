"""The merged model: a backbone's own parameters, refilled from base, deltas and coefficients; knows devices and dtypes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from adamerge.errors import CheckpointError
from adamerge.parametrizations import Parametrization
from adamerge.storage import Automatic, Storage
from adamerge.task_vectors import TaskVectors

if TYPE_CHECKING:
    from adamerge.backbones import (  # only for annotations: export must not load the networks' libraries
        Backbone,
        Encoded,
        Inputs,
    )


def merged_tensor(base: Tensor, update: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """``(base.float() + update).to(dtype)``: the one place where a merged tensor is made.

    Args:
        base: as stored; a narrower dtype is widened inside the addition.
        update: of the same shape, fp32.
        dtype: of the result.
        out: of that dtype and shape, to write into.
    """
    return torch.add(base, update, out=torch.empty_like(update, dtype=dtype) if out is None else out)


class MergedModel(nn.Module):
    """theta(w), realised in the backbone's own parameters; only the parametrization is a submodule.

    ``merge()`` refills them, ordinary ``backward()`` calls accumulate ``G = dL/dtheta`` in their ``.grad``, and
    ``pull_back(loss)`` gives the scalar whose backward contracts ``G`` with the task vectors, once.

    Args:
        backbone: the network; its floating-point parameters become the merged copy.
        task_vectors: base and experts.
        parametrization: holds the coefficients.
        storage: where the deltas are between merges; what fits, when None.

    Raises:
        CheckpointError: the base's tensors are not those of the backbone.
    """

    def __init__(
        self,
        backbone: Backbone,
        task_vectors: TaskVectors,
        parametrization: Parametrization,
        storage: Storage | None = None,
    ) -> None:
        super().__init__()
        self.parametrization = parametrization
        # a backbone is no nn.Module: checkpoints, optimisers and DDP's broadcast must see the coefficients alone
        self.backbone = backbone
        self.task_vectors = task_vectors
        self.storage = storage if storage is not None else Automatic()
        self._tensors = dict(backbone.tensors())
        self._edges: dict[str, GradientEdge] = {}
        self._placed: torch.device | None = None
        self._astray: list[str] = []  # buffers that are an expert's for now
        self._compare()
        backbone.network.eval().requires_grad_(False)
        self.fill(task_vectors.base.__getitem__)
        for name in self._merged_names():
            if not isinstance(_owner(self._tensors[name]), nn.Parameter):
                raise CheckpointError(
                    f"'{name}' is a buffer, not a parameter, and cannot be merged by gradients",
                    where=task_vectors.base.location,
                    todo=f"pass exclude=['{name}']: buffers stay the base's",
                )
            owner = _owner(self._tensors[name])
            owner.requires_grad_(True)
            # G accumulates in fp32 whatever the dtype of the copy
            owner.grad_dtype = torch.float32

    @property
    def device(self) -> torch.device:
        """Where the coefficients are, and the copy with them."""
        return next(self.parametrization.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the merged copy."""
        return self._tensors[self._merged_names()[0]].dtype

    def fill(self, source: Callable[[str], Tensor]) -> None:
        """Fill the copy with whole tensors by name: the base, or an expert (which makes it the teacher)."""
        self._follow()
        with torch.no_grad():
            for name, tensor in self._tensors.items():
                tensor.copy_(source(name))
        self._astray = []
        torch.clear_autocast_cache()

    def fill_expert(self, task: str) -> None:
        """Fill the copy with one expert, its own buffers included; other tensors that are not merged stay the base's."""
        base, expert = self.task_vectors.base, self.task_vectors.checkpoints[task]
        buffers = [
            name
            for name, tensor in self._tensors.items()
            if not isinstance(_owner(tensor), nn.Parameter) and name in expert and expert.shape(name) == tensor.shape
        ]
        self.fill(lambda name: (expert if name in self.task_vectors or name in buffers else base)[name])
        self._astray = buffers

    def merge(self, draw: int | None = None) -> None:
        """Refill the merged tensors for the current coefficients; with grad enabled, ready for ``pull_back``.

        Args:
            draw: number of a search's merge, for parametrizations that are random there; None for what is saved.
        """
        self._place()
        self._edges = {}
        update_of = self.parametrization if draw is None else self.parametrization.draw(draw)
        with torch.no_grad():
            for name in self._astray:
                self._tensors[name].copy_(self.task_vectors.base[name])
        self._astray = []
        with torch.autocast(self.device.type, enabled=False):
            for name in self._merged_names():
                update = update_of(name, self.task_vectors[name])
                if update.requires_grad:
                    # the edge keeps the way back to the coefficients and lets go of the update itself
                    self._edges[name] = get_gradient_edge(update)
                tensor = self._tensors[name]
                with torch.no_grad():
                    merged_tensor(self.task_vectors.base_tensor(name), update, tensor.dtype, out=tensor)
                _owner(tensor).grad = None
        # autocast caches casts of parameters by identity and would serve the previous merge
        torch.clear_autocast_cache()

    def pull_back(self, loss: Tensor, parameters: Sequence[nn.Parameter] | None = None) -> Tensor:
        """A scalar equal to ``loss`` whose backward gives the coefficients ``sum_e G[e] d(theta[e])/dw``, once.

        Args:
            loss: the detached value of what was back-propagated into the merged copy since ``merge()``.
            parameters: of the parametrization, that the gradient is for; all that are trained when None.
        """
        if not self._edges:
            raise RuntimeError("pull_back needs a merge() with grad enabled since the last one")
        scalar: Tensor = _PullBack.apply(loss, self, *(self.trained() if parameters is None else parameters))
        return scalar

    def forward(self, inputs: Inputs, hidden: Sequence[int] = ()) -> Encoded:
        """What the network makes of preprocessed inputs of any mixture of tasks, with the weights of the last merge."""
        return self.backbone.encode(inputs, hidden)

    def trained(self) -> list[nn.Parameter]:
        """The parameters of the parametrization that are not frozen."""
        return [parameter for parameter in self.parametrization.parameters() if parameter.requires_grad]

    def _contract(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """``dL/dw`` of these parameters of the parametrization, from the accumulated ``G``; which is then let go."""
        pairs = [(edge, _gradient(self._tensors[name])) for name, edge in self._edges.items()]
        edges = [edge for edge, gradient in pairs if gradient is not None]
        gradients = [gradient for _, gradient in pairs if gradient is not None]
        with torch.autocast(self.device.type, enabled=False):
            found = torch.autograd.grad(edges, parameters, gradients, allow_unused=True) if edges else ()
        self._edges = {}
        for name in self._merged_names():
            _owner(self._tensors[name]).grad = None
        missing = (None,) * (len(parameters) - len(found))
        return [
            torch.zeros_like(parameter) if gradient is None else gradient
            for parameter, gradient in zip(parameters, (*found, *missing), strict=True)
        ]

    def _merged_names(self) -> list[str]:
        """Merged tensors that the network has a place for."""
        return [name for name in self.task_vectors if name in self._tensors]

    @torch.inference_mode(False)  # else a first merge in validation would make parameters that cannot be trained
    def _follow(self) -> None:
        """Move the backbone to the coefficients' device."""
        if self._tensors[self._merged_names()[0]].device != self.device:
            self.backbone.to(self.device)
            self._tensors = dict(self.backbone.tensors())

    @torch.inference_mode(False)
    def _place(self) -> None:
        """Follow the coefficients to their device, and place the deltas for merges there."""
        self._follow()
        if self._placed != self.device:
            self.task_vectors = self.storage.place(self.task_vectors, self.device)
            self._placed = self.device

    def _compare(self) -> None:
        base = self.task_vectors.base
        missing = [name for name in self._tensors if name not in base]
        extra = [name for name in base if name not in self._tensors and not self.backbone.ignores(name)]
        if missing or extra:
            name = (missing or extra)[0]
            raise CheckpointError(
                f"base {base.location} {'lacks' if missing else 'has unexpected'} '{name}'",
                expected=f"the {len(self._tensors)} tensors of {type(self.backbone).__name__}",
                got=f"{len(missing)} missing, {len(extra)} unexpected",
                todo="check that the backbone's architecture is the base's",
            )
        for name, tensor in self._tensors.items():
            if base.shape(name) != tensor.shape:
                raise CheckpointError(
                    f"base {base.location}: '{name}' has another shape than in the backbone",
                    expected=tuple(tensor.shape),
                    got=tuple(base.shape(name)),
                    todo="check that the backbone's architecture is the base's",
                )


def _owner(tensor: Tensor) -> Tensor:
    """The parameter or buffer that holds the values of ``tensor``, which is itself or a view of it."""
    return tensor if tensor._base is None else tensor._base


def _gradient(tensor: Tensor) -> Tensor | None:
    """``G`` of one on-disk tensor: the same view of the owner's gradient."""
    owner = _owner(tensor)
    if owner is tensor or owner.grad is None:
        return owner.grad
    gradient = owner.grad
    if gradient.stride() != owner.stride():
        gradient = torch.empty_like(owner, dtype=gradient.dtype).copy_(gradient)
    return gradient.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset() - owner.storage_offset())


class _PullBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, merged: MergedModel, *parameters: Tensor) -> Tensor:
        ctx.merged, ctx.parameters = merged, parameters
        return loss.detach().clone()

    @staticmethod
    def backward(ctx: Any, *scale: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(gradient * scale[0] for gradient in ctx.merged._contract(ctx.parameters))
