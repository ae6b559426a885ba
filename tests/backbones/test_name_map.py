"""On-disk names: views of the network's own parameters, one name per storage, as the base's file has them."""

import pytest
import torch
import transformers
from pico import CAUSAL, DECODER, ENCODER, pico_pool, random_model, tokenizer
from safetensors.torch import load_file, save_file

from adamerge import LayerWise, MergedModel, TaskVectors
from adamerge.artifacts.coefficients import Coefficients
from adamerge.artifacts.export import export
from adamerge.backbones import CausalLM, SequenceClassifier
from adamerge.backbones.inputs import stack
from adamerge.backbones.name_map import names_of
from adamerge.errors import CheckpointError


def folder_of(config, place, auto=transformers.AutoModelForCausalLM):
    network = random_model(auto, config, 0)
    network.save_pretrained(place)
    tokenizer(place)
    return network


@pytest.mark.parametrize("kind", ["gpt2", "qwen2_tied", "qwen3_moe"])
def test_every_tensor_of_the_file_is_a_piece_of_a_parameter(kind, tmp_path):
    folder_of(CAUSAL[kind](), tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    backbone = CausalLM(str(tmp_path))
    tensors = backbone.tensors()
    assert tensors.keys() == weights.keys()
    owners = {id(parameter) for parameter in backbone.network.parameters()}
    for name, tensor in tensors.items():
        assert torch.equal(tensor, weights[name])
        assert id(tensor if tensor._base is None else tensor._base) in owners
    assert sum(tensor.numel() for tensor in tensors.values()) == sum(p.numel() for p in backbone.network.parameters())


def test_gradients_of_experts_that_are_fused_in_memory_are_those_of_autograd(tmp_path):
    """dL/dc of every on-disk tensor, against a merge inside the graph through torch's own functional call."""
    pool = pico_pool("qwen3_moe", tmp_path)
    backbone = pool["backbone"]()
    vectors = TaskVectors(pool["base"], pool["experts"])
    merged = MergedModel(backbone, vectors, LayerWise(vectors, init=0.3))
    inputs = stack([backbone.preprocess(sample) for sample in pool["samples"]["one"]])
    merged.merge()
    output = backbone.output(merged(inputs), "one")
    loss = output.mean(output.logits.logsumexp(dim=-1) - output.logits[..., 7]).sum()
    loss.backward()
    merged.pull_back(loss.detach()).backward()
    mine = gradients(merged)

    base, experts = load_file(f"{pool['base']}/model.safetensors"), pool["experts"].values()
    others = [load_file(f"{expert}/model.safetensors") for expert in experts]
    names = sorted(base)
    coefficients = torch.full((2, len(names)), 0.3, requires_grad=True)
    theta = {
        name: base[name] + sum(coefficients[k, i] * (other[name] - base[name]) for k, other in enumerate(others))
        for i, name in enumerate(names)
    }
    fused = {}
    for name in list(theta):
        layer, marker, rest = name.partition(".mlp.experts.")
        if marker:
            number, projection = rest.split(".")[0], rest.split(".")[1]
            fused.setdefault(layer, {}).setdefault(projection, {})[int(number)] = theta.pop(name)
    for layer, parts in fused.items():
        rows = {part: torch.stack([values[i] for i in range(len(values))]) for part, values in parts.items()}
        theta[f"{layer}.mlp.experts.gate_up_proj"] = torch.cat([rows["gate_proj"], rows["up_proj"]], dim=1)
        theta[f"{layer}.mlp.experts.down_proj"] = rows["down_proj"]
    network = transformers.AutoModelForCausalLM.from_pretrained(pool["base"]).eval()
    logits = torch.func.functional_call(
        network, theta, kwargs={"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
    ).logits
    counted = output.mask.float()
    rows = ((logits.logsumexp(dim=-1) - logits[..., 7]) * counted).sum(dim=1) / counted.sum(dim=1)
    rows.sum().backward()
    assert float(rows.detach().sum()) == pytest.approx(float(loss), rel=1e-5)
    table = {name: coefficients.grad[:, i] for i, name in enumerate(names)}
    largest = max(float(value.abs().max()) for value in table.values())
    assert set(mine) == set(table)
    assert any(".mlp.experts." in name for name in mine)
    for name, value in table.items():
        assert (mine[name] - value).abs().max() <= 1e-5 * largest, name


def gradients(merged):
    """Group to ``(experts,)`` gradient of its raw values."""
    parametrization = merged.parametrization
    kept = [p.detach().clone() for p in parametrization.parameters()]
    with torch.no_grad():
        for parameter in parametrization.parameters():
            parameter.copy_(parameter.grad)
    found = {group: value.detach().clone().squeeze(-1) for group, value in parametrization.values().items()}
    with torch.no_grad():
        for parameter, before in zip(parametrization.parameters(), kept, strict=True):
            parameter.copy_(before)
    return found


@pytest.mark.parametrize("values", ["equal", "different"])
def test_a_file_with_both_names_of_a_tie(values, tmp_path):
    """Equal values are one tensor, merged once and written twice; different ones are two."""
    base = tmp_path / "base"
    folder_of(CAUSAL["gpt2"](), base)
    weights = load_file(base / "model.safetensors")
    extra = {"lm_head.weight": weights["transformer.wte.weight"] * (1 if values == "equal" else 0.5)}
    save_file(
        {name: value.clone() for name, value in (weights | extra).items()}, base / "model.safetensors", {"format": "pt"}
    )
    backbone = CausalLM(str(base))
    assert backbone.ignores("lm_head.weight") == (values == "equal")
    assert ("lm_head.weight" in backbone.tensors()) == (values == "different")
    if values == "equal":
        assert backbone.layout().copies == {"lm_head.weight": "transformer.wte.weight"}
        assert not backbone.trains("lm_head.weight")
        expert = {name: value + 0.1 for name, value in load_file(base / "model.safetensors").items()}
        vectors = TaskVectors(str(base), {"one": expert}, exclude=["lm_head.weight"])
        merged = MergedModel(backbone, vectors, LayerWise(vectors, init=0.3))
        export(Coefficients(vectors, merged.parametrization, backbone.layout()), tmp_path / "out")
        written = load_file(tmp_path / "out" / "model.safetensors")
        assert torch.equal(written["lm_head.weight"], written["transformer.wte.weight"])
        assert not torch.equal(written["lm_head.weight"], weights["transformer.wte.weight"])


@pytest.mark.parametrize("change", [lambda n: n.removeprefix("transformer."), lambda n: n])
def test_the_prefix_of_the_bare_model_may_be_there_or_not(change, tmp_path):
    folder_of(CAUSAL["gpt2"](), tmp_path)
    weights = {change(name): value for name, value in load_file(tmp_path / "model.safetensors").items()}
    weights |= {f"{change('transformer.h.0')}.attn.bias": torch.ones(1, 1, 48, 48)}  # a mask of old versions
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    backbone = CausalLM(str(tmp_path))
    mask = f"{change('transformer.h.0')}.attn.bias"
    assert backbone.tensors().keys() == weights.keys() - {mask}
    assert backbone.ignores(mask) and not backbone.trains(mask)


def test_old_names_of_norms_are_kept(tmp_path):
    folder_of(transformers.BertConfig(**ENCODER), tmp_path, transformers.AutoModelForSequenceClassification)
    weights = load_file(tmp_path / "model.safetensors")
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
        for name, value in weights.items()
    }
    save_file(old, tmp_path / "model.safetensors", {"format": "pt"})
    backbone = SequenceClassifier(str(tmp_path))
    assert set(backbone.tensors()) == {name for name in old if not name.startswith("classifier.")}
    assert all(torch.equal(tensor, old[name]) for name, tensor in backbone.tensors().items())


# of one model, as its published files have them, and as its parameters are called in memory
PREFIXES = {
    "qwen2_vl": [("model.", "visual.", "lm_head."), ("model.language_model.", "model.visual.", "lm_head.")],
    "internvl": [
        ("language_model.model.", "vision_tower.", "multi_modal_projector."),
        ("model.language_model.", "model.vision_tower.", "model.multi_modal_projector."),
    ],
}


@pytest.mark.parametrize("wanted", [0, 1])
@pytest.mark.parametrize("kind", PREFIXES)
def test_names_of_both_kinds_of_files_are_kept(kind, wanted, tmp_path):
    pool = pico_pool(kind, tmp_path / "pool")
    old, new = PREFIXES[kind][0], PREFIXES[kind][wanted]
    for folder in (pool["base"], *pool["experts"].values()):
        weights = load_file(f"{folder}/model.safetensors")
        assert {next(prefix for prefix in old if name.startswith(prefix)) for name in weights} == set(old)
        renamed = {}
        for name, value in weights.items():
            place = next(i for i, prefix in enumerate(old) if name.startswith(prefix))
            renamed[new[place] + name.removeprefix(old[place])] = value
        save_file(renamed, f"{folder}/model.safetensors", {"format": "pt"})
    backbone, base = pool["backbone"](), load_file(f"{pool['base']}/model.safetensors")
    assert backbone.tensors().keys() == base.keys() and not backbone.names.strangers
    assert all(torch.equal(tensor, base[name]) for name, tensor in backbone.tensors().items())
    include = [f"{new[0]}layers.*_proj.weight"]
    vectors = TaskVectors(pool["base"], pool["experts"], include=include)
    assert len(vectors) == 14
    made = Coefficients(vectors, LayerWise(vectors, init=0.3), backbone.layout())
    written = load_file(export(made, tmp_path / "out") / "model.safetensors")
    assert written.keys() == base.keys()
    moved = {name for name, value in written.items() if not torch.equal(value, base[name])}
    assert moved == set(vectors)
    again, information = transformers.AutoModelForImageTextToText.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(information.values()) and again.num_parameters() == backbone.network.num_parameters()


def test_what_is_permuted_in_memory_is_refused_with_the_tensors_name(tmp_path, monkeypatch):
    network = folder_of(transformers.LlamaConfig(**DECODER), tmp_path)
    name = "model.layers.0.self_attn.q_proj.weight"

    def permuted(model, state):
        return {key: value.flip(0) if key == name else value for key, value in state.items()}

    monkeypatch.setattr("transformers.core_model_loading.revert_weight_conversion", permuted)
    with pytest.raises(CheckpointError, match=name):
        names_of(network, load_file(tmp_path / "model.safetensors"))
