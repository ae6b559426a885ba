"""One optimisation step of a Llama-shaped model with experts on disk: seconds, and the most anonymous memory it takes.

    python tests/benchmarks/language_model.py --size 1B --copy block

Random weights in bfloat16, four experts, entropy of the next token. The step runs in a process of its own. ``--compare``
runs it with the whole copy and resident fp32 deltas as well, and tells how far the coefficients' gradients are apart, in
units of the largest.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from export import SIZES, VOCABULARY, write_model
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from watching import own_peak, run

from adamerge import BlockCopy, CausalLM, LayerWise, TaskVectors, WholeCopy
from adamerge.merging.merged_model import MergedModel
from adamerge.task_vectors.storage import Disk, Resident

COPIES = {"block": (BlockCopy, Disk), "whole": (WholeCopy, Disk), "resident": (WholeCopy, Resident)}


def write_pool(folder: Path, size: str, experts: int) -> None:
    """Base with a tokenizer of one word, and experts."""
    write_model(folder / "base", size, 0, None)
    for number in range(experts):
        write_model(folder / f"expert{number}", size, number + 1, folder / "base")
    words = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", pad_token="<unk>").save_pretrained(
        folder / "base"
    )


def step(folder: Path, own: argparse.Namespace) -> dict[str, Any]:
    """The step of this process."""
    with own_peak() as peak:
        copy, storage = (made() for made in COPIES[own.copy])
        backbone = CausalLM(str(folder / "base"), "bfloat16", max_length=own.positions)
        experts = {f"expert{number}": folder / f"expert{number}" for number in range(own.experts)}
        vectors = TaskVectors(folder / "base", experts)
        merged = MergedModel(backbone, vectors, LayerWise(vectors, init=0.3), storage, copy=copy)
        shape, generator = (own.experts * own.batch, own.positions), torch.Generator().manual_seed(0)
        ids = torch.randint(0, VOCABULARY, shape, generator=generator)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "predicted": torch.ones_like(ids)}
        start = time.perf_counter()
        merged.merge()
        q = backbone.output(merged(inputs), "expert0").logits.float().log_softmax(dim=-1)
        loss = -(q.exp() * q).sum(dim=-1).mean()
        del q
        loss.backward()
        merged.pull_back(loss.detach()).backward()
        seconds = time.perf_counter() - start
    gradient = merged.trained()[0].grad
    assert gradient is not None
    torch.save(gradient, folder / f"{own.copy}.pt")
    return {"seconds": seconds, "peak_gib": peak[0] / (1 << 20), "loss": float(loss.detach())}


def measure(own: argparse.Namespace) -> dict[str, Any]:
    """Write the models, and step."""
    with tempfile.TemporaryDirectory(prefix="adamerge-language-", dir=own.where) as name:
        write_pool(Path(name), own.size, own.experts)
        kinds, found = [own.copy, *(["whole", "resident"] if own.compare else [])], {}
        for kind in dict.fromkeys(kinds):
            words = [f"--size={own.size}", f"--experts={own.experts}", f"--batch={own.batch}", f"--copy={kind}"]
            line = [sys.executable, __file__, *words, f"--positions={own.positions}", f"--folder={name}"]
            found[kind] = json.loads(run(line).splitlines()[-1])
        first = torch.load(Path(name) / f"{own.copy}.pt", weights_only=True)
        for kind in kinds[1:]:
            other = torch.load(Path(name) / f"{kind}.pt", weights_only=True)
            found[kind]["gradient_difference"] = float((first - other).abs().max() / other.abs().max())
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="0.1B")
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--batch", type=int, default=1, help="samples per task")
    parser.add_argument("--positions", type=int, default=64)
    parser.add_argument("--copy", choices=list(COPIES), default="block")
    parser.add_argument("--compare", action="store_true")
    parser.add_argument("--where", type=Path, help="folder for the models; they take 2 bytes a weight each")
    parser.add_argument("--json", action="store_true", help="print the line of JSON alone")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    own = parser.parse_args()
    if own.folder:
        print(json.dumps(step(own.folder, own)))
        return
    found = measure(own)
    if not own.json:
        table = Table("copy", "figure", "value", title=f"{own.size}, {own.experts} experts, bfloat16")
        for kind, row in found.items():
            for figure, value in row.items():
                table.add_row(kind, figure, f"{value:.4g}")
        Console().print(table)
    given = {name: value for name, value in vars(own).items() if name not in {"json", "folder", "where", "compare"}}
    print(json.dumps(given | {"threads": torch.get_num_threads(), "load": os.getloadavg()[0]} | found))


if __name__ == "__main__":
    main()
