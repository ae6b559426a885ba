"""Make the testbed's language models: tokenizer, a small Llama from nothing, one expert a domain; measure, write.

    python -m adamerge.testbed.make_causal --out DIR

Every step leaves a file under DIR (``progress/``), so that a run that was killed goes on where it was. The result is
``DIR/base/`` and ``DIR/experts/<task>/`` (folders for ``from_pretrained``), ``DIR/results.json`` and ``DIR/SHA256SUMS``.
"""

# Longer than 250 lines: the whole recipe of the released checkpoints, read once and from top to bottom.

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from adamerge.io.atomic import write_json
from adamerge.testbed.causal_tasks import CAUSAL_TASKS, SIZES, task_texts
from adamerge.testbed.making import LAMBDAS, descend, run, save, summary, write_sums

BOS, EOS, PAD = 0, 1, 2
MAX_TOKENS = 128  # <s> included; what is longer is cut
Texts = Mapping[str, Mapping[str, Sequence[str]]]  # task -> split -> chunks


@dataclass(frozen=True)
class Recipe:
    """The numbers that say how large the language model is, and how long and how hard it is trained."""

    vocabulary: int = 2048
    hidden: int = 128
    layers: int = 6
    intermediate: int = 384
    batch: int = 16
    pretrain_steps: int = 1500
    pretrain_lr: float = 2e-3
    finetune_steps: int = 400
    finetune_lr: float = 1e-3
    weight_decay: float = 0.1
    evaluate_every: int = 100  # steps of an expert between two looks at its validation loss
    checkpoint_every: int = 250


def train_tokenizer(texts: Texts, vocabulary: int, bytes_per_task: int = 190_000) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE on as much training text of every task; it puts ``<s>`` before each text."""
    sample = []
    for splits in texts.values():
        room = bytes_per_task
        for text in splits["train"]:
            room -= len(text.encode())
            if room < 0:
                break
            sample.append(text)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", BOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=256
    )


def create_model(recipe: Recipe) -> LlamaForCausalLM:
    """Builds the testbed's Llama, of transformers' own class, with fresh weights and tied embeddings."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=recipe.vocabulary,
        hidden_size=recipe.hidden,
        intermediate_size=recipe.intermediate,
        num_hidden_layers=recipe.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    return LlamaForCausalLM(config)


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Tensor:
    """Returns the tokens of texts, (texts, at most 128), padded on the right."""
    rows = [ids[:MAX_TOKENS] for ids in tokenizer(list(texts))["input_ids"]]
    return nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=PAD)


def token_losses(model: nn.Module, ids: Tensor) -> Tensor:
    """Returns the cross-entropy in nats of every token that is not padding, given those before it: (tokens,)."""
    ids = ids[:, : int((ids != PAD).sum(1).max())]
    # Padding stands on the right, where causal attention does not see it.
    logits, targets = model(input_ids=ids).logits[:, :-1], ids[:, 1:]
    kept = targets != PAD
    return F.cross_entropy(logits[kept].float(), targets[kept], reduction="none")


@torch.no_grad()
def held_out_loss(model: nn.Module, ids: Tensor) -> float:
    """Returns the mean cross-entropy over all tokens of ``ids``: nats per token."""
    model.eval()
    by_length = ids[(ids != PAD).sum(1).argsort()]  # little padding in a batch
    losses = torch.cat([token_losses(model, part) for part in by_length.split(50)])
    return losses.double().mean().item()


def learning_rate(step: int, steps: int, highest: float) -> float:
    """Returns the rate at a step: linear warm-up over 50 steps, then half a cosine down to a tenth."""
    return highest * min((step + 1) / 50, 0.1 + 0.45 * (1 + math.cos(math.pi * step / steps)))


def optimizer_of(model: nn.Module, weight_decay: float) -> torch.optim.AdamW:
    """Returns AdamW with weight decay on matrices only."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98))


def draw(pools: Sequence[Tensor], batch: int, seed: int) -> Tensor:
    """Draws a batch with as many rows of every pool; a function of the seed, so that a resumed run draws the same."""
    generator = torch.Generator().manual_seed(seed)
    width = max(pool.shape[1] for pool in pools)
    rows = []
    for pool in pools:
        chosen = pool[torch.randint(len(pool), (batch // len(pools),), generator=generator)]
        rows.append(F.pad(chosen, (0, width - pool.shape[1]), value=PAD))
    return torch.cat(rows)


def pretrain(recipe: Recipe, train: Sequence[Tensor], folder: Path) -> dict[str, Tensor]:
    """Trains on all domains in equal parts; returns the state dict, which it also leaves in ``folder/base.pt``."""
    done, partial_file = folder / "base.pt", folder / "base.partial.pt"
    if done.is_file():
        return torch.load(done, weights_only=True)
    model = create_model(recipe).train()
    optimizer = optimizer_of(model, recipe.weight_decay)
    start, running = 0, 0.0
    if partial_file.is_file():
        saved = torch.load(partial_file, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        start = saved["step"]
    for step in range(start, recipe.pretrain_steps):
        batch = draw(train, recipe.batch, 1_000_000 + step)
        lr = learning_rate(step, recipe.pretrain_steps, recipe.pretrain_lr)
        running += descend(token_losses(model, batch).mean(), model.parameters(), optimizer, lr)
        if (step + 1) % recipe.checkpoint_every == 0:
            print(f"pretrain {step + 1}: loss {running / recipe.checkpoint_every:.4f}", flush=True)
            save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}, partial_file)
            running = 0.0
    save(model.state_dict(), done)
    partial_file.unlink(missing_ok=True)
    return model.state_dict()


def finetune(
    recipe: Recipe, base: Mapping[str, Tensor], name: str, train: Tensor, *, validation: Tensor, folder: Path
) -> dict[str, Tensor]:
    """Trains all weights on one domain; returns those of the lowest validation loss, also left in ``folder``."""
    done = folder / f"expert-{name}.pt"
    if done.is_file():
        return torch.load(done, weights_only=True)
    model = create_model(recipe)
    model.load_state_dict(base)
    optimizer = optimizer_of(model, recipe.weight_decay)
    best, kept, at = math.inf, dict(base), 0
    seed = 2_000_000 + 100_000 * list(CAUSAL_TASKS).index(name)
    for step in range(recipe.finetune_steps):
        model.train()
        batch = draw([train], recipe.batch, seed + step)
        lr = learning_rate(step, recipe.finetune_steps, recipe.finetune_lr)
        descend(token_losses(model, batch).mean(), model.parameters(), optimizer, lr)
        if (step + 1) % recipe.evaluate_every == 0 or step + 1 == recipe.finetune_steps:
            loss = held_out_loss(model, validation)
            print(f"expert {name} {step + 1}: validation loss {loss:.4f}", flush=True)
            if loss < best:
                best, at = loss, step + 1
                kept = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    print(f"expert {name}: kept that of step {at}", flush=True)
    save(kept, done)
    return kept


def evaluate(
    recipe: Recipe,
    base: Mapping[str, Tensor],
    experts: Mapping[str, Mapping[str, Tensor]],
    held_out: Mapping[str, Tensor],
) -> dict[str, Any]:
    """Returns losses of the base, of each expert on every domain, and of task arithmetic with one lambda."""
    model = create_model(recipe)

    def score(state: Mapping[str, Tensor]) -> dict[str, float]:
        model.load_state_dict(state)
        return {name: held_out_loss(model, held_out[name]) for name in experts}

    everywhere = {name: score(expert) for name, expert in experts.items()}
    individual = {name: row[name] for name, row in everywhere.items()}
    curve = {}
    for coefficient in LAMBDAS:
        merged = {
            key: tensor + coefficient * sum(expert[key] - tensor for expert in experts.values())
            for key, tensor in base.items()
        }
        curve[coefficient] = score(merged)
    return summary(individual, curve, min, digits=4, experts_everywhere=everywhere)


def write(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    base: Mapping[str, Tensor],
    experts: Mapping[str, Mapping[str, Tensor]],
    out: Path,
) -> None:
    """Writes base and experts as fp16 folders for ``from_pretrained``, and the hashes of all files beside them."""
    folders = {out / "base": base, **{out / "experts" / name: expert for name, expert in experts.items()}}
    for folder, state in folders.items():
        model = create_model(recipe)
        model.load_state_dict(state)
        model.half().save_pretrained(folder)
        if folder != out / "base":
            (folder / "generation_config.json").unlink(missing_ok=True)
    tokenizer.save_pretrained(out / "base")
    write_sums(out, [file for folder in folders for file in folder.iterdir()])


def read(out: Path) -> tuple[PreTrainedTokenizerBase, dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """Reads tokenizer, base and experts as ``write`` left them, in fp32."""

    def state(folder: Path) -> dict[str, Tensor]:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()

    folders = {name: out / "experts" / name for name in CAUSAL_TASKS}
    experts = {name: state(folder) for name, folder in folders.items() if folder.is_dir()}
    return AutoTokenizer.from_pretrained(out / "base"), state(out / "base"), experts


def make(out: Path, recipe: Recipe) -> dict[str, Any]:
    """Trains what is not yet in ``out/progress``, writes the checkpoints, reads them back and measures them."""
    progress = out / "progress"
    progress.mkdir(parents=True, exist_ok=True)
    texts = {name: task_texts(task) for name, task in CAUSAL_TASKS.items()}
    tokenizer = train_tokenizer(texts, recipe.vocabulary)
    ids = {
        name: {split: encode(tokenizer, splits[split]) for split in SIZES if split != "calibration"}
        for name, splits in texts.items()
    }
    base = pretrain(recipe, [splits["train"] for splits in ids.values()], progress)
    experts = {
        name: finetune(recipe, base, name, splits["train"], validation=splits["validation"], folder=progress)
        for name, splits in ids.items()
    }
    write(recipe, tokenizer, base, experts, out)
    _, base, experts = read(out)
    test = {name: splits["test"] for name, splits in ids.items()}
    results = {"recipe": asdict(recipe), **evaluate(recipe, base, experts, test)}
    write_json(out / "results.json", results)
    return results


def main() -> None:
    """Makes the language models from the command line."""
    run("the testbed's language models", Recipe(), make)


if __name__ == "__main__":
    main()
