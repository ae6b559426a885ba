"""Passes: checkpointed and compiled blocks give the gradients of plain ones; checkpointed ones keep little and run twice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from running import LAYER_WISE, child, pool_config, write_yaml
from torch import Tensor, nn

from adamerge.backbones.inputs import stack
from adamerge.backbones.structure import outermost
from adamerge.errors import ConfigError
from adamerge.merging.block_copy import BlockCopy
from adamerge.merging.block_execution import Passes, Run
from adamerge.merging.copies import WholeCopy
from adamerge.merging.merged_model import MergedModel
from adamerge.merging.sharded_copy import ShardedCopy
from adamerge.runs.instantiate import Configured
from merging.test_block_copy import gradients, model_of

CHECKPOINTED = Passes(checkpointed=True)
KINDS = ("llama", "qwen3_moe", "t5", "vit", "clip", "llava")


def inputs_of(merged: MergedModel, pool: dict[str, Any]) -> Any:
    return stack([merged.backbone.preprocess(sample) for sample in pool["samples"]["one"]])


def calls(network: nn.Module) -> list[int]:
    """How often each checkpointed block was called, counted from now on."""
    found = []
    for place, block in enumerate(outermost(network)):
        wrapped = block.forward
        assert isinstance(wrapped, Run)
        found.append(0)

        def counting(*args: Any, place: int = place, plain: Any = wrapped.run, **kwargs: Any) -> Any:
            found[place] += 1
            return plain(*args, **kwargs)

        wrapped.run = counting
    return found


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_those_without(kind, mixed, pool_of):
    """Teachers, hidden states and logits of two tasks; what several blocks use may be summed in another order."""
    pool, found = pool_of(kind), []
    for passes in (None, CHECKPOINTED):
        merged = model_of(pool, passes=passes)
        with torch.autocast("cpu", torch.bfloat16, mixed):
            found.append(gradients(merged, pool))
    (loss, right), (other, own) = found
    assert other == pytest.approx(loss, rel=1e-6)
    largest = max(float(gradient.abs().max()) for gradient in right)
    assert largest > 1e-3 and all((a - b).abs().max() <= 1e-5 * largest for a, b in zip(own, right, strict=True))


def test_blocks_run_twice_with_a_gradient_and_once_without(pool_of):
    pool = pool_of("llama")
    merged = model_of(pool, passes=CHECKPOINTED)
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

    def kept(passes: Passes) -> int:
        merged, sizes = model_of(pool_of("llama"), passes=passes), {}
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

    assert kept(CHECKPOINTED) < 0.5 * kept(Passes())


@pytest.mark.parametrize("copy", [None, BlockCopy()])
def test_the_next_merged_model_of_a_network_has_its_own_way(copy, pool_of):
    passes = Passes(compiled=True, checkpointed=copy is None)
    merged = model_of(pool_of("llama"), copy, passes=passes)
    blocks = outermost(merged.backbone.network)
    ways = [block.forward for block in blocks] if copy is None else [part.forward for part in merged._transient]
    assert len(ways) >= 2 and all(isinstance(way, Run) for way in ways)
    MergedModel(merged.backbone, merged.task_vectors, merged.parametrization)
    assert [block.forward.__func__ for block in blocks] == [type(block).forward for block in blocks]


def test_what_runs_its_blocks_again_is_not_checkpointed_too(pool_of):
    with pytest.raises(ConfigError, match="needs the whole copy"):
        model_of(pool_of("llama"), BlockCopy(), passes=CHECKPOINTED)


def test_weights_that_are_gathered_at_each_pass_are_not_compiled_for():
    with pytest.raises(ConfigError, match="ShardedCopy are gathered anew"):
        Passes(compiled=True).begin(nn.Sequential(nn.ModuleList([nn.Linear(2, 2)])), ShardedCopy())


@pytest.mark.parametrize("passes", [Passes(checkpointed=True), Passes(compiled=True)])
def test_a_network_without_blocks_is_refused(passes):
    with pytest.raises(ConfigError, match="Linear has no blocks"):
        passes.begin(nn.Linear(2, 2), WholeCopy())
    Passes().begin(nn.Linear(2, 2), WholeCopy())


@pytest.mark.slow
@pytest.mark.parametrize("copy", [None, BlockCopy()], ids=["whole", "blocks"])
@pytest.mark.parametrize("kind", ["llama", "vit"])
def test_compiled_blocks_give_the_same_gradients(kind, copy, pool_of):
    pool, found = pool_of(kind), []
    for passes in (None, Passes(compiled=True, checkpointed=copy is None)):
        torch._dynamo.reset()
        merged = model_of(pool, copy, passes=passes)
        found.append(gradients(merged, pool))
        with torch.no_grad():
            merged.trained()[0].add_(0.1)
        found.append(gradients(merged, pool))
    for (loss, right), (other, own) in ((found[0], found[2]), (found[1], found[3])):
        assert other == pytest.approx(loss, rel=1e-5)
        largest = max(float(gradient.abs().max()) for gradient in right)
        assert largest > 1e-3 and all((a - b).abs().max() <= 1e-4 * largest for a, b in zip(own, right, strict=True))
    assert found[0][0] != found[1][0]


WITHOUT_COMPILER = """
import torch
from adamerge.errors import ConfigError
from adamerge.merging.copies import WholeCopy
from adamerge.merging.block_execution import Passes
network = torch.nn.Module()
network.layers = torch.nn.ModuleList([torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.GELU())])
Passes(compiled=True).begin(network, WholeCopy())
try:
    network.layers[0](torch.ones(2, 4)).sum().backward()
except ConfigError as error:
    print(error)
"""


@pytest.mark.slow
def test_a_compiler_that_lacks_is_told(tmp_path):
    found = child(["-c", WITHOUT_COMPILER], tmp_path, CXX=str(tmp_path / "none"), TORCHINDUCTOR_CACHE_DIR=str(tmp_path))
    assert found.stdout.startswith("model.passes.compiled: Sequential cannot be compiled: InvalidCxxCompiler"), (
        found.stderr
    )
    assert "install a C++ compiler" in found.stdout


@pytest.mark.parametrize("word", ["checkpointed", "compiled"])
def test_a_configuration_says_how(word, pool, image_folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pool_file = write_yaml(tmp_path / "pool.yaml", pool_config(pool, image_folders))
    words = ["--config", str(pool_file), "--config", str(LAYER_WISE), f"--model.passes.{word}=true"]
    network = Configured.of(words).model.merged.backbone.network
    ways = [block.forward for block in outermost(network)]
    assert ways and all(way.passes == Passes(**{word: True}) for way in ways)
