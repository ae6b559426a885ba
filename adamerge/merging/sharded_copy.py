"""Sharded: each process holds its rows of every weight and of its gradient, and merges and contracts those alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, share_comm_ctx
from torch.distributed.fsdp._fully_shard._fsdp_api import ReduceScatter  # set_custom_reduce_scatter asks for one
from torch.distributed.tensor import DTensor

from adamerge.backbones.structure import owner, whole_modules
from adamerge.errors import ConfigError
from adamerge.merging.block_copy import BlockCopy
from adamerge.merging.copies import Copy, Place
from adamerge.merging.footprint import Footprint, Unit
from adamerge.merging.malloc import give_back_freed_memory
from adamerge.task_vectors.memory import FP32
from adamerge.task_vectors.storage import Disk, Storage


class ShardedCopy(Copy):
    """The merged copy and its gradient in equal parts over the processes, by torch's FSDP2; experts stay on disk.

    ``trainer.strategy=ddp`` starts the processes, each with batches of its own. Each loads the network to host memory first;
    from there its units go to the device, one after the other, of which only the rows stay.
    Every process reads, merges and contracts its rows alone; the whole of a block's weights is gathered where it runs and
    let go, in the forward and in the backward pass. Rows are held in fp32 and gathered in the copy's dtype. Coefficients
    are on every process, and the same. What is tied, or used by no module of its own, is whole in every process.
    On a CPU the C library gives freed memory back from then on, which costs seconds.
    """

    collective = True

    @property
    def ready(self) -> bool:
        """Returns whether the processes know each other, as they do once the trainer has started them."""
        return distributed.is_available() and distributed.is_initialized()

    def move(self, network: nn.Module, device: torch.device) -> None:
        """Brings what is not sharded to the device; what is goes there unit by unit."""
        if any(isinstance(parameter, DTensor) for parameter in network.parameters()):
            raise ConfigError(
                "the network is sharded already, and cannot move or be sharded again",
                expected="a merge on the device that it was sharded on",
                got=f"another device, or another merged model, for {type(network).__name__}",
                todo="make a new backbone for another device or model",
            )
        parted, _ = _holders(whole_modules(network))
        for tensor in (*network.parameters(), *network.buffers()):
            if id(tensor) not in parted:
                tensor.data = tensor.data.to(device)

    def places(self, network: nn.Module, tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Place]:
        """Shards the network, and finds the rows of each tensor that this process has.

        Raises:
            ConfigError: there is one process alone; or a parameter holds several tensors, or one in another arrangement.
        """
        if not self.ready:
            raise ConfigError(
                "a sharded copy needs several processes",
                expected="a trainer that starts them",
                got="one process",
                todo="set trainer.strategy=ddp and trainer.devices, or leave model.copy at adamerge.WholeCopy",
            )
        units = whole_modules(network)
        holders, shared = _holders(units)
        for name, tensor in tensors.items():
            if id(owner(tensor)) in holders and owner(tensor) is not tensor:
                raise ConfigError(
                    f"'{name}' cannot be sharded: the network keeps it in a piece of a larger parameter",
                    expected="parameters that are one tensor on disk each",
                    got=f"a parameter of shape {tuple(owner(tensor).shape)}",
                    todo="use model.copy=adamerge.BlockCopy in each process, or WholeCopy",
                )
        at = {name: holders.get(id(tensor)) for name, tensor in tensors.items()}
        mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
        sharded = [_shard(unit, mesh, shared) for unit in units]
        # each is a root of its own: else what each has sent stays until the end of the whole backward pass
        share_comm_ctx([unit for unit in sharded if unit is not None])
        if device.type == "cpu":
            give_back_freed_memory()  # what is gathered and let go would stay, and the whole network that was loaded
        return {
            name: Place(tensor) if (holder := at[name]) is None else Shard(cast(DTensor, getattr(*holder)))
            for name, tensor in tensors.items()
        }

    def footprint(self, units: Sequence[Unit], processes: int) -> Footprint:
        """Returns the memory of rows in fp32 and their gradient, and of all that is shared; beside them of what runs.

        Of the unit that runs the weights are there, those of the next, the gradient, and what of it is being summed.
        """
        parted, shared = ([unit for unit in units if unit.shared is kind] for kind in (False, True))

        def shard(elements: int) -> int:
            return FP32 * -(-elements // processes)

        return Footprint(
            shard(sum(unit.numel for unit in parted)) + sum(unit.nbytes for unit in shared),
            shard(sum(unit.merged for unit in parted)) + FP32 * sum(unit.merged for unit in shared),
            max((2 * unit.nbytes + 2 * FP32 * unit.merged for unit in parted), default=0),
            afterwards=True,
        )

    def storage_for(self, storage: Storage | None) -> Storage:
        """Returns the storage on disk, of which each process reads its shard.

        Raises:
            ConfigError: it is another.
        """
        if storage is not None and not isinstance(storage, Disk):
            raise ConfigError(
                f"model.storage {storage} holds whole tensors in each process, of which a sharded copy needs a part",
                todo="set model.storage=Disk",
            )
        return Disk()

    def alone(self) -> Copy:
        """Returns a copy that exists block by block: one process may not have the memory of several."""
        return BlockCopy()


class Shard(Place):
    """The rows of a parameter that this process holds.

    Args:
        parameter: sharded along its first dimension.
    """

    def __init__(self, parameter: DTensor) -> None:
        super().__init__(cast(DTensor, parameter.detach()).to_local())
        self.parameter = parameter
        width = parameter.numel() // max(parameter.shape[0], 1) if parameter.ndim else 1
        rank, each = parameter.device_mesh.get_local_rank(), -(-parameter.shape[0] // parameter.device_mesh.size())
        first = min(rank * each, parameter.shape[0])
        self.part = slice(first * width, first * width + self.tensor.numel())

    @property
    def is_parameter(self) -> bool:
        """Returns True, since gradients can reach any parameter."""
        return True

    @property
    def gradient(self) -> Tensor | None:
        """Returns ``G`` of these rows, summed over the processes: each one's is averaged, as if of the whole."""
        gradient = self.parameter.grad
        return None if gradient is None else cast(DTensor, gradient).to_local()

    def forget(self) -> None:
        """Frees the gradient of this process's rows."""
        self.parameter.grad = None


class SumInPlace(ReduceScatter):
    """Gives each process the sum of its rows; gloo's own way would first copy all rows of all processes."""

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Returns ordinary memory of this process."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: distributed.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> None:
        """Sums shard after shard into the process whose shard it is; what was given is lost."""
        shards = input_tensor.chunk(group.size())
        for rank, shard in enumerate(shards):
            distributed.reduce(shard, group=group, op=op, group_dst=rank)
        output_tensor.copy_(shards[group.rank()])


def _holders(units: list[nn.Module]) -> tuple[dict[int, tuple[nn.Module, str]], set[nn.Parameter]]:
    """Returns where each parameter is that belongs to one unit, by its id; and those that belong to several."""
    users: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
    for unit in units:
        for module in unit.modules():
            for name, parameter in module.named_parameters(recurse=False):
                users.setdefault(parameter, []).append((module, name))
    shared = {parameter for parameter, at in users.items() if len(at) > 1}
    return {id(parameter): at[0] for parameter, at in users.items() if parameter not in shared}, shared


def _shard(unit: nn.Module, mesh: DeviceMesh, ignored: set[nn.Parameter]) -> FSDPModule | None:
    own = [parameter for parameter in unit.parameters() if parameter not in ignored]
    if not own:
        return None
    dtype = own[0].dtype
    for parameter in own:
        # rows, and the sums of gradients, are in fp32; what is gathered is rounded as a merged tensor is
        parameter.data = parameter.data.float()
    # networks ask a layer for its dtype before it is gathered, and give it fp32: alone, it casts what it gets
    alone = not list(unit.children())
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=alone)
    sharded = fully_shard(unit, mesh=mesh, reshard_after_forward=True, mp_policy=policy, ignored_params=ignored)
    # the sum over the processes, made by an operation that all libraries have
    sharded.set_gradient_divide_factor(1)
    sharded.set_force_sum_reduction_for_comms(True)
    if mesh.device_type == "cpu":
        sharded.set_custom_reduce_scatter(SumInPlace())
    if isinstance(unit, nn.Embedding):
        # its gradient is of indices alone: at the end of a backward pass, when all other gradients are there, no weights are
        sharded.set_unshard_in_backward(False)
    for parameter in own:
        # the rows were copied; who still knows the parameter would keep the whole of it
        parameter.data = parameter.data.new_empty(0)
    return sharded
