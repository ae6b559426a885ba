"""Pico models of every backbone: a base folder and experts beside it, made from configs with random weights."""

from __future__ import annotations

import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from adamerge import backbones

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

CHAT = "{% for m in messages %}<s>{{ m['role'] }} {{ m['content'] }}</s>{% endfor %}{% if add_generation_prompt %}<s>assistant {% endif %}"
WORDS = ["<pad>", "<s>", "</s>", "<unk>", "<image>", "user", "assistant", *string.ascii_lowercase, *"0123456789.,?!"]
DECODER = dict(
    vocab_size=64,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=48,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
ENCODER = dict(
    vocab_size=64,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=48,
    pad_token_id=0,
)
VISION = dict(
    hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
)
CAUSAL: dict[str, Callable[[], Any]] = {
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=48, bos_token_id=1, eos_token_id=2
    ),
    "llama": lambda: transformers.LlamaConfig(**DECODER),
    "mistral": lambda: transformers.MistralConfig(**DECODER, sliding_window=8),
    "qwen2_tied": lambda: transformers.Qwen2Config(**DECODER, tie_word_embeddings=True),
    "qwen2": lambda: transformers.Qwen2Config(**DECODER, tie_word_embeddings=False),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
        **DECODER, head_dim=8, moe_intermediate_size=12, num_experts=4, num_experts_per_tok=2
    ),
}
TEXTS = ["hello world", "merge 3 models", "a much longer sentence, is it not?"]


def tokenizer(folder: Path, marked: bool = False) -> Any:
    """A tokenizer of single characters in ``folder``; ``marked`` puts <s> and </s> around every text."""
    vocabulary = {word: number for number, word in enumerate(WORDS)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.Split("", behavior="isolated")]
    )
    if marked:
        made.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    if marked:
        special |= {"cls_token": "<s>", "sep_token": "</s>"}
    found = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, extra_special_tokens=["<image>"], model_max_length=48, **special
    )
    found.chat_template = CHAT
    found.save_pretrained(folder)
    return found


def random_model(auto: Any, config: Any, seed: int) -> Any:
    """A network with random biases and norms too: zeros and ones would hide a wrong sign."""
    torch.manual_seed(seed)
    network = auto.from_config(config) if hasattr(auto, "from_config") else auto(config)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for name, buffer in network.named_buffers():
            if "running" in name:
                buffer.add_(0.3 * torch.rand_like(buffer))
    return network.eval()


def moved_expert(base: Path, folder: Path, seed: int) -> str:
    """An expert: the base's folder with every floating-point tensor moved a little."""
    folder.mkdir(parents=True)
    for file in base.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    generator = torch.Generator().manual_seed(seed)
    weights = load_file(base / "model.safetensors")
    moved = {
        name: value + 0.05 * torch.randn(value.shape, generator=generator) if value.is_floating_point() else value
        for name, value in weights.items()
    }
    save_file(moved, folder / "model.safetensors", {"format": "pt"})
    return str(folder)


def causal_pool(kind: str, folder: Path) -> dict[str, Any]:
    base = folder / "base"
    random_model(transformers.AutoModelForCausalLM, CAUSAL[kind](), 0).save_pretrained(base)
    tokenizer(base)
    experts = {task: moved_expert(base, folder / task, seed) for seed, task in enumerate(("one", "two"), 1)}
    return {
        "base": str(base),
        "experts": experts,
        "include": [],
        "exclude": [],
        "backbone": lambda dtype="float32": backbones.CausalLM(str(base), dtype),
        "samples": {"one": TEXTS, "two": [{"prompt": text[:4], "response": text[4:]} for text in TEXTS]},
        "loader": "AutoModelForCausalLM",
        "inputs": ("input_ids", "attention_mask"),
    }


def pico_pool(kind: str, folder: Path) -> dict[str, Any]:
    """Base and experts of one backbone in ``folder``.

    Returns:
        ``base``, ``experts``, ``include`` and ``exclude`` for TaskVectors; ``backbone``, a factory that may be given a
        dtype; ``samples`` by task; ``loader``, transformers' class; ``inputs``, what of the inputs its forward takes.
    """
    if kind in CAUSAL:
        return causal_pool(kind, folder)
    raise KeyError(kind)


KINDS = [*CAUSAL]
