"""Stand-ins for published checkpoints and data: the real architecture's tensor names at pico width, and its data's shape."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import open_clip
import torch
import yaml
from open_clip.tokenizer import SimpleTokenizer
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer, CLIPVisionModel

from adamerge.data import ImageTask


def pico_open_clip(folder: Path, architecture: str) -> Path:
    """An open_clip folder as deep as ``architecture``, 8 to 16 wide, random."""
    config = copy.deepcopy(open_clip.get_model_config(architecture))
    config["embed_dim"] = 8
    config["vision_cfg"] |= {"image_size": 16, "patch_size": 8, "width": 16, "head_width": 8}
    config["text_cfg"] |= {"context_length": 8, "width": 8, "heads": 1}
    folder.mkdir(parents=True)
    preprocess = {"size": [16, 16], "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.25]}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    torch.manual_seed(0)
    weights = open_clip.create_model(f"local-dir:{folder}", load_weights=False).state_dict()
    save_file(weights, folder / "open_clip_model.safetensors")
    return folder


def clip_words(folder: Path) -> None:
    """CLIP's own tokenizer, from the vocabulary that open_clip ships, and an image processor for 16 pixels."""
    known = SimpleTokenizer()
    folder.mkdir(parents=True, exist_ok=True)
    special = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}  # as transformers calls them
    words = {special.get(word, word): place for word, place in known.encoder.items()}
    (folder / "vocab.json").write_text(json.dumps(words))
    merges = [" ".join(pair) for pair in known.bpe_ranks]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=8)
    images = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    CLIPProcessor(images, tokenizer).save_pretrained(folder)  # as the pools' headers convert the base


def pico_clip(folder: Path, layers: int) -> CLIPModel:
    """A transformers CLIP folder of so many layers, 8 to 16 wide, random."""
    torch.manual_seed(0)
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    text = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 1, "num_hidden_layers": 2}
    text |= {"max_position_embeddings": 8}
    config = CLIPConfig(vision_config=vision | {"num_hidden_layers": layers}, text_config=text, projection_dim=8)
    model = CLIPModel(config)
    model.save_pretrained(folder)
    clip_words(folder)
    return model


def pico_clip_expert(path: Path, base: CLIPModel, seed: int) -> str:
    """The base's vision tower alone, moved a little, named as the experts on the Hub are: by transformers 4."""
    tower = {name: tensor for name, tensor in base.state_dict().items() if name.startswith("vision_model.")}
    save_file({name: moved(tensor, seed) for name, tensor in tower.items()}, path)
    return str(path)


def bare_clip_expert(folder: Path, base: CLIPModel, seed: int) -> str:
    """The same tower as a folder of transformers 5, whose ``CLIPVisionModel`` puts nothing before the names."""
    tower = CLIPVisionModel(base.config.vision_config)
    values = {name: moved(tensor, seed) for name, tensor in base.vision_model.state_dict().items()}
    tower.load_state_dict(values)
    tower.save_pretrained(folder)
    return str(folder)


def moved(tensor: torch.Tensor, seed: int) -> torch.Tensor:
    """The tensor and a little noise."""
    return tensor + 0.01 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed))


def noise_data(folder: Path, task: dict[str, Any]) -> str:
    """A saved data set with the splits, columns and classes that an image task of a pool names; 12 and 4 pictures."""
    source = ImageTask(**task)
    classes, generator = list(source.words.classnames), np.random.default_rng(0)
    # a data set of truth values, and one whose labels have no names, as those of these names have
    kinds = {"pcam": datasets.Value("bool"), "fer2013": datasets.Value("int64")}
    label = kinds.get(source.vocabulary or "", datasets.ClassLabel(names=classes))
    features = datasets.Features({source.image_column: datasets.Image(), source.label_column: label})

    def rows(count: int) -> datasets.Dataset:
        pictures = [Image.fromarray(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)) for _ in range(count)]
        labels = generator.integers(0, len(classes), count).tolist()
        return datasets.Dataset.from_dict({source.image_column: pictures, source.label_column: labels}, features)

    datasets.DatasetDict({source.train: rows(12), source.test: rows(4)}).save_to_disk(folder)
    return str(folder)


def read_pool(path: Path) -> dict[str, Any]:
    """The content of a pool's YAML."""
    content: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return content
