"""What the tests of LoRA experts share: tiny transformers models, and adapters that peft itself wrote for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn


def tiny(kind: str) -> nn.Module:
    """A network with random weights, biases and norms too."""
    import transformers as hf

    torch.manual_seed(0)
    small = {"num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 32, "hidden_size": 16}
    if kind == "bert":
        config = hf.BertConfig(**small, intermediate_size=24, max_position_embeddings=16, num_labels=3)
        network: nn.Module = hf.BertForSequenceClassification(config)
    elif kind == "gpt2":
        own = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 16, "bos_token_id": 0, "eos_token_id": 0}
        network = hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=32, **own))
    else:
        llama = hf.LlamaConfig(**small, intermediate_size=24, num_key_value_heads=1, tie_word_embeddings=False)
        network = hf.LlamaForCausalLM(llama)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return network.eval()


def save_base(kind: str, folder: Path) -> Path:
    """The network of ``tiny`` as a folder."""
    tiny(kind).save_pretrained(folder)
    return folder


def save_adapter(kind: str, folder: Path, seed: int = 1, **config: Any) -> dict[str, torch.Tensor]:
    """An adapter whose factors (and whatever else it trains) are random, as a folder; and the weights merged by peft."""
    import peft

    network = tiny(kind)
    torch.manual_seed(seed)
    adapted = peft.get_peft_model(network, peft.LoraConfig(**config))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    adapted.save_pretrained(folder)
    return {name: value.detach().clone() for name, value in adapted.merge_and_unload().state_dict().items()}


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("bert", {"r": 4, "lora_alpha": 6, "target_modules": ["query", "dense"]}),
    "bert rslora": ("bert", {"r": 4, "use_rslora": True, "target_modules": ["value"]}),
    "bert patterns": ("bert", {
        "r": 3, "lora_alpha": 5, "target_modules": ["query", "value", "intermediate.dense"],
        "rank_pattern": {"query": 2, "layer.1.intermediate.dense": 5}, "use_rslora": True,
        "alpha_pattern": {r"layer\.\d+\.attention\.self\.value": 7, "^bert.encoder.layer.0.attention.self.query": 1},
    }),
    "bert head": ("bert", {"r": 2, "target_modules": ["key"], "modules_to_save": ["classifier"]}),
    "bert biases": ("bert", {"r": 2, "target_modules": ["key"], "bias": "lora_only"}),
    "bert embedding": ("bert", {"r": 2, "target_modules": ["word_embeddings", "key"]}),
    "gpt2": ("gpt2", {"r": 4, "lora_alpha": 3, "target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "gpt2 square": ("gpt2", {"r": 4, "target_modules": ["attn.c_proj"], "fan_in_fan_out": True}),
    "llama": ("llama", {"r": 4, "target_modules": ["q_proj", "k_proj", "o_proj", "down_proj", "lm_head"]}),
    "llama patterns": ("llama", {
        "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "up_proj"], "rank_pattern": {"layers.1.self_attn.q_proj": 3},
    }),
}  # fmt: skip
"""Kind of model and LoraConfig, by name."""
