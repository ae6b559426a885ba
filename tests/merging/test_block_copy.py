"""Block by block: the same predictions, gradients and teachers as with the whole copy, and weights only while they run."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from pico import TASKS
from rounding import gamma, roundings_of
from torch import Tensor, nn

from adamerge.backbones import Batch, Teacher
from adamerge.backbones.inputs import stack
from adamerge.backbones.structure import outermost
from adamerge.errors import ConfigError
from adamerge.merging.block_copy import BlockCopy
from adamerge.merging.block_execution import Passes
from adamerge.merging.copies import Copy, WholeCopy
from adamerge.merging.merged_model import MergedModel
from adamerge.objectives import Entropy, HiddenAlignment, LogitAlignment, Sum
from adamerge.parametrizations import ChunkWise, Concrete, ElementWise, LayerWise, RowColumnWise, TaskWise
from adamerge.task_vectors.task_vectors import TaskVectors
from adamerge.training.objective_gradient import BatchObjective

KINDS = ("gpt2", "llama", "mistral", "qwen2_tied", "qwen3_moe", "bert", "vit", "clip", "sentence", "t5", "llava")
BOTH = Sum([LogitAlignment(), HiddenAlignment([0, 1, -1])])


def model_of(
    pool: dict[str, Any],
    copy: Copy | None = None,
    part: Any = LayerWise,
    dtype: str = "float32",
    double: bool = False,
    passes: Passes | None = None,
) -> MergedModel:
    vectors = TaskVectors(pool["base"], pool["experts"], include=pool["include"], exclude=pool["exclude"])
    torch.manual_seed(0)
    backbone = pool["backbone"](dtype)
    if double:
        backbone.network.double()
        backbone.dtype = "float64"
    merged = MergedModel(backbone, vectors, part(vectors), copy=copy, passes=passes)
    merged.backbone.build_heads(TASKS, vectors.checkpoints)
    with torch.no_grad():
        for parameter in merged.trained():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4))
    return merged


def batches(merged: MergedModel, pool: dict[str, Any]) -> dict[str, Batch]:
    """Of both tasks, with their teachers."""
    found = {}
    for task, samples in pool["samples"].items():
        inputs = stack([merged.backbone.preprocess(sample) for sample in samples])
        merged.fill_expert(task)
        with torch.no_grad():
            output = merged.backbone.output(merged(inputs, BOTH.hidden), task)
        found[task] = Batch(inputs, teacher=Teacher(output.logits, hidden=output.encoded.hidden))
    return found


def gradients(merged: MergedModel, pool: dict[str, Any], micro_batch: int | None = None) -> tuple[float, list[Tensor]]:
    batch = batches(merged, pool)
    merged.merge()
    losses = BatchObjective(merged, BOTH, {}, micro_batch, SingleDeviceStrategy()).backward(batch).losses
    total = merged.pull_back(torch.stack(list(losses.values())).sum())
    total.backward()
    return float(total.detach()), [parameter.grad for parameter in merged.trained()]


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_those_of_the_whole_copy(kind, pool_of):
    pool = pool_of(kind)
    # networks in float64: gradients of what several blocks use are summed in another order, which fp32 would show
    double = kind != "qwen3_moe"  # its grouped products know no float64
    whole, blocks = (model_of(pool, copy, double=double) for copy in (WholeCopy(), BlockCopy()))
    assert len(blocks._transient) >= 2
    loss, right = gradients(whole, pool)
    other, found = gradients(blocks, pool)
    assert other == pytest.approx(loss, rel=1e-6)
    largest = max(float(gradient.abs().max()) for gradient in right)
    assert all((a - b).abs().max() <= 1e-6 * largest for a, b in zip(found, right, strict=True)) and largest > 1e-3


@pytest.mark.parametrize(
    "part",
    [partial(ChunkWise, chunks=3), partial(Concrete, inner=TaskWise), RowColumnWise, ElementWise],
    ids=["chunks", "mask", "rows and columns", "elements"],
)
@pytest.mark.parametrize("micro_batch", [None, 2])
def test_micro_batches_chunks_and_masks(part, micro_batch, pool_of):
    pool = pool_of("llama")
    _, right = gradients(model_of(pool, WholeCopy(), part), pool)
    merged = model_of(pool, BlockCopy(), part)
    _, found = gradients(merged, pool, micro_batch)
    largest = max(float(gradient.abs().max()) for gradient in right)
    bound = 2 * gamma(roundings_of(merged.backbone.network, positions=16, samples=len(TASKS) * 4)) * largest
    assert all((a - b).abs().max() <= bound for a, b in zip(found, right, strict=True)) and largest > 1e-3


def test_a_second_step_sees_the_second_coefficients(pool_of):
    pool = pool_of("llama")
    found = []
    for copy in (WholeCopy(), BlockCopy()):
        merged = model_of(pool, copy)
        first = gradients(merged, pool)
        with torch.no_grad():
            for parameter in merged.trained():
                parameter -= 0.5 * parameter.grad
                parameter.grad = None
        second = gradients(merged, pool)
        assert second[0] < first[0] - 1e-3
        found.append(second[0])
    assert found[0] == pytest.approx(found[1], rel=1e-6)


@torch.no_grad()
def test_evaluation_is_the_same_to_the_bit_also_with_autocast(pool_of):
    pool = pool_of("llama")
    inputs = None
    for dtype, mixed in (("float32", False), ("bfloat16", False), ("float32", True)):
        found = []
        for copy in (WholeCopy(), BlockCopy()):
            merged = model_of(pool, copy, dtype=dtype)
            inputs = stack([merged.backbone.preprocess(sample) for sample in pool["samples"]["one"]])
            merged.merge()
            with torch.autocast("cpu", torch.bfloat16, mixed):
                found.append(merged(inputs).features)
        assert torch.equal(*found)


def test_gradients_under_autocast_are_those_of_the_whole_copy(pool_of):
    pool = pool_of("llama")
    found = []
    for copy in (WholeCopy(), BlockCopy()):
        merged = model_of(pool, copy)
        with torch.autocast("cpu", torch.bfloat16):
            found.append(gradients(merged, pool)[1])
    assert all((a - b).abs().max() <= 1e-6 * a.abs().max() for a, b in zip(*found, strict=True))


def test_weights_and_gradients_exist_only_while_they_run(pool_of):
    pool = pool_of("llama")
    merged = model_of(pool, BlockCopy())
    names = {name for block in merged._transient for name in block.names}
    assert {name.split(".")[2] for name in names} == {"0", "1"}
    assert set(merged._places) == {
        "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
    }  # fmt: skip
    owners = [parameter for block in merged._transient for parameter in block.parameters]
    seen: list[int] = []

    def live() -> int:
        return sum(tensor.untyped_storage().nbytes() > 4 for tensor in owners)

    for block in merged._transient:
        block.forward = _watched(block.forward, lambda: seen.append(live()))
    assert live() == 0
    gradients(merged, pool)
    assert live() == 0 and all(tensor.grad is None for tensor in owners)
    assert len(seen) == 2 * 2 + 2 * 2 and set(seen) == {len(owners) // 2}  # teachers of two tasks; forward and backward


def test_an_error_in_a_block_leaves_no_weights(pool_of):
    pool = pool_of("llama")
    merged = model_of(pool, BlockCopy())

    def broken(*_, **__):
        raise ValueError("no")

    merged._transient[1].forward = broken
    merged.merge()
    inputs = stack([merged.backbone.preprocess(sample) for sample in pool["samples"]["one"]])
    with pytest.raises(ValueError, match="no"):
        merged(inputs)
    assert all(p.untyped_storage().nbytes() <= 4 for block in merged._transient for p in block.parameters)


def test_a_network_without_blocks_is_refused(pool_of):
    with pytest.raises(ConfigError, match="Linear has no blocks"):
        BlockCopy().transient(nn.Linear(2, 2), {}, print, print)


def test_what_is_shared_between_blocks_is_always_there():
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            stage = nn.ModuleList([nn.Linear(2, 2), nn.ModuleDict({"x": nn.Linear(2, 2)})])
            self.layers = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2), stage])
            self.layers[1].weight = self.layers[0].weight
            self.head = nn.Linear(2, 2)

    network = Network()
    assert outermost(network) == [*network.layers[:2], network.layers[2][0], network.layers[2][1]["x"]]
    blocks = BlockCopy().transient(network, dict(network.named_parameters()), print, print)
    assert [block.names for block in blocks] == [
        ("layers.0.bias",), ("layers.1.bias",), ("layers.2.0.weight", "layers.2.0.bias"),
        ("layers.2.1.x.weight", "layers.2.1.x.bias"),
    ]  # fmt: skip


def test_a_pull_back_needs_a_merge(pool_of):
    merged = model_of(pool_of("llama"), BlockCopy())
    with pytest.raises(RuntimeError, match="needs a merge"):
        merged.pull_back(torch.zeros(()))


def test_an_objective_without_teachers(pool_of):
    pool = pool_of("vit")
    found = []
    for copy in (WholeCopy(), BlockCopy()):
        merged = model_of(pool, copy)
        batch = {task: Batch(part.inputs) for task, part in batches(merged, pool).items()}
        merged.merge()
        BatchObjective(merged, Entropy(), {}, None, SingleDeviceStrategy()).backward(batch)
        merged.pull_back(torch.zeros(())).backward()
        found.append(merged.trained()[0].grad)
    assert (found[0] - found[1]).abs().max() <= 1e-6 * found[0].abs().max()


def _watched(forward: Callable[..., Any], seen: Callable[[], None]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        seen()
        return forward(*args, **kwargs)

    return run
