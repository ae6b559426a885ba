"""Pico models of every backbone: a base folder and experts beside it, made from configs with random weights."""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from adamerge import backbones

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

CHAT = (
    "{% for m in messages %}<s>{{ m['role'] }} {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant {% endif %}"
)
IMAGE_CHAT = (
    "{% for m in messages %}<s>{{ m['role'] }} {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image>{% else %}{{ c['text'] }}{% endif %}{% endfor %}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant {% endif %}"
)
QWEN_NAMES = ["image", "vision_start", "vision_end", "video"]
QWEN_MARKS = ["<|image_pad|>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>"]
INTERN_MARKS = ["<IMG_CONTEXT>", "<img>", "</img>"]
WORDS = ["<pad>", "<s>", "</s>", "<unk>", "<image>", "user", "assistant", *string.ascii_lowercase, *"0123456789.,?!"]
WORDS += [*QWEN_MARKS, *INTERN_MARKS]
DECODER = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 48,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
ENCODER = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 48,
    "pad_token_id": 0,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
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
CLASSIFIERS: dict[str, tuple[str, Callable[[], Any]]] = {
    "bert": ("AutoModelForSequenceClassification", lambda: transformers.BertConfig(**ENCODER)),
    "bert_mlm": ("AutoModelForSequenceClassification", lambda: transformers.BertConfig(**ENCODER)),
    "roberta": (
        "AutoModelForSequenceClassification",
        lambda: transformers.RobertaConfig(**{**ENCODER, "pad_token_id": 3, "max_position_embeddings": 60}),
    ),
    "vit": ("AutoModelForImageClassification", lambda: transformers.ViTConfig(**VISION)),
    "resnet": (
        "AutoModelForImageClassification",
        lambda: transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"),
    ),
}
TEXTS = ["hello world", "merge 3 models", "a much longer sentence, is it not?"]


def tokenizer(folder: Path, marked: bool = False, special_tokens: Any = ("<image>",)) -> Any:
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
        tokenizer_object=made, extra_special_tokens=special_tokens, model_max_length=48, **special
    )
    found.chat_template = CHAT
    found.save_pretrained(folder)
    return found


def random_model(auto: Any, config: Any, seed: int) -> Any:
    """A network with random biases and norms too: zeros and ones would hide a wrong sign."""
    torch.manual_seed(seed)
    network = auto.from_config(config) if hasattr(auto, "from_config") else auto(config)
    if config.model_type == "t5" and config.is_gated_act:  # T5 1.1: whether its head is tied, the values decide
        network.lm_head.weight = torch.nn.Parameter(torch.randn(64, 16))
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
    pool = prepared(folder, transformers.AutoModelForCausalLM, CAUSAL[kind]())
    add_files(pool, tokenizer)
    return pool | {
        "backbone": lambda dtype="float32": backbones.CausalLM(pool["base"], dtype),
        "samples": {"one": TEXTS, "two": [{"prompt": text[:4], "response": text[4:]} for text in TEXTS]},
        "loader": "AutoModelForCausalLM",
        "inputs": ("input_ids", "attention_mask"),
    }


def prepared(folder: Path, auto: Any, config: Any, seeds: Sequence[int] = (1, 2)) -> dict[str, Any]:
    """A base and two experts that differ from it in all tensors."""
    base = folder / "base"
    random_model(auto, config, 0).save_pretrained(base)
    experts = {task: moved_expert(base, folder / task, seed) for task, seed in zip(("one", "two"), seeds, strict=True)}
    return {"base": str(base), "experts": experts, "include": [], "exclude": []}


def add_files(pool: dict[str, Any], *makers: Callable[[Path], Any]) -> None:
    """Tokenizer and processor files, in all folders."""
    for folder in (pool["base"], *pool["experts"].values()):
        for maker in makers:
            maker(Path(folder))


def with_classes(folder: Path, auto: Any, config: Any, seed: int, classes: int) -> None:
    """Give an expert's folder a head of so many classes, random, and a config that says so."""
    config = type(config)(**{**config.to_dict(), "num_labels": classes})
    own = random_model(auto, config, 50 + seed)
    own.save_pretrained(folder / "made")
    made, weights = load_file(folder / "made" / "model.safetensors"), load_file(folder / "model.safetensors")
    heads = {name: value for name, value in made.items() if name.split(".")[0] in {"classifier", "score"}}
    poolers = {name: value for name, value in made.items() if ".pooler." in name and name not in weights}
    trunk = {name: value for name, value in weights.items() if name.split(".")[0] not in {"classifier", "score", "cls"}}
    save_file(trunk | heads | poolers, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text((folder / "made" / "config.json").read_text())
    for file in (folder / "made").iterdir():
        file.unlink()
    (folder / "made").rmdir()


def pictures(count: int = 3, seed: int = 0) -> list[Image.Image]:
    generator = numpy.random.default_rng(seed)
    return [Image.fromarray(generator.integers(0, 256, (20, 24, 3), dtype=numpy.uint8)) for _ in range(count)]


def classifier_pool(kind: str, folder: Path) -> dict[str, Any]:
    loader, config = CLASSIFIERS[kind]
    auto = getattr(transformers, loader)
    made = config()
    pool = prepared(folder, transformers.AutoModelForMaskedLM if kind == "bert_mlm" else auto, made)
    for seed, (task, classes) in enumerate((("one", 3), ("two", 4))):
        with_classes(Path(pool["experts"][task]), auto, made, seed, classes)
    pool |= {
        "exclude": [
            *(["bert.pooler.*"] if kind == "bert_mlm" else []),
            "classifier.*",
            "cls.*",
            "*.running_mean",
            "*.running_var",
        ],
        "loader": loader,
    }
    if kind in {"vit", "resnet"}:
        processor = (
            transformers.ViTImageProcessor(size={"height": 16, "width": 16})
            if kind == "vit"
            else transformers.ConvNextImageProcessor(size={"shortest_edge": 16}, crop_pct=0.875)
        )
        add_files(pool, processor.save_pretrained)
        samples: list[Any] = pictures()
        return pool | {
            "backbone": lambda dtype="float32": backbones.ImageClassifier(pool["base"], dtype),
            "samples": {"one": samples, "two": samples[::-1]},
            "inputs": ("pixel_values",),
        }
    add_files(pool, lambda place: tokenizer(place, marked=True))
    return pool | {
        "backbone": lambda dtype="float32": backbones.SequenceClassifier(pool["base"], dtype),
        "samples": {"one": TEXTS, "two": [{"sentence1": text, "sentence2": text[:5]} for text in TEXTS]},
        "inputs": ("input_ids", "attention_mask"),
    }


def sentence_pool(folder: Path) -> dict[str, Any]:
    pool = prepared(folder, transformers.AutoModel, transformers.BertConfig(**ENCODER))
    add_files(pool, lambda place: tokenizer(place, marked=True))
    return pool | {
        "exclude": ["pooler.*"],
        "backbone": lambda dtype="float32": backbones.SentenceClassifier(pool["base"], dtype),
        "samples": {"one": TEXTS, "two": TEXTS[::-1]},
        "loader": "AutoModel",
        "inputs": ("input_ids", "attention_mask"),
    }


def clip_pool(folder: Path) -> dict[str, Any]:
    text = {name: value for name, value in ENCODER.items() if name != "pad_token_id"}
    config = transformers.CLIPConfig(
        text_config=text | {"bos_token_id": 1, "eos_token_id": 2}, vision_config=VISION, projection_dim=16
    )
    pool = prepared(folder, transformers.CLIPModel, config)
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    add_files(pool, processor.save_pretrained, lambda place: tokenizer(place, marked=True))
    return pool | {
        "include": ["vision_model.*"],
        "backbone": lambda dtype="float32": backbones.ClipVisionClassifier(pool["base"], dtype),
        "samples": {"one": pictures(), "two": pictures(seed=1)},
        "loader": "CLIPModel",
        "inputs": ("pixel_values",),
    }


def seq2seq_pool(kind: str, folder: Path) -> dict[str, Any]:
    tied = {"t5": {}, "t5_untied": {"tie_word_embeddings": False, "feed_forward_proj": "gated-gelu"}}[kind]
    config = transformers.T5Config(
        **{"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2},
        **{"decoder_start_token_id": 0, "eos_token_id": 2},
        **tied,
    )
    pool = prepared(folder, transformers.AutoModelForSeq2SeqLM, config)
    add_files(pool, lambda place: tokenizer(place, marked=True))
    return pool | {
        "backbone": lambda dtype="float32": backbones.Seq2Seq(pool["base"], dtype),
        "samples": {"one": [{"prompt": text, "response": text[:4]} for text in TEXTS], "two": TEXTS},
        "loader": "AutoModelForSeq2SeqLM",
        "inputs": ("input_ids", "attention_mask", "decoder_input_ids"),
    }


def questions(images: Sequence[Image.Image]) -> dict[str, list[dict[str, Any]]]:
    """Samples by task: the same questions about the images, answered and not."""
    samples = [
        {"image": image, "question": "what?", "response": text[:6]} for image, text in zip(images, TEXTS, strict=True)
    ]
    return {"one": samples, "two": [sample | {"response": None} for sample in samples]}


def vision_language_pool(config: Any, make: Callable[[Path], Any], inputs: Sequence[str], folder: Path) -> Any:
    """What is common to models that read an image in pieces, as many as its size asks for."""
    pool = prepared(folder, transformers.AutoModelForImageTextToText, config)
    add_files(pool, lambda place: make(place).save_pretrained(place))
    return pool | {
        "backbone": lambda dtype="float32": backbones.VisionLanguage(pool["base"], dtype),
        "samples": questions(pictures_of_sizes()),
        "loader": "AutoModelForImageTextToText",
        "inputs": ("input_ids", "attention_mask", "pixel_values", *inputs),
    }


def pictures_of_sizes() -> list[Image.Image]:
    sizes = [(16, 16), (32, 16), (16, 24)]
    return [image.resize(size) for image, size in zip(pictures(), sizes, strict=True)]


def qwen2_vl_pool(folder: Path, tied: bool = False, decoder: Mapping[str, Any] = DECODER) -> dict[str, Any]:
    config = transformers.Qwen2VLConfig(
        text_config={**decoder, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1]}},
        vision_config={"depth": 2, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "patch_size": 4},
        tie_word_embeddings=tied,
        **{f"{name}_token_id": WORDS.index(mark) for name, mark in zip(QWEN_NAMES, QWEN_MARKS, strict=True)},
    )

    def processor(place: Path) -> Any:
        sizes = {"patch_size": 4, "size": {"shortest_edge": 64, "longest_edge": 512}}
        return transformers.Qwen2VLProcessor(
            transformers.Qwen2VLImageProcessor(**sizes),
            tokenizer(place, special_tokens=QWEN_MARKS),
            transformers.Qwen2VLVideoProcessor(**sizes),
            chat_template=IMAGE_CHAT.replace("<image>", "<|vision_start|><|image_pad|><|vision_end|>"),
        )

    pool = vision_language_pool(config, processor, ("image_grid_thw", "mm_token_type_ids"), folder)
    return pool | {"include": ["model.*", "lm_head*"]}


def internvl_pool(folder: Path, decoder: Mapping[str, Any] = DECODER) -> dict[str, Any]:
    config = transformers.InternVLConfig(
        text_config={**decoder, "model_type": "qwen2"},
        vision_config=VISION | {"patch_size": 4},
        image_token_id=WORDS.index("<IMG_CONTEXT>"),
        image_seq_length=4,
    )

    def processor(place: Path) -> Any:
        named = dict(zip(("context_image_token", "start_image_token", "end_image_token"), INTERN_MARKS, strict=True))
        return transformers.InternVLProcessor(
            transformers.GotOcr2ImageProcessor(size={"height": 16, "width": 16}, max_patches=2),
            tokenizer(place, special_tokens=named | {"video_token": "<|video_pad|>"}),
            transformers.InternVLVideoProcessor(size={"height": 16, "width": 16}),
            image_seq_length=4,
            chat_template=IMAGE_CHAT.replace("<image>", "<IMG_CONTEXT>"),
        )

    return vision_language_pool(config, processor, (), folder) | {"include": ["language_model.*"]}


def llava_pool(folder: Path) -> dict[str, Any]:
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**DECODER),
        vision_config=transformers.CLIPVisionConfig(**VISION),
        image_token_id=4,
    )
    pool = prepared(folder, transformers.LlavaForConditionalGeneration, config)

    def processor(place: Path) -> None:
        transformers.LlavaProcessor(
            transformers.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
            tokenizer(place),
            patch_size=8,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=IMAGE_CHAT,
        ).save_pretrained(place)

    add_files(pool, processor)
    return pool | {
        "include": ["*language_model.*", "*lm_head*"],
        "backbone": lambda dtype="float32": backbones.VisionLanguage(pool["base"], dtype),
        "samples": questions(pictures()),
        "loader": "AutoModelForImageTextToText",
        "inputs": ("input_ids", "attention_mask", "pixel_values"),
    }


OTHERS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "sentence": sentence_pool,
    "clip": clip_pool,
    "llava": llava_pool,
    "qwen2_vl": qwen2_vl_pool,
    "qwen2_vl_tied": partial(qwen2_vl_pool, tied=True),
    "internvl": internvl_pool,
}


def pico_pool(kind: str, folder: Path) -> dict[str, Any]:
    """Base and experts of one backbone in ``folder``.

    Returns:
        ``base``, ``experts``, ``include`` and ``exclude`` for TaskVectors; ``backbone``, a factory that may be given a
        dtype; ``samples`` by task; ``loader``, transformers' class; ``inputs``, what of the inputs its forward takes.
    """
    if kind in CAUSAL:
        return causal_pool(kind, folder)
    if kind in CLASSIFIERS:
        return classifier_pool(kind, folder)
    if kind in {"t5", "t5_untied"}:
        return seq2seq_pool(kind, folder)
    return OTHERS[kind](folder)


TASKS = {
    "one": SimpleNamespace(classnames=["red", "green", "blue"], templates=["a {}", "the {} one"]),
    "two": SimpleNamespace(classnames=["up", "down", "left", "right"], templates=["{}"]),
}
VISION_LANGUAGE = ["llava", "qwen2_vl", "internvl"]
KINDS = [*CAUSAL, *CLASSIFIERS, "sentence", "clip", "t5", "t5_untied", *VISION_LANGUAGE]
