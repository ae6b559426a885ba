"""Activations: checkpointed blocks give the gradients of plain ones, run twice, and leave little in memory between."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pico import pico_pool
from test_blocks import gradients, model_of
from torch import Tensor, nn

from adamerge.activations import Checkpointed
from adamerge.backbones.inputs import stack
from adamerge.copies import WholeCopy, outermost
from adamerge.errors import ConfigError
from adamerge.merged_model import MergedModel

KINDS = ("llama", "qwen3_moe", "t5", "vit", "clip", "llava")


@pytest.fixture(scope="module")
def pool_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    root, made = tmp_path_factory.mktemp("activations"), {}

    def get(kind: str) -> dict[str, Any]:
        if kind not in made:
            made[kind] = pico_pool(kind, root / kind)
        return made[kind]

    return get


def inputs_of(merged: MergedModel, pool: dict[str, Any]) -> Any:
    return stack([merged.backbone.preprocess(sample) for sample in pool["samples"]["one"]])


def calls(network: nn.Module) -> list[int]:
    """How often each checkpointed block was called, counted from now on."""
    found = []
    for place, block in enumerate(outermost(network)):
        wrapped = block.forward
        assert isinstance(wrapped, Checkpointed)
        found.append(0)

        def counting(*args: Any, place: int = place, plain: Any = wrapped.forward, **kwargs: Any) -> Any:
            found[place] += 1
            return plain(*args, **kwargs)

        wrapped.forward = counting
    return found


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_those_without(kind, mixed, pool_of):
    """Teachers, hidden states and logits of two tasks; what several blocks use may be summed in another order."""
    pool, found = pool_of(kind), []
    for copy in (WholeCopy(), WholeCopy(checkpointed=True)):
        merged = model_of(pool, copy)
        with torch.autocast("cpu", torch.bfloat16, mixed):
            found.append(gradients(merged, pool))
    (loss, right), (other, own) = found
    assert other == pytest.approx(loss, rel=1e-6)
    largest = max(float(gradient.abs().max()) for gradient in right)
    assert largest > 1e-3 and all((a - b).abs().max() <= 1e-5 * largest for a, b in zip(own, right, strict=True))


def test_blocks_run_twice_with_a_gradient_and_once_without(pool_of):
    pool = pool_of("llama")
    merged = model_of(pool, WholeCopy(checkpointed=True))
    found = calls(merged.backbone.network)
    inputs = inputs_of(merged, pool)
    with torch.no_grad():
        merged.merge()
        merged(inputs)
    assert len(found) >= 2 and set(found) == {1}
    merged.merge()
    merged(inputs).features.sum().backward()
    assert set(found) == {3}


def test_less_is_kept_for_the_backward_pass(pool_of):
    """What autograd saves outside of checkpoints, and what the blocks were given, which those keep."""

    def kept(copy: WholeCopy) -> int:
        merged, sizes = model_of(pool_of("llama"), copy), {}
        weights = {parameter.data_ptr() for parameter in merged.backbone.network.parameters()}
        merged.merge()

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        for block in outermost(merged.backbone.network):
            block.register_forward_pre_hook(lambda block, given: [pack(value) for value in given] and None)
        inputs = inputs_of(merged, pool_of("llama"))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            features = merged(inputs).features
        features.sum().backward()
        return sum(sizes.values())

    assert kept(WholeCopy(checkpointed=True)) < 0.5 * kept(WholeCopy())


def test_the_next_merged_model_of_a_network_has_its_own_way(pool_of):
    merged = model_of(pool_of("llama"), WholeCopy(checkpointed=True))
    network = merged.backbone.network
    assert all(isinstance(block.forward, Checkpointed) for block in outermost(network))
    MergedModel(merged.backbone, merged.task_vectors, merged.parametrization)
    assert not any(isinstance(block.forward, Checkpointed) for block in outermost(network))


def test_a_network_without_blocks_is_refused():
    with pytest.raises(ConfigError, match="Linear has no blocks to checkpoint"):
        WholeCopy(checkpointed=True).passing(nn.Linear(2, 2), {})
