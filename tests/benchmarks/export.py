"""Seconds and memory of ``adamerge export`` beside mergekit doing the same and beside a plain copy of the inputs.

    python tests/benchmarks/export.py --size 0.3B --experts 4 --rounds 5

Task arithmetic over random Llama-shaped checkpoints in bfloat16, in shards, in the page cache. Runs alternate, so that a
noisy machine hits all alike; ratios are medians of the rounds' own. ``cold`` is the command with no fingerprint kept (it
reads and hashes every weight first), ``merging`` what merges and writes the weights and ``work`` all that the command does,
both in a process that has already started.
mergekit runs in an environment of its own, made once under ``--cache``.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from watching import CommandFailed, Watched, environment_of, spread, watch

from adamerge.artifacts.coefficients import Coefficients, save_coefficients
from adamerge.checkpoints.checkpoint import Checkpoint
from adamerge.checkpoints.opening import open_checkpoint
from adamerge.io.model_folder import Layout
from adamerge.io.safetensors_writer import nbytes_of, shards, write_weights
from adamerge.parametrizations import TaskWise
from adamerge.task_vectors.task_vectors import TaskVectors

MERGEKIT = "mergekit==0.1.5"
WEIGHT = 0.3
SHARD = 1 << 29  # bytes
# hidden size, layers, inner size, heads, heads of keys and values
SIZES = {
    "tiny": (64, 2, 176, 4, 4),
    "0.1B": (640, 12, 1728, 10, 10),
    "0.3B": (1024, 18, 2816, 16, 16),
    "1B": (2048, 22, 5632, 32, 4),
}
VOCABULARY = 32000


def shapes(size: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a Llama-shaped model's tensors."""
    hidden, layers, inner, heads, pairs = SIZES[size]
    narrow = hidden // heads * pairs
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, hidden)}
    for layer in range(layers):
        place = f"model.layers.{layer}."
        found |= {
            f"{place}self_attn.q_proj.weight": (hidden, hidden),
            f"{place}self_attn.k_proj.weight": (narrow, hidden),
            f"{place}self_attn.v_proj.weight": (narrow, hidden),
            f"{place}self_attn.o_proj.weight": (hidden, hidden),
            f"{place}mlp.gate_proj.weight": (inner, hidden),
            f"{place}mlp.up_proj.weight": (inner, hidden),
            f"{place}mlp.down_proj.weight": (hidden, inner),
            f"{place}input_layernorm.weight": (hidden,),
            f"{place}post_attention_layernorm.weight": (hidden,),
        }
    return found | {"model.norm.weight": (hidden,), "lm_head.weight": (VOCABULARY, hidden)}


def configuration(size: str) -> dict[str, Any]:
    """What transformers and mergekit read of it."""
    hidden, layers, inner, heads, pairs = SIZES[size]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": pairs,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }


def write_model(folder: Path, size: str, seed: int, base: Path | None) -> None:
    """A model in shards: random, or moved from ``base``."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    origin = open_checkpoint(base) if base is not None else None
    places: dict[str, str] = {}
    wanted = header(size)
    parts = list(shards(wanted, SHARD))
    for number, names in enumerate(parts, start=1):
        file = f"model-{number:05}-of-{len(parts):05}.safetensors"
        tensors = {}
        for name in names:
            noise = torch.empty(wanted[name][1], dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
            tensors[name] = noise if origin is None else origin[name] + 0.1 * noise
        save_file(tensors, folder / file, {"format": "pt"})
        places |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": nbytes_of(wanted)}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(configuration(size)))


def header(size: str) -> dict[str, tuple[torch.dtype, torch.Size]]:
    """Of a model of that size, in bfloat16."""
    return {name: (torch.bfloat16, torch.Size(shape)) for name, shape in shapes(size).items()}


def write_pool(folder: Path, size: str, experts: int) -> list[Path]:
    """Base and experts, the coefficient file, and mergekit's configuration."""
    models = [folder / "base", *(folder / f"expert{number}" for number in range(experts))]
    for seed, model in enumerate(models):
        write_model(model, size, seed, None if seed == 0 else models[0])
    vectors = TaskVectors(models[0], {model.name: model for model in models[1:]})
    layout = Layout(copied=["config.json"])
    save_coefficients(
        Coefficients(vectors, TaskWise(vectors, WEIGHT), layout, dtype=torch.bfloat16),
        folder / "coefficients.safetensors",
    )
    entries = "".join(f"  - model: {model}\n    parameters: {{weight: {WEIGHT}}}\n" for model in models[1:])
    (folder / "mergekit.yaml").write_text(
        f"merge_method: task_arithmetic\nbase_model: {models[0]}\nmodels:\n{entries}dtype: bfloat16\n"
    )
    return models


def in_process(folder: Path, target: Path) -> None:
    """The command's work, timed from a process that has started: all of it, and merging and writing the weights alone."""
    from adamerge.artifacts.coefficients import load_coefficients
    from adamerge.artifacts.export import export, merged_pieces
    from adamerge.artifacts.export_files import headers
    from adamerge.artifacts.lora_export import export_adapter  # noqa: F401  (what the command imports is imported first)

    start = time.perf_counter()
    export(load_coefficients(folder / "coefficients.safetensors"), target)
    work = time.perf_counter() - start
    shutil.rmtree(target)
    target.mkdir()
    start = time.perf_counter()
    coefficients = load_coefficients(folder / "coefficients.safetensors")
    dtype, weights = coefficients.dtype, coefficients.layout.weights
    write_weights(target, weights, headers(coefficients, None, dtype), merged_pieces(coefficients, dtype))
    print(json.dumps({"work": work, "merging": time.perf_counter() - start}))


def copy(models: list[Path], target: Path) -> float:
    """Seconds of ``cp -r`` of every input, and of nothing else."""
    target.mkdir()
    return watch(["cp", "-r", *map(str, models), str(target)]).seconds


def compare_outputs(models: list[Path], ours: Path, theirs: Path | None) -> dict[str, float]:
    """The largest distance of each output from the formula in float64, in units of the last place of a bfloat16.

    That of the largest of merged weight, base and experts at the element.
    """

    def tensors(folder: Path) -> Checkpoint:
        return open_checkpoint(folder)

    base, *experts = map(tensors, models)
    outputs = {"adamerge": tensors(ours)} | ({"mergekit": tensors(theirs)} if theirs is not None else {})
    worst = dict.fromkeys(outputs, 0.0)
    for name in base:
        if base.shape(name).numel() > 1 << 23:
            continue  # as many others say the same, and float64 takes room
        start, *others = (model[name].double() for model in (base, *experts))
        exact = start + WEIGHT * sum(other - start for other in others)
        largest = torch.stack([exact, start, *others]).abs().amax(dim=0).clamp_min(1e-30)
        unit = torch.exp2(torch.floor(torch.log2(largest)) - 7)
        for who, output in outputs.items():
            if output.keys() != base.keys():
                raise CommandFailed(f"{who} wrote other tensors: {sorted(output.keys() ^ base.keys())[:5]}")
            distance = (output[name].double() - exact).abs() / unit
            worst[who] = max(worst[who], float(distance.max()))
    return worst


def measure(
    size: str, experts: int, rounds: int, threads: int, cache: Path, peer: bool, folder: Path
) -> dict[str, Any]:
    """All runs, alternating."""
    kept = {"XDG_CACHE_HOME": str(folder / "cache"), "OMP_NUM_THREADS": str(threads)}
    os.environ |= kept
    models = write_pool(folder, size, experts)
    adamerge = [sys.executable, "-m", "adamerge", "export", str(folder / "coefficients.safetensors")]
    timed = [sys.executable, __file__, "--in-process", str(folder)]
    commands: dict[str, list[str]] = {"export": adamerge, "cold": adamerge, "inside": timed}
    if peer:
        kit = environment_of(MERGEKIT, cache) / "mergekit-yaml"
        flags = ["--no-copy-tokenizer", "--no-write-model-card", "--quiet"]
        commands["mergekit"] = [str(kit), str(folder / "mergekit.yaml")]
    runs: dict[str, list[Watched]] = {name: [] for name in commands}
    copies: list[float] = []
    worst: dict[str, float] = {}
    for number in range(rounds):
        outputs = {name: folder / f"out-{name}" for name in (*commands, "copy")}
        copies.append(copy(models, outputs["copy"]))
        shutil.rmtree(outputs["copy"])
        for name, command in commands.items():
            own = kept | {"XDG_CACHE_HOME": str(folder / "empty")} if name == "cold" else kept
            more = flags if name == "mergekit" else []
            runs[name].append(watch([*command, str(outputs[name]), *more], own))
            shutil.rmtree(folder / "empty", ignore_errors=True)
        if number == 0:
            worst = compare_outputs(models, outputs["export"], outputs["mergekit"] if peer else None)
        for place in outputs.values():
            shutil.rmtree(place, ignore_errors=True)
    inside = [json.loads(run.output.splitlines()[-1]) for run in runs.pop("inside")]
    found: dict[str, Any] = {
        "model_bytes": nbytes_of(header(size)),
        "copy_seconds": spread(copies),
        "error_in_last_places": worst,
    }
    for what in ("merging", "work"):
        seconds = [run[what] for run in inside]
        found[f"{what}_seconds"] = spread(seconds)
        found[f"{what}_to_copy"] = spread([one / other for one, other in zip(seconds, copies, strict=True)])
    for name, watched in runs.items():
        found[f"{name}_seconds"] = spread([run.seconds for run in watched])
        found[f"{name}_anonymous_mib"] = spread([run.anonymous for run in watched])
        found[f"{name}_resident_mib"] = spread([run.resident for run in watched])
    for name in ("export", "cold") if peer else ():
        for what in ("seconds", "anonymous", "resident"):
            pairs = zip(runs[name], runs["mergekit"], strict=True)
            found[f"{name}_to_mergekit_{what}"] = spread([getattr(a, what) / getattr(b, what) for a, b in pairs])
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="0.3B")
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch, on both sides")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "adamerge-benchmarks")
    parser.add_argument("--without-mergekit", action="store_true")
    parser.add_argument("--json", action="store_true", help="print the line of JSON alone")
    parser.add_argument("--in-process", nargs=2, type=Path, metavar=("POOL", "TARGET"), help=argparse.SUPPRESS)
    own = parser.parse_args()
    if own.in_process:
        in_process(*own.in_process)
        return
    with tempfile.TemporaryDirectory(prefix="adamerge-export-") as folder:
        peer = not own.without_mergekit
        found = measure(own.size, own.experts, own.rounds, own.threads, own.cache, peer, Path(folder))
    given = {"size": own.size, "experts": own.experts, "rounds": own.rounds, "threads": own.threads}
    line = given | {"load": os.getloadavg()[1]} | found
    if not own.json:
        table = Table("figure", "median", "least", "most", title=f"export, {own.size}, {own.experts} experts, bfloat16")
        for name, value in line.items():
            cells = [f"{v:.3f}" for v in value.values()] if isinstance(value, dict) else [str(value)]
            table.add_row(name, *cells)
        Console().print(table)
    print(json.dumps(line))


if __name__ == "__main__":
    main()
