"""What enters linear maps: as hooks of one's own see it, sample by sample and without padding, in six families."""

from __future__ import annotations

import pytest
import torch
from pico import pico_pool
from test_matrix import open_clip_pool
from torch import nn
from toys import ToyLanguage, toy_weights
from transformers.pytorch_utils import Conv1D

from adamerge.backbones import Backbone
from adamerge.backbones.inputs import stack

FAMILIES = ["open_clip", "gpt2", "llama", "bert", "t5", "clip"]
STREAMS = {
    "open_clip": {"attn.out_proj": "", "mlp.c_proj": "ln_2"},
    "gpt2": {"attn.c_proj": "ln_1", "mlp.c_proj": "ln_2"},
    "llama": {"self_attn.o_proj": "input_layernorm", "mlp.down_proj": "post_attention_layernorm"},
    "bert": {"attention.output.dense": "", "output.dense": "intermediate.dense"},
    "t5": {"SelfAttention.o": "layer_norm", "EncDecAttention.o": "layer_norm", "DenseReluDense.wo": "layer_norm"},
    "clip": {"self_attn.out_proj": "layer_norm1", "mlp.fc2": "layer_norm2"},
}
"""Of each map that writes into the residual stream the module of its block that the stream enters; the block for none."""


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    pool = open_clip_pool(folder) if request.param == "open_clip" else pico_pool(request.param, folder)
    backbone: Backbone = pool["backbone"]()
    samples = [backbone.preprocess(sample) for sample in pool["samples"]["one"]]
    return request.param, backbone, samples


def hooked(backbone, samples, modules):
    """What enters modules, row by row, when each sample runs alone: no padding, but what T5 does not predict."""
    rows = {name: [] for name in modules}
    for sample in samples:
        entered, handles = {}, []
        for name, module in modules.items():
            hook = module.register_forward_pre_hook(
                lambda module, args, kwargs, name=name, entered=entered: entered.update(
                    {name: args[0] if args else kwargs["hidden_states"]}
                ),
                with_kwargs=True,
            )
            handles.append(hook)
        with torch.no_grad():
            backbone.encode(stack([sample]))
        for handle in handles:
            handle.remove()
        for name, values in entered.items():
            counted = len(values.reshape(-1, values.shape[-1]))
            if name.startswith("decoder") and "EncDecAttention.k" not in name and "EncDecAttention.v" not in name:
                counted = int(sample["decoder_attention_mask"].sum())
            rows[name].append(values.reshape(-1, values.shape[-1])[:counted].double())
    return {name: torch.cat(own) for name, own in rows.items()}


def near(found, expected):
    """Batches of other shapes round otherwise; a wrong position is off by as much as the numbers themselves."""
    assert found.dtype == torch.float32 and found.shape == expected.shape
    return (found.double() - expected).abs().max() <= 1e-4 * max(1.0, float(expected.abs().max()))


def test_inputs_are_those_of_hooks_without_padding(family):
    kind, backbone, samples = family
    names = {id(tensor): name for name, tensor in backbone.tensors().items()}
    layers = [module for module in backbone.network.modules() if isinstance(module, nn.Linear | Conv1D)]
    modules = {names[id(own.weight)]: own for own in layers if id(own.weight) in names}
    expected = {name: rows for name, rows in hooked_some(backbone, samples, modules).items() if len(rows)}
    batch = stack(samples)
    with torch.no_grad(), backbone.capture(backbone.tensors(), batch) as capture:
        backbone.encode(batch)
    inside = {name for name in capture.inputs if "attn.out_proj" in name or "in_proj" in name}
    assert set(expected) - set(capture.inputs) == set()
    if kind != "open_clip":
        assert set(capture.inputs) == set(expected)
    else:  # of nn.MultiheadAttention nothing is called that a hook could be on: see test_linears.py
        assert len(inside) == 4 and set(capture.inputs) - set(expected) - inside == {"visual.proj"}
    for name, rows in expected.items():
        assert near(capture.inputs[name], rows), name


def hooked_some(backbone, samples, modules):
    """The same of those modules that run."""
    ran = set()
    handles = [
        module.register_forward_pre_hook(lambda module, args, name=name: ran.add(name))
        for name, module in modules.items()
    ]
    with torch.no_grad():
        backbone.encode(stack(samples[:1]))
    for handle in handles:
        handle.remove()
    return hooked(backbone, samples, {name: module for name, module in modules.items() if name in ran})


def test_groups_share_their_inputs_and_know_the_stream_that_they_write_into(family):
    kind, backbone, samples = family
    batch = stack(samples)
    groups = backbone.linear_maps(stack(samples[:1]))
    maps = [one for group in groups for one in group]
    found = {one.weight for one in maps if one.streams}
    wanted = {name: STREAMS[kind][end] for name in (one.weight for one in maps) if (end := ending(name, kind))}
    assert found == wanted.keys() and len(found) == (10 if kind == "t5" else 4)
    modules = {name: place_of(backbone, name, kind, inner) for name, inner in wanted.items()}
    streams = hooked(backbone, samples, modules)
    with torch.no_grad(), backbone.capture([one.weight for one in maps], batch) as whole:
        backbone.encode(batch)
    for group in groups:
        with torch.no_grad(), backbone.capture_group(group, batch) as capture:
            backbone.encode(batch)
            raise AssertionError("the pass was to end")
        for one in group:
            assert torch.equal(capture.entered.inputs, whole.inputs[one.weight]), one
            assert (one.weight in capture.entered.streams) == one.streams
            if one.streams:
                assert near(capture.entered.streams[one.weight], streams[one.weight]), one


def ending(name, kind):
    ends = [end for end in STREAMS[kind] if name.removesuffix(".weight").endswith(end)]
    return max(ends, key=len, default=None)


def place_of(backbone, name, kind, inner):
    """The module that the stream enters which the map of this weight writes into."""
    module = name.removesuffix(".weight")
    names = dict(backbone.network.named_modules())
    prefix = next(p for p in ("", "transformer.", "model.", "bert.") if f"{p}{module}" in names)
    block = f"{prefix}{module}".removesuffix(f".{ending(name, kind)}")
    return names[f"{block}.{inner}" if inner else block]


def test_a_map_that_runs_twice_has_both_inputs_and_what_is_none_is_not_captured():
    backbone = ToyLanguage()
    backbone.network.load_state_dict(toy_weights(())[0])
    backbone.network.blocks[1] = backbone.network.blocks[0]
    tokens = torch.tensor([[1, 2, 3]])
    with backbone.capture(["blocks.0.weight", "embed.weight", "blocks.0.bias"], {"tokens": tokens}) as capture:
        backbone.encode({"tokens": tokens, "counts": tokens > 0})
    states = backbone.network.embed(tokens)
    second = torch.tanh(backbone.network.blocks[0](states))
    assert capture.inputs.keys() == {"blocks.0.weight"}
    assert torch.equal(capture.inputs["blocks.0.weight"], torch.cat([states, second], dim=1)[0])
    assert capture.inputs["blocks.0.weight"].requires_grad, "an objective of layers may pull on it"


def test_bf16_is_captured_as_fp32_and_an_error_inside_is_not_swallowed():
    backbone = ToyLanguage("bfloat16")
    tokens = torch.tensor([[1, 2, 3]])
    batch = {"tokens": tokens, "counts": tokens > 0}
    groups = backbone.linear_maps(batch)
    with torch.no_grad(), backbone.capture_group(groups[1], batch) as capture:
        backbone.encode(batch)
    assert capture.entered.inputs.dtype == torch.float32 and capture.entered.streams == {}
    with pytest.raises(ZeroDivisionError), backbone.capture_group(groups[1], batch):
        _ = 1 / 0


def test_the_mask_decides_where_lengths_are_equal():
    """Text and target of one length: whose padding it is follows from the weight's name."""
    from adamerge.backbones import Seq2Seq

    text, target = torch.tensor([[1, 1, 0]]), torch.tensor([[1, 0, 0]])
    inputs = {"attention_mask": text, "decoder_attention_mask": target}
    asked = [
        ("encoder.block.0.layer.0.SelfAttention.q.weight", text),
        ("decoder.block.0.layer.1.EncDecAttention.v.weight", text),
        ("decoder.block.0.layer.1.EncDecAttention.q.weight", target),
        ("model.encoder.layers.0.fc1.weight", text),
        ("model.decoder.layers.0.encoder_attn.k_proj.weight", text),
        ("model.decoder.layers.0.encoder_attn.q_proj.weight", target),
    ]
    for name, mask in asked:
        assert torch.equal(Seq2Seq.attended(None, inputs, name)[0], mask.bool()), name
