"""Checks of a network against base and experts: names and shapes, ties, buffers, shared memory."""

import pytest
import torch
import torchvision
from pico import pico_pool
from safetensors.torch import load_file

from adamerge.checkpoints.checkpoint import StateDict
from adamerge.checkpoints.hub_headers import RemoteCheckpoint
from adamerge.checkpoints.lora import AdapterCheckpoint
from adamerge.checkpoints.opening import open_checkpoint
from adamerge.errors import CheckpointError
from adamerge.merging.merged_model import MergedModel
from adamerge.merging.network_checks import refuse_other_network, refuse_shared_memory, refuse_untrainable
from adamerge.parametrizations import LayerWise
from adamerge.task_vectors.task_vectors import TaskVectors


@pytest.mark.parametrize(
    ("base", "error"),
    [
        ({"a": torch.ones(2)}, "lacks 'b'.*1 missing, 0 unexpected"),
        ({"a": torch.ones(2), "b": torch.ones(3), "c": torch.ones(1)}, "unexpected 'c'.*0 missing, 1 unexpected"),
        ({"a": torch.ones(2), "b": torch.ones(4)}, "'b' has another shape"),
        ({"a": torch.ones(2), "b": torch.ones(3), "head": torch.ones(1)}, None),
    ],
)
def test_a_base_is_that_of_the_network_by_names_and_shapes(base, error):
    network = {"a": torch.zeros(2), "b": torch.zeros(3)}

    def look():
        refuse_other_network("Toy", network, StateDict(base), lambda name: name == "head")

    if error is None:
        look()
    else:
        with pytest.raises(CheckpointError, match=f"(?s){error}"):
            look()


def test_a_model_in_the_networks_own_memory_is_refused():
    weight, copy = torch.zeros(3), torch.zeros(3)
    refuse_shared_memory({"w": weight}, {"the base": StateDict({"w": copy})})
    with pytest.raises(CheckpointError, match="'w' of the base is in the memory of the network itself"):
        refuse_shared_memory({"w": weight}, {"the base": StateDict({"w": weight[:]})})


def test_nothing_to_merge_is_refused():
    with pytest.raises(CheckpointError, match="nothing is merged that the network uses"):
        refuse_untrainable({}, ["elsewhere"], StateDict({"w": torch.ones(1)}))


def test_all_buffers_are_left_out_by_one_advice():
    """The running statistics of a ResNet: two patterns, not forty rounds."""
    network = torchvision.models.resnet18()
    base = StateDict(network.state_dict())
    merged = dict(network.named_parameters()) | {
        name: value for name, value in network.named_buffers() if value.is_floating_point()
    }
    with pytest.raises(CheckpointError, match=r"'bn1.running_mean' \(and 39 more\) is a buffer") as found:
        refuse_untrainable(merged, list(merged), base)
    assert "pass exclude=['*.running_mean', '*.running_var']: buffers" in found.value.todo
    left = {name: value for name, value in merged.items() if "running_" not in name}
    refuse_untrainable(left, list(left), base)


@pytest.fixture
def tied(tmp_path):
    """A model whose head is its embedding, and what makes an adapter of it that is a folder."""
    import peft
    import transformers

    pool = pico_pool("gpt2", tmp_path / "pool")

    def adapter(target, embeddings=False):
        network = transformers.AutoModelForCausalLM.from_pretrained(pool["base"])
        adapted = peft.get_peft_model(network, peft.LoraConfig(r=2, target_modules=[target]))
        torch.nn.init.normal_(
            next(value for name, value in adapted.named_parameters() if "lora_B" in name or "_B" in name)
        )
        adapted.save_pretrained(tmp_path / target, save_embedding_layers=embeddings)
        return tmp_path / target

    return pool, adapter


def test_an_adapter_of_half_a_tie_is_refused(tied):
    """Peft changes the embedding alone, and the network here has one tensor for it and the head."""
    pool, adapter = tied
    for target, refused in (("wte", True), ("c_attn", False)):
        vectors = TaskVectors(pool["base"], {"a": adapter(target)})
        backbone = pool["backbone"]()
        assert backbone.tied() == {"transformer.wte.weight"}
        if not refused:
            MergedModel(backbone, vectors, LayerWise(vectors))
            continue
        with pytest.raises(CheckpointError, match="expert 'a' is an adapter of 'transformer.wte.weight', which"):
            MergedModel(backbone, vectors, LayerWise(vectors))


def test_an_adapters_copy_of_its_bases_embedding_is_one_also_where_the_base_cannot_be_read(tied):
    pool, adapter = tied
    folder, base = adapter("wte", embeddings=True), open_checkpoint(pool["base"])
    assert any(".base_layer." in name for name in load_file(folder / "adapter_model.safetensors"))
    remote = RemoteCheckpoint("org/base", {name: ("F32", tuple(base.shape(name))) for name in base})
    for found in (AdapterCheckpoint(folder, base), AdapterCheckpoint(folder, remote)):
        assert [*found.pairs] == ["transformer.wte.weight"] and found.factors("transformer.wte.weight").rank == 2
