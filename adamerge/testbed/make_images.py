"""Make the testbed's checkpoints: pre-train a small CLIP on clean images, fine-tune one expert a task, measure, write.

    python -m adamerge.testbed.make_images --out DIR

Every step leaves a file under DIR (``progress/``), so that a run that was killed goes on where it was. The result is
``DIR/base/`` (an open_clip folder), ``DIR/experts/<task>.safetensors`` (image tower only), ``DIR/results.json`` and
``DIR/SHA256SUMS``.
"""

# Longer than 250 lines: the whole recipe of the released checkpoints, read once and from top to bottom.

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from adamerge.io.atomic import write_json
from adamerge.testbed.image_sources import affine, uniform
from adamerge.testbed.image_tasks import IMAGE_TASKS, PRETRAINING_TASKS, ImageTask, clean_images, task_images
from adamerge.testbed.making import LAMBDAS, descend, run, save, summary, write_sums

MEAN, STD = (0.5, 0.5, 0.5), (0.3, 0.3, 0.3)
CONTEXT_LENGTH = 16
MODEL_CONFIG: dict[str, Any] = {
    "embed_dim": 96,
    "vision_cfg": {
        "image_size": 28,
        "patch_size": 7,
        "width": 160,
        "layers": 3,
        "head_width": 32,
        "mlp_ratio": 3.0,
    },
    "text_cfg": {"context_length": CONTEXT_LENGTH, "vocab_size": 49408, "width": 24, "heads": 2, "layers": 2},
}
PREPROCESS_CONFIG = {"size": [28, 28], "mode": "RGB", "mean": list(MEAN), "std": list(STD), "interpolation": "bicubic"}


@dataclass(frozen=True)
class Recipe:
    """The numbers that say how long and how hard the images' CLIP and its experts are trained."""

    pretrain_steps: int = 6000
    pretrain_images: int = 16000  # clean images a task; the digits repeat themselves
    pretrain_batch: int = 128
    pretrain_lr: float = 1e-3
    finetune_steps: int = 300
    finetune_batch: int = 128
    finetune_lr: float = 2e-4
    weight_decay: float = 0.05
    checkpoint_every: int = 500


def create_model() -> open_clip.CLIP:
    """Builds the testbed's CLIP, of open_clip's own class, with fresh weights."""
    torch.manual_seed(0)
    return open_clip.CLIP(**MODEL_CONFIG)


def normalise(pixels: Tensor) -> Tensor:
    """Returns bytes (n, 1 or 3, 28, 28) as what the model takes, as open_clip's own preprocessing does it."""
    images = pixels.float().div(255).expand(-1, 3, -1, -1)
    return (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def prompt_tokens(task: ImageTask) -> Tensor:
    """Returns tokens of every template filled with every class name: (templates, classes, context_length)."""
    tokenizer = _tokenizer()
    return torch.stack([tokenizer([template.format(name) for name in task.classnames]) for template in task.templates])


@cache
def _tokenizer() -> open_clip.SimpleTokenizer:
    return open_clip.SimpleTokenizer(context_length=CONTEXT_LENGTH)


@torch.no_grad()
def zero_shot_head(model: open_clip.CLIP, task: ImageTask) -> Tensor:
    """Returns the prompts' embeddings: normalised mean over templates, times the logit scale: (classes, embed_dim)."""
    embeddings = torch.stack([model.encode_text(tokens, normalize=True) for tokens in prompt_tokens(task)])
    return F.normalize(embeddings.mean(0), dim=-1) * model.logit_scale.exp()


def augment(pixels: Tensor, generator: torch.Generator, strength: float) -> Tensor:
    """Jitters bytes mildly: up to 7 degrees, 8 % of size, 7 % of place, 15 % of contrast, all times ``strength``."""
    count = len(pixels)
    angle, zoom = (
        (strength * uniform(count, -0.12, 0.12, generator)),
        1 + strength * uniform(count, -0.08, 0.08, generator),
    )
    matrices = torch.zeros(count, 2, 3)
    matrices[:, 0, 0], matrices[:, 1, 1] = zoom * angle.cos(), zoom * angle.cos()
    matrices[:, 0, 1], matrices[:, 1, 0] = -zoom * angle.sin(), zoom * angle.sin()
    matrices[:, :, 2] = strength * 0.07 * (torch.rand(count, 2, generator=generator) * 2 - 1)
    images = affine(pixels.float(), matrices)
    gain = 1 + strength * uniform(count, -0.15, 0.15, generator)[:, None, None, None]
    return ((images - 127.5) * gain + 127.5).clamp(0, 255)


def batches(count: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yields index batches of shuffled epochs, for ever."""
    while True:
        yield from torch.randperm(count, generator=generator).split(min(size, count))


def cosine(step: int, steps: int, warmup: int) -> float:
    """Returns the rate's share at a step: linear warm-up, then half a cosine down to 0."""
    return min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / steps)))


def optimizer_of(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """Returns AdamW over what requires a gradient; weight decay on matrices of the image tower only."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = [p for name, p in named if p.ndim > 1 and name.startswith("visual.")]
    others = [p for name, p in named if p.ndim < 2 or not name.startswith("visual.")]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=True)


def pretrain(recipe: Recipe, folder: Path, tasks: Mapping[str, ImageTask] = PRETRAINING_TASKS) -> dict[str, Tensor]:
    """Trains both towers on the clean images of all tasks; returns the state dict, also left in ``folder/base.pt``.

    The loss is the cross-entropy over the prompts of ALL tasks, plus that over the prompts of the image's own task.
    """
    done = folder / "base.pt"
    if done.is_file():
        return torch.load(done, weights_only=True)
    offsets, pixels, labels, owners, tokens = 0, [], [], [], []
    for index, task in enumerate(tasks.values()):
        images, classes = clean_images(task, recipe.pretrain_images, seed=task.seed + 50)
        repeats = max(1, round(recipe.pretrain_images / len(images)))
        pixels += [images.expand(-1, 3, -1, -1)] * repeats
        labels += [classes + offsets] * repeats
        owners += [torch.full_like(classes, index)] * repeats
        tokens.append(prompt_tokens(task))
        offsets += len(task.classnames)
    images, targets, image_owner = torch.cat(pixels), torch.cat(labels), torch.cat(owners)
    prompt_owner = torch.cat([torch.full((len(t.classnames),), i) for i, t in enumerate(tasks.values())])

    model = create_model().train()
    optimizer = optimizer_of(model, recipe.pretrain_lr, recipe.weight_decay)
    start, partial_file = 0, folder / "base.partial.pt"
    if partial_file.is_file():
        saved = torch.load(partial_file, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        start = saved["step"]
    generator = torch.Generator().manual_seed(1000 + start)
    stream = batches(len(images), recipe.pretrain_batch, generator)
    running = 0.0
    for step in range(start, recipe.pretrain_steps):
        batch = next(stream)
        features = model.encode_image(normalise(augment(images[batch], generator, 1.0)), normalize=True)
        prompts = torch.cat([t[int(torch.randint(len(t), (1,), generator=generator))] for t in tokens])
        logits = model.logit_scale.exp() * features @ model.encode_text(prompts, normalize=True).T
        own = logits.masked_fill(image_owner[batch][:, None] != prompt_owner, -1e4)
        target = targets[batch]
        loss = 0.5 * F.cross_entropy(logits, target) + 0.5 * F.cross_entropy(own, target)
        lr = recipe.pretrain_lr * cosine(step, recipe.pretrain_steps, 200)
        running += descend(loss, model.parameters(), optimizer, lr) / recipe.checkpoint_every
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(50))
        if (step + 1) % recipe.checkpoint_every == 0:
            print(f"pretrain {step + 1}: loss {running:.4f}", flush=True)
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            save(state, partial_file)
            running = 0.0
    save(model.state_dict(), done)
    partial_file.unlink(missing_ok=True)
    return model.state_dict()


def finetune(base: Mapping[str, Tensor], task: ImageTask, recipe: Recipe, folder: Path) -> dict[str, Tensor]:
    """Trains the image tower on a task under the base's frozen zero-shot head; returns its ``visual.*`` tensors."""
    done = folder / f"expert-{task.name}.pt"
    if done.is_file():
        return torch.load(done, weights_only=True)
    model = create_model()
    model.load_state_dict(base)
    head = zero_shot_head(model.eval(), task)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("visual."))
    images, labels = task_images(task, "train")
    optimizer = optimizer_of(model, recipe.finetune_lr, recipe.weight_decay)
    generator = torch.Generator().manual_seed(2000 + task.seed)
    stream = batches(len(images), recipe.finetune_batch, generator)
    model.train()
    for step in range(recipe.finetune_steps):
        batch = next(stream)
        features = model.encode_image(normalise(augment(images[batch], generator, 0.7)), normalize=True)
        loss = F.cross_entropy(features @ head.T, labels[batch])
        descend(loss, model.parameters(), optimizer, recipe.finetune_lr * cosine(step, recipe.finetune_steps, 50))
    visual = {name: tensor for name, tensor in model.state_dict().items() if name.startswith("visual.")}
    save(visual, done)
    return visual


@torch.no_grad()
def accuracy(model: open_clip.CLIP, head: Tensor, images: Tensor, labels: Tensor) -> float:
    """Returns the per cent of ``images`` (bytes) that the image tower under ``head`` gets right."""
    features = [model.encode_image(normalise(part), normalize=True) for part in images.split(500)]
    return 100 * (torch.cat(features) @ head.T).argmax(1).eq(labels).float().mean().item()


def evaluate(
    base: Mapping[str, Tensor], experts: Mapping[str, Mapping[str, Tensor]], split: str = "test"
) -> dict[str, Any]:
    """Returns accuracies of the base, of each expert on its own task, and of task arithmetic with one lambda."""
    tasks = {name: IMAGE_TASKS[name] for name in experts}
    model = create_model().eval()
    model.load_state_dict(base)
    heads = {name: zero_shot_head(model, task) for name, task in tasks.items()}
    data = {name: task_images(task, split) for name, task in tasks.items()}

    def score(visual: Mapping[str, Tensor], names: Iterator[str] | list[str]) -> dict[str, float]:
        model.load_state_dict({**base, **visual})
        return {name: accuracy(model, heads[name], *data[name]) for name in names}

    individual = {name: score(visual, [name])[name] for name, visual in experts.items()}
    curve = {}
    for coefficient in LAMBDAS:
        merged = {
            name: tensor + coefficient * sum(expert[name] - tensor for expert in experts.values())
            for name, tensor in base.items()
            if name.startswith("visual.")
        }
        curve[coefficient] = score(merged, list(tasks))
    return summary(individual, curve, max, digits=2)


def write(base: Mapping[str, Tensor], experts: Mapping[str, Mapping[str, Tensor]], out: Path) -> None:
    """Writes base and experts as fp16 safetensors, and the hashes of all files beside them."""
    (out / "base").mkdir(parents=True, exist_ok=True)
    (out / "experts").mkdir(exist_ok=True)
    config = {"model_cfg": MODEL_CONFIG, "preprocess_cfg": PREPROCESS_CONFIG}
    (out / "base" / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
    _write_half(base, out / "base" / "open_clip_model.safetensors")
    for name, visual in experts.items():
        _write_half(visual, out / "experts" / f"{name}.safetensors")
    write_sums(out, [file for folder in ("base", "experts") for file in (out / folder).iterdir()])


def read(out: Path) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """Reads base and experts as ``write`` left them, in fp32."""
    base = load_file(out / "base" / "open_clip_model.safetensors")
    files = {name: out / "experts" / f"{name}.safetensors" for name in IMAGE_TASKS}
    experts = {name: load_file(file) for name, file in files.items() if file.is_file()}
    return _single(base), {name: _single(visual) for name, visual in experts.items()}


def make(out: Path, recipe: Recipe) -> dict[str, Any]:
    """Trains what is not yet in ``out/progress``, writes the checkpoints, reads them back and measures them."""
    progress = out / "progress"
    progress.mkdir(parents=True, exist_ok=True)
    base = pretrain(recipe, progress)
    experts = {}
    for name, task in IMAGE_TASKS.items():
        experts[name] = finetune(base, task, recipe, progress)
        print(f"expert {name}: done", flush=True)
    write(base, experts, out)
    results = {"recipe": asdict(recipe), **evaluate(*read(out))}
    write_json(out / "results.json", results)
    return results


def _single(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.float() for name, tensor in tensors.items()}


def _write_half(tensors: Mapping[str, Tensor], file: Path) -> None:
    save_file({name: tensor.half().contiguous() for name, tensor in tensors.items()}, file, metadata={"format": "pt"})


def main() -> None:
    """Makes the image models from the command line."""
    run("the testbed's base and experts", Recipe(), make)


if __name__ == "__main__":
    main()
