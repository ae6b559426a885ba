"""Experts under another prefix: what transformers itself saves as another class is merged as if renamed by hand."""

import copy

import pytest
import torch
import transformers
from pico import DECODER, ENCODER, VISION, random_model
from safetensors.torch import load_file, save_file

from adamerge.artifacts.coefficients import Coefficients, load_coefficients, save_coefficients
from adamerge.artifacts.export import export
from adamerge.checkpoints.checkpoint import StateDict
from adamerge.checkpoints.lora import AdapterCheckpoint
from adamerge.checkpoints.opening import open_checkpoint
from adamerge.checkpoints.renamed_checkpoint import RenamedCheckpoint, under_names_of
from adamerge.errors import CheckpointError
from adamerge.parametrizations import LayerWise
from adamerge.task_vectors.task_vectors import TaskVectors
from adamerge.transforms import Ties

TEXT = {name: value for name, value in ENCODER.items() if name != "pad_token_id"} | {
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CLIP = transformers.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=16)
DEEP = transformers.CLIPConfig(text_config=TEXT | {"num_hidden_layers": 3}, vision_config=VISION, projection_dim=16)
BERT, VIT, LLAMA = (
    transformers.BertConfig(**ENCODER),
    transformers.ViTConfig(**VISION),
    transformers.LlamaConfig(**DECODER),
)
GPT2 = transformers.GPT2Config(
    vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=48, bos_token_id=1, eos_token_id=2
)
SIGLIP = transformers.SiglipConfig(text_config=TEXT, vision_config=VISION)
LLAVA = transformers.LlavaConfig(text_config=LLAMA, vision_config=CLIP.vision_config)
BART = transformers.BartConfig(
    **{"vocab_size": 64, "d_model": 16, "max_position_embeddings": 48, "encoder_layers": 2, "decoder_layers": 2},
    **{"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24},
)
# class and configuration of the base, of the experts; what is put before the experts' names, taken from them; excluded
EYES, REST = ("CLIPVisionModel", CLIP.vision_config), ["text_*", "visual_*", "logit*"]
CASES = {
    "clip vision": ("CLIPModel", CLIP, *EYES, "vision_model.", "", REST),
    "clip vision, deep text": ("CLIPModel", DEEP, *EYES, "vision_model.", "", REST),
    "clip text": (
        "CLIPModel",
        CLIP,
        "CLIPTextModel",
        CLIP.text_config,
        "text_model.",
        "",
        ["vis*", "text_p*", "logit*"],
    ),
    "siglip": ("SiglipModel", SIGLIP, "SiglipVisionModel", SIGLIP.vision_config, "vision_model.", "", REST),
    "clip in a bare tower": (*EYES, "CLIPModel", CLIP, "", "vision_model.", REST),
    "vit": ("ViTForImageClassification", VIT, "ViTModel", VIT, "vit.", "", ["classifier.*", "pooler.*"]),
    "vit, bare": ("ViTModel", VIT, "ViTForImageClassification", VIT, "", "vit.", ["classifier.*", "pooler.*"]),
    "bert": ("BertForSequenceClassification", BERT, "BertModel", BERT, "bert.", "", ["classifier.*"]),
    "bert, bare": ("BertModel", BERT, "BertForSequenceClassification", BERT, "", "bert.", ["classifier.*"]),
    "bert without pooler": ("BertForMaskedLM", BERT, "BertModel", BERT, "bert.", "", ["cls.*", "pooler.*"]),
    "llama": ("LlamaForCausalLM", LLAMA, "LlamaModel", LLAMA, "model.", "", ["lm_head.*"]),
    "llama, bare": ("LlamaModel", LLAMA, "LlamaForCausalLM", LLAMA, "", "model.", ["lm_head.*"]),
    "llava": ("LlamaForCausalLM", LLAMA, "LlavaForConditionalGeneration", LLAVA, "", "language_model.", ["[vm][iu]*"]),
    "in llava": (
        "LlavaForConditionalGeneration",
        LLAVA,
        "LlamaForCausalLM",
        LLAMA,
        "language_model.",
        "",
        ["[vm][iu]*"],
    ),
    "gpt2": ("GPT2LMHeadModel", GPT2, "GPT2Model", GPT2, "transformer.", "", ["lm_head.*"]),
    "bart": ("BartForConditionalGeneration", BART, "BartModel", BART, "model.", "", ["final_logits_bias"]),
}


@pytest.fixture(params=CASES)
def case(request, tmp_path):
    """Folders that save_pretrained wrote; and each expert's tensors, renamed by hand."""
    base_class, base_config, expert_class, expert_config, before, away, exclude = CASES[request.param]
    random_model(getattr(transformers, base_class), copy.deepcopy(base_config), 0).save_pretrained(tmp_path / "base")
    experts, by_hand = {}, {}
    for seed, task in enumerate(("one", "two"), start=1):
        network = random_model(getattr(transformers, expert_class), copy.deepcopy(expert_config), seed)
        network.save_pretrained(tmp_path / task)
        experts[task] = str(tmp_path / task)
        tensors = load_file(tmp_path / task / "model.safetensors")
        heads = () if request.param in {"bert", "in llava"} else ("classifier.", "pooler.", "lm_head.")
        by_hand[task] = {
            name if name.startswith(heads) else before + name.removeprefix(away): tensor
            for name, tensor in tensors.items()
        }
    return {"base": str(tmp_path / "base"), "experts": experts, "by hand": by_hand, "exclude": exclude}


def test_merged_is_what_renaming_by_hand_gives(case, tmp_path):
    transforms = [Ties(keep=0.5)]
    vectors = TaskVectors(case["base"], case["experts"], transforms, exclude=case["exclude"])
    by_hand = TaskVectors(case["base"], case["by hand"], transforms, exclude=case["exclude"])
    assert list(vectors) == list(by_hand) and len(vectors) >= 20
    assert all(isinstance(expert, RenamedCheckpoint) for expert in vectors.checkpoints.values())
    assert not any(isinstance(expert, RenamedCheckpoint) for expert in by_hand.checkpoints.values())
    for name in vectors:
        assert torch.equal(vectors[name].dense(), by_hand[name].dense())
        assert vectors[name].dense().abs().max() > 0
    vectors.check()
    for task, expert in vectors.checkpoints.items():
        assert expert.keys() == case["by hand"][task].keys()
        assert all(torch.equal(expert[name], tensor) for name, tensor in case["by hand"][task].items())
        assert expert.fingerprint == open_checkpoint(case["experts"][task]).fingerprint
        assert (expert.location, expert.sources) == (case["experts"][task], open_checkpoint(expert.location).sources)
    export(Coefficients(vectors, LayerWise(vectors, init=0.3)), tmp_path / "out")
    export(Coefficients(by_hand, LayerWise(by_hand, init=0.3)), tmp_path / "same")
    written, same = (load_file(tmp_path / place / "model.safetensors") for place in ("out", "same"))
    assert written.keys() == same.keys() == load_file(f"{case['base']}/model.safetensors").keys()
    assert all(torch.equal(written[name], same[name]) for name in same)
    name, own = next((name, own) for name, own in vectors.checkpoints["one"].names.items() if name != own)
    assert f", which calls '{name}' '{own}'" in (tmp_path / "out" / "README.md").read_text()


def test_a_state_dict_is_renamed_as_its_file_is(case):
    in_memory = {task: load_file(f"{place}/model.safetensors") for task, place in case["experts"].items()}
    vectors = TaskVectors(case["base"], in_memory, exclude=case["exclude"])
    from_disk = TaskVectors(case["base"], case["experts"], exclude=case["exclude"])
    assert all(torch.equal(vectors[name].dense(), from_disk[name].dense()) for name in from_disk)
    for task, checkpoint in vectors.checkpoints.items():
        assert checkpoint.fingerprint == from_disk.checkpoints[task].fingerprint
    again = TaskVectors(vectors.base, vectors.checkpoints, exclude=case["exclude"])
    assert all(again.checkpoints[task] is vectors.checkpoints[task] for task in in_memory), "renamed once"


def test_coefficients_are_in_the_bases_names_and_belong_to_the_experts_files(tmp_path):
    random_model(transformers.BertForMaskedLM, transformers.BertConfig(**ENCODER), 0).save_pretrained(tmp_path / "base")
    random_model(transformers.BertModel, transformers.BertConfig(**ENCODER), 1).save_pretrained(tmp_path / "one")
    vectors = TaskVectors(tmp_path / "base", {"one": tmp_path / "one"}, include=["bert.*"])
    path = tmp_path / "coefficients.safetensors"
    save_coefficients(Coefficients(vectors, LayerWise(vectors, init=0.25)), path)
    assert {name.split("/")[1].split(".")[0] for name in load_file(path)} == {"bert"}
    loaded = load_coefficients(path)
    assert loaded.task_vectors.checkpoints["one"].fingerprint == open_checkpoint(tmp_path / "one").fingerprint
    assert list(loaded.task_vectors) == list(vectors)


def base(*extra, width=4):
    names = [*(f"bert.encoder.layer.{i}.dense.weight" for i in range(3)), "bert.embeddings.word.weight", *extra]
    return {name: torch.randn(width, width, generator=torch.Generator().manual_seed(i)) for i, name in enumerate(names)}


def bare(tensors, **changed):
    found = {name.removeprefix("bert."): 2 * tensor for name, tensor in tensors.items()} | changed
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def test_what_agrees_is_untouched():
    tensors = base("head.dense.weight")
    one_block = {
        "bert.encoder.layer.1.dense.weight": torch.ones(4, 4),
        "encoder.layer.0.dense.weight": torch.ones(4, 4),
    }
    foreign = {"nothing.0.like": torch.ones(1), "own.dense.weight": torch.ones(4, 4)}
    for expert in (tensors, one_block, foreign, {"head.dense.weight": torch.ones(4, 4), "x.bias": torch.ones(1)}):
        opened = StateDict(expert)
        assert under_names_of(StateDict(tensors), opened) is opened
    assert open_checkpoint(opened) is opened


def test_an_adapter_is_renamed_by_its_own_class(lora):
    opened = open_checkpoint(lora.adapters["bert"], open_checkpoint(lora.bases["bert"]))
    assert isinstance(opened, AdapterCheckpoint)


def test_two_towers_of_the_same_blocks_are_not_guessed(tmp_path):
    tensors = base() | {name.replace("bert.", "image."): tensor for name, tensor in base().items()}
    save_file(bare(base()), tmp_path / "expert.safetensors")
    with pytest.raises(CheckpointError) as found:
        TaskVectors(tensors, {"one": tmp_path / "expert.safetensors"}, include=["bert.*"])
    first = str(found.value).splitlines()[0]
    assert "expert.safetensors' fits this base in several ways" in first
    for name in ("bert.encoder.layer.0.dense.weight", "image.encoder.layer.0.dense.weight"):
        assert f"'encoder.layer.0.dense.weight' as '{name}'" in first
    # what one tower alone has decides; not the shapes, which are not asked
    del tensors["image.embeddings.word.weight"]
    vectors = TaskVectors(tensors, {"one": tmp_path / "expert.safetensors"}, include=["bert.*"])
    assert len(vectors) == 4
    tensors["bert.encoder.layer.0.dense.weight"] = torch.ones(5, 4)
    with pytest.raises(CheckpointError) as found:
        TaskVectors(tensors, {"one": tmp_path / "expert.safetensors"}, include=["bert.*"])
    assert "'bert.encoder.layer.0.dense.weight', there 'encoder.layer.0.dense.weight', has another" in found.value.what
    assert (found.value.expected, found.value.got) == ((5, 4), (4, 4))


def test_a_file_that_needs_two_exchanges_is_refused():
    tensors = base() | {f"eyes.blocks.{i}.mlp.weight": torch.ones(2) for i in range(2)}
    expert = bare(base()) | {f"vision.eyes.blocks.{i}.mlp.weight": torch.zeros(2) for i in range(2)}
    with pytest.raises(CheckpointError, match="in several ways") as found:
        TaskVectors(tensors, {"one": expert})
    assert "'encoder.layer.0.dense.weight' as 'bert.encoder.layer.0.dense.weight'" in found.value.what
    assert "'vision.eyes.blocks.0.mlp.weight' as 'eyes.blocks.0.mlp.weight'" in found.value.what


def test_one_tensor_under_two_names_is_refused():
    tensors = base("embeddings.word.weight")
    expert = bare(base()) | {"bert.embeddings.word.weight": torch.ones(4, 4)}
    with pytest.raises(CheckpointError, match=r"'embeddings\.word\.weight' would be .*bert\.embeddings\.word\.weight"):
        TaskVectors(tensors, {"one": bare(base())})
    with pytest.raises(CheckpointError, match=r"'bert\.embeddings\.word\.weight', 'embeddings\.word\.weight' would be"):
        TaskVectors(base(), {"one": expert})


def test_heads_of_ones_own_keep_their_names():
    expert = bare(base(), **{"classifier.weight": torch.ones(3, 4), "classifier.dense.weight": torch.ones(4, 4)})
    opened = open_checkpoint(expert, StateDict(base("lm_head.dense.weight")))
    assert set(opened) == {*base(), "classifier.weight", "classifier.dense.weight"}
    assert torch.equal(opened["classifier.weight"], torch.ones(3, 4))
    assert opened.own_name("bert.embeddings.word.weight") == "embeddings.word.weight"
    with pytest.raises(CheckpointError, match="has no tensor 'encoder.layer.0.dense.weight'"):
        opened["encoder.layer.0.dense.weight"]


def test_values_that_are_not_finite_go_by_the_bases_names():
    broken = bare(base())
    broken["encoder.layer.1.dense.weight"][0, 0] = float("nan")
    with pytest.raises(
        CheckpointError, match=r"NaN or Inf in 1 of 4 tensors: 'bert\.encoder\.layer\.1\.dense\.weight' \(1\)"
    ):
        TaskVectors(base(), {"one": broken}).check()


@pytest.mark.parametrize("old", ["base", "expert"])
def test_norms_in_the_old_spelling_of_bert_are_the_same_tensors(old):
    """`gamma` and `beta` of a base that was converted long ago; its experts were saved later, or the other way round."""
    new = {"a.LayerNorm.weight": torch.ones(2), "a.LayerNorm.bias": torch.zeros(2), "a.dense.weight": torch.eye(2)}
    spelt = {
        name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): value
        for name, value in new.items()
    }
    base, expert = (spelt, new) if old == "base" else (new, spelt)
    found = under_names_of(StateDict(base), StateDict({name: value + 1 for name, value in expert.items()}))
    assert found.keys() == base.keys() and all(torch.equal(found[name], base[name] + 1) for name in base)
    both = StateDict({**new, **spelt})
    assert under_names_of(both, StateDict(new)).keys() == new.keys(), "a model of both spellings is what it is"
