"""Tiny stand-ins: an open_clip base with random weights, experts near it, and image tasks made of noise."""

import json
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import open_clip
import pytest
import torch
from running import pool_config, without_pictures, write_yaml
from safetensors.torch import save_file

TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1},
}
PREPROCESS = {"size": [16, 16], "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.25]}
CLASSES = {"colours": ["red", "green", "blue"], "shapes": ["circle", "square", "star", "line"]}


@pytest.fixture(autouse=True)
def _quiet(monkeypatch, tmp_path_factory):
    """No test talks to a server, or leaves its scans in the user's cache."""
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(autouse=True)
def _seeded():
    """A test draws the same numbers each time, whichever ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def cut(monkeypatch):
    """Has sums go through every tensor so many elements at a time."""

    def every(elements: int) -> None:
        for kind in ("Deltas", "DenseDeltas"):
            monkeypatch.setattr(f"adamerge.deltas.base.{kind}.piece", elements)

    return every


def build_open_clip_folder(folder: Path, seed: int = 0) -> dict[str, torch.Tensor]:
    folder.mkdir(parents=True)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": TINY, "preprocess_cfg": PREPROCESS}))
    torch.manual_seed(seed)
    weights = open_clip.create_model(f"local-dir:{folder}", load_weights=False).state_dict()
    # random biases and norms too: zeros would hide a wrong sign
    weights = {name: value + 0.02 * torch.randn_like(value) for name, value in weights.items()}
    save_file(weights, folder / "open_clip_model.safetensors")
    return weights


@pytest.fixture(scope="session")
def pool(tmp_path_factory):
    """A base folder and one expert file per task of CLASSES; experts move the image tower only."""
    root = tmp_path_factory.mktemp("pool")
    base = build_open_clip_folder(root / "base")
    experts = {}
    for seed, task in enumerate(CLASSES):
        torch.manual_seed(100 + seed)
        moved = {
            name: value + 0.05 * torch.randn_like(value) for name, value in base.items() if name.startswith("visual.")
        }
        save_file(moved, root / f"{task}.safetensors")
        experts[task] = str(root / f"{task}.safetensors")
    return {"base": str(root / "base"), "experts": experts, "include": ["visual.*"]}


def noise_images(classes: list[str], count: int, seed: int) -> datasets.Dataset:
    from PIL import Image

    generator = np.random.default_rng(seed)
    rows = {
        "image": [Image.fromarray(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)) for _ in range(count)],
        "label": generator.integers(0, len(classes), count).tolist(),
    }
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=classes)})
    return datasets.Dataset.from_dict(rows, features)


@pytest.fixture(scope="session")
def image_folders(tmp_path_factory):
    """A saved data set per task of CLASSES, with train and test splits."""
    root = tmp_path_factory.mktemp("images")
    for seed, (task, classes) in enumerate(CLASSES.items()):
        splits = {"train": noise_images(classes, 60, 10 * seed), "test": noise_images(classes, 24, 10 * seed + 1)}
        datasets.DatasetDict(splits).save_to_disk(root / task)
    return {task: str(root / task) for task in CLASSES}


@pytest.fixture(scope="module")
def pool_of(tmp_path_factory):
    """The pico pool of a kind of network, made when a test of the module first asks for it."""
    from pico import pico_pool

    root, made = tmp_path_factory.mktemp("pico"), {}

    def get(kind):
        if kind not in made:
            made[kind] = pico_pool(kind, root / kind)
        return made[kind]

    return get


@pytest.fixture(scope="session")
def lora(tmp_path_factory):
    """Folders of tiny bases by kind and of adapters by the name of their case, with the weights that peft merges."""
    from lora_models import CASES, save_adapter, save_base

    root = tmp_path_factory.mktemp("lora")
    bases = {kind: save_base(kind, root / f"base-{kind}") for kind in ("bert", "gpt2", "llama")}
    adapters, merged = {}, {}
    for name, (kind, config) in CASES.items():
        adapters[name] = root / name.replace(" ", "-")
        merged[name] = save_adapter(kind, adapters[name], **config)
    return SimpleNamespace(bases=bases, adapters=adapters, merged=merged)


@pytest.fixture
def pool_file(pool, image_folders, tmp_path, monkeypatch):
    """The pool as a configuration, in an empty folder that the test runs in; heat maps are not drawn."""
    monkeypatch.chdir(tmp_path)
    without_pictures(monkeypatch)
    return write_yaml(tmp_path / "pools" / "tiny.yaml", pool_config(pool, image_folders))
