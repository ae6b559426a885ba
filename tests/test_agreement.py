"""Agreement: what an expert lacks or has too much is named, and so is the pattern that leaves it out."""

import pytest
import torch
import transformers
from pico import ENCODER, VISION, pico_pool, random_model
from safetensors.torch import load_file

from adamerge.adapters import AdapterCheckpoint
from adamerge.agreement import globs, refuse_extra, refuse_other
from adamerge.checkpoint import StateDict
from adamerge.errors import CheckpointError
from adamerge.merged_model import MergedModel
from adamerge.parametrizations import LayerWise
from adamerge.remote import RemoteCheckpoint
from adamerge.sources import open_checkpoint
from adamerge.task_vectors import TaskVectors


@pytest.mark.parametrize(
    ("names", "others", "expected"),
    [
        (["a.x.w", "a.x.b", "b.w"], [], ["a.*", "b.w"]),
        (["a.x.w", "a.x.b"], ["a.y.w"], ["a.x.*"]),
        (["a.x.w", "a.y.w"], ["a.x.b"], ["a.x.w", "a.y.w"]),
        (["scale", "a.w"], ["scales.w", "aa.w"], ["scale", "a.w"]),
        (["l.1.w", "l.1.b", "l.10.w"], ["l.0.w"], ["l.1.*", "l.10.w"]),
    ],
)
def test_globs_are_the_shortest_that_leave_the_others(names, others, expected):
    assert globs(names, others) == expected


def test_globs_leave_exactly_what_is_missing():
    """Whatever is taken out of a real model, the patterns of the message let the rest be merged."""
    towers = transformers.CLIPConfig(text_config=ENCODER | {"bos_token_id": 1}, vision_config=VISION, projection_dim=16)
    base = random_model(transformers.CLIPModel, towers, 0).state_dict()
    generator = torch.Generator().manual_seed(0)
    for share in (0.02, 0.3, 0.9):
        kept = [name for name in base if base[name].is_floating_point() and torch.rand((), generator=generator) > share]
        missing = [name for name in base if base[name].is_floating_point() and name not in kept]
        vectors = TaskVectors(base, {"one": {name: base[name] for name in kept}}, exclude=globs(missing, kept))
        assert sorted(vectors) == sorted(kept)


def test_a_missing_tower_is_one_pattern():
    towers = transformers.CLIPConfig(text_config=ENCODER | {"bos_token_id": 1}, vision_config=VISION, projection_dim=16)
    base = random_model(transformers.CLIPModel, towers, 0).state_dict()
    vision = random_model(transformers.CLIPVisionModel, towers.vision_config, 1).state_dict()
    with pytest.raises(CheckpointError) as found:
        TaskVectors(base, {"cars": vision})
    missing = len([name for name in base if not name.startswith("vision_model.") and base[name].is_floating_point()])
    assert f"expert 'cars' lacks 'logit_scale' and {missing - 1} more (base has {len(base)}" in found.value.what
    patterns = ["logit_scale", "text_model.*", "text_projection.weight", "visual_projection.weight"]
    assert found.value.todo.startswith(f"pass exclude={patterns} to leave them at the base")
    assert len(TaskVectors(base, {"cars": vision}, exclude=patterns)) == len(vision)


def test_an_expert_with_nothing_of_the_base_is_told_so():
    with pytest.raises(CheckpointError) as found:
        refuse_other("a", StateDict({"y.w": torch.ones(1)}), StateDict({"x.w": torch.ones(1)}), ["x.w"])
    assert "it has none of these tensors" in found.value.todo and found.value.got == "0 of them"


def test_long_lists_are_cut():
    base = StateDict({f"{name}{i}.w": torch.ones(1) for name in "ab" for i in range(10)})
    with pytest.raises(CheckpointError, match=r"'b7\.w'\] and 2 more to leave them") as found:
        refuse_other("a", StateDict({name: base[name] for name in base if name < "b"}), base, list(base))
    assert "b8.w" not in str(found.value)


def test_extra_tensors_are_left_out_by_pattern_but_never_the_bases():
    base = StateDict({"bert.w": torch.ones(1), "head.b": torch.ones(1)})
    extra = ["bert.pooler.b", "bert.pooler.w", "head.w", "head.x"]
    expert = StateDict(dict.fromkeys(["bert.w", *extra], torch.ones(1)))
    refuse_extra("a", expert, base, [])
    with pytest.raises(CheckpointError) as found:
        refuse_extra("a", expert, base, extra)
    assert found.value.what == "expert 'a' has 4 tensors that the base lacks, first 'bert.pooler.b'"
    assert found.value.todo.startswith("pass exclude=['bert.pooler.*', 'head.w', 'head.x'], or")


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
