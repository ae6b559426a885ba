"""The language head: shares the network's parameters, and lets gradients through to them."""

import torch
import transformers
from pico import DECODER, random_model

from adamerge.backbones.language_head import LanguageHead


def test_it_is_the_network_without_its_trunk():
    network = random_model(transformers.AutoModelForCausalLM, transformers.LlamaConfig(**DECODER), 0)
    head = LanguageHead(network, "model")
    features = torch.randn(2, 5, 16)
    expected = features @ network.lm_head.weight.T
    assert torch.allclose(head(features), expected, atol=1e-6)
    assert [name for name, _ in head.named_parameters()] == ["rest.lm_head.weight"]
    assert next(head.parameters()) is network.lm_head.weight
    assert isinstance(network.model, transformers.LlamaModel)  # the network itself keeps its trunk
    head(features).sum().backward()
    assert network.lm_head.weight.grad is not None and network.model.embed_tokens.weight.grad is None


def test_t5_scales_before_it_projects():
    config = transformers.T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
    network = random_model(transformers.AutoModelForSeq2SeqLM, config, 0)
    features = torch.randn(2, 3, 16)
    found = LanguageHead(network, "decoder")(features, encoder_outputs=(features,))
    assert torch.allclose(found, features * 16**-0.5 @ network.shared.weight.T, atol=1e-6)
