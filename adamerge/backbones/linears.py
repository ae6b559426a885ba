"""Linear maps: the places of a network where inputs are multiplied by one of its matrices, in the order in which they run."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from adamerge.backbones.structure import key_of


class LinearMap(NamedTuple):
    """A linear map ``y = x W^T + b`` of a network.

    Attributes:
        weight: on-disk name of ``W``.
        bias: on-disk name of ``b``; None where nothing is added, or nothing of its own.
        transposed: whether ``W`` is stored as ``(inputs, outputs)``.
        streams: whether the output is added to what was there before, as at the end of a transformer's attention and of its
            feed-forward part, so that it writes into the residual stream.
    """

    weight: str
    bias: str | None = None
    transposed: bool = False
    streams: bool = False


@dataclass
class Use:
    """One time that a network used a linear map.

    Attributes:
        map: the linear map; whether it streams is known when the pass is over.
        inputs: what was multiplied, ``(..., in_features)``.
        output: what came out, ``(..., out_features)``.
        positions_first: whether inputs and output are ``(positions, samples, features)``.
    """

    map: LinearMap
    inputs: Tensor
    output: Tensor
    positions_first: bool = False

    def added(self, side: Tensor, other: Tensor) -> Tensor | None:
        """Returns what ``side + other`` adds to the output, as the output lies; None where ``side`` is not all of it."""
        if side.untyped_storage()._cdata != self.output.untyped_storage()._cdata:
            return None
        if side.numel() != self.output.numel() or side.shape != other.shape or isinstance(other, nn.Parameter):
            return None
        turned = side.ndim == self.output.ndim == 3 and side.stride() == self.output.transpose(0, 1).stride()
        return other.transpose(0, 1) if turned and side.stride() != self.output.stride() else other


class Watch(TorchFunctionMode):
    """Sees every linear map of a network that runs while it is active, and every sum of two tensors.

    However a network multiplies: by modules or by functions, by weights that are stored the other way round, and inside of
    ``torch.nn.MultiheadAttention``. Convolutions, embeddings and matrices that are taken from larger ones are not seen; nor
    is a product whose bias is no tensor of the network's.

    Args:
        tensors: on-disk name to the parameter that it fills, or a view of one.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._vectors = {key_of(tensor): name for name, tensor in tensors.items() if tensor.ndim == 1}
        matrices = {name: tensor for name, tensor in tensors.items() if tensor.ndim == 2}
        self._matrices = {key_of(tensor.mT): (name, True) for name, tensor in matrices.items()}
        self._matrices |= {key_of(tensor): (name, False) for name, tensor in matrices.items()}

    @abstractmethod
    def used(self, use: Use) -> None:
        """Is told of each use of a linear map, in their order."""

    def summed(self, one: Tensor, other: Tensor) -> None:
        """Is told of each sum of two tensors, before it is computed."""

    def made(self, result: Any) -> None:
        """Is told of what each function has returned, before it is told that this was a use."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs a function of torch's, and looks at its arguments where it may be a linear map or a sum."""
        kwargs = kwargs or {}
        if func is functional.multi_head_attention_forward:
            return self._attention(*args, **kwargs)
        if func in _SUMS and len(args) == 2 and all(isinstance(side, Tensor) for side in args):
            self.summed(*args)
        result = func(*args, **kwargs)
        self.made(result)
        if func in _PRODUCTS:
            self._product(_PRODUCTS[func](*args, **kwargs), result)
        return result

    def _product(self, product: _Product, output: Any, positions_first: bool = False) -> None:
        matrix = product.matrix
        if not (isinstance(matrix, Tensor) and matrix.ndim == 2 and isinstance(output, Tensor)):
            return
        name, flipped = self._matrices.get(key_of(matrix), (None, False))
        bias = None if product.bias is None else self._vectors.get(key_of(product.bias))
        if name is None or (product.bias is not None and bias is None):
            return
        transposed = flipped == product.by_rows
        self.used(Use(LinearMap(name, bias, transposed), product.inputs, output, positions_first))

    def _attention(self, *args: Any, **kwargs: Any) -> Any:
        """Runs attention whose last linear map is applied here, since what enters it is nowhere else to be seen."""
        given = _ATTENTION.bind(*args, **kwargs)
        given.apply_defaults()
        own = given.arguments
        query, last, bias = own["query"], own["out_proj_weight"], own["out_proj_bias"]
        batched = query.ndim == 3
        itself = own["key"] is query and own["value"] is query and not own["use_separate_proj_weight"]
        if itself:  # its output stays inside
            first = _Product(query, own["in_proj_weight"], own["in_proj_bias"])
            self._product(first, query.new_empty(0), batched)
        # a product with the unit matrix changes no bit
        own["out_proj_weight"], own["out_proj_bias"] = torch.eye(len(last), dtype=last.dtype, device=last.device), None
        attended, weights = functional.multi_head_attention_forward(*given.args, **given.kwargs)
        output = functional.linear(attended, last, bias)
        self.made(output)
        self._product(_Product(attended, last, bias), output, batched)
        return output, weights


class _Product(NamedTuple):
    """A product of inputs and a matrix, to which something may be added.

    Attributes:
        by_rows: whether the matrix is ``(outputs, inputs)``.
    """

    inputs: Tensor
    matrix: Any
    bias: Tensor | None = None
    by_rows: bool = True


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> _Product:
    return _Product(input, weight, bias)


def _matmul(input: Tensor, other: Tensor, **_: Any) -> _Product:
    return _Product(input, other, by_rows=False)


def _addmm(input: Tensor, mat1: Tensor, mat2: Tensor, **_: Any) -> _Product:
    return _Product(mat1, mat2, input, by_rows=False)


_PRODUCTS: dict[Any, Callable[..., _Product]] = {
    functional.linear: _linear,
    **dict.fromkeys((torch.matmul, torch.mm, torch.Tensor.matmul, torch.Tensor.mm, torch.Tensor.__matmul__), _matmul),
    torch.addmm: _addmm,
}
_SUMS = {torch.add, torch.Tensor.add, torch.Tensor.add_, torch.Tensor.__add__, torch.Tensor.__iadd__}
_ATTENTION = inspect.signature(functional.multi_head_attention_forward)


class Recording(Watch):
    """Notes every use of a linear map and what is added to its output; for a pass of few samples, whose tensors it holds."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(tensors)
        self.uses: list[Use] = []
        self._inputs: list[Hashable] = []
        self._streams: set[int] = set()
        self._born: dict[int, tuple[int, Tensor]] = {}  # by the storage, which is held: the uses before

    def used(self, use: Use) -> None:
        """Notes a use, and what its inputs are by now: they may be written into before the next."""
        self.uses.append(use)
        self._inputs.append((key_of(use.inputs), use.inputs._version))

    def made(self, result: Any) -> None:
        """Notes when a tensor came to be."""
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                self._born.setdefault(tensor.untyped_storage()._cdata, (len(self.uses), tensor))

    def summed(self, one: Tensor, other: Tensor) -> None:
        """Notes that the linear map whose output is added to what was there before it writes into a stream."""
        for number, use in enumerate(self.uses):
            for side, before in ((one, other), (other, one)):
                born, _ = self._born.get(before.untyped_storage()._cdata, (0, before))
                if born <= number and use.added(side, before) is not None:
                    self._streams.add(number)

    def groups(self) -> list[tuple[LinearMap, ...]]:
        """Returns the linear maps that ran once, in their order; those that follow each other on the same inputs together."""
        times: dict[str | None, int] = {}
        for use in self.uses:
            for name in (use.map.weight, use.map.bias):
                times[name] = times.get(name, 0) + 1
        once = [
            (self._inputs[number], use.map._replace(streams=number in self._streams))
            for number, use in enumerate(self.uses)
            if times[use.map.weight] == 1 and (use.map.bias is None or times[use.map.bias] == 1)
        ]
        return [tuple(own for _, own in group) for _, group in groupby(once, key=lambda one: one[0])]
