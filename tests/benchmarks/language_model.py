"""One optimisation step of a Llama-shaped model with experts on disk: seconds, and the most anonymous memory it takes.

    python tests/benchmarks/language_model.py --size 1B --copy block

Random weights in bfloat16, four experts, entropy of the next token. The step runs in a process of its own. ``--compare``
runs it with the whole copy and resident fp32 deltas as well, and tells how far the coefficients' gradients are apart, in
units of the largest.

    python tests/benchmarks/language_model.py --texts configs/pools/testbed_text.yaml

The texts of a pool as they are, under Expert Merging: steps in one padded pass, as before samples of like length ran
together, and steps as they are now, by turns in one process; positions of text and of all, seconds of merge, passes and
contraction, and how far the gradients are apart. The same of the experts' passes over the samples of ``--steps`` steps.
Seconds are the processor's, and beside them those of the wall. ``pass_cost`` is what a pass more takes, in positions: from
the same samples in four passes of one width, beside one.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from export import SIZES, VOCABULARY, write_model
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from watching import own_peak, run

from adamerge import BlockCopy, CausalLM, LayerWise, TaskVectors, WholeCopy
from adamerge.backbones import Batch
from adamerge.merging.merged_model import MergedModel
from adamerge.task_vectors.storage import Disk, Resident
from adamerge.training import length_groups, teacher_cache
from adamerge.training.objective_gradient import BatchObjective

METHOD = str(Path(__file__).parents[2] / "configs" / "methods" / "expert_merging.yaml")
ALONE: Any = SimpleNamespace(
    reduce=lambda totals, reduce_op: totals, world_size=1, broadcast=lambda value: value, is_global_zero=True
)
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


class Texts:
    """Steps over the texts of a pool, with the experts' outputs.

    Args:
        own: which pool, how many samples of each task and how many steps.

    Attributes:
        real: positions of text that have run since they were set to 0.
        padded: the same of all positions.
        passes: forward passes.
    """

    def __init__(self, own: argparse.Namespace) -> None:
        from lightning import Trainer

        from adamerge.runs.instantiate import Configured

        words = ["--config", own.texts, "--config", METHOD, f"--data.batch_size={own.batch}"]
        fit = Configured.of([*words, "--trainer.logger=false", f"--trainer.max_steps={own.steps}"])
        self.module, self.data, self.folder = fit.model, fit.datamodule, Path(tempfile.gettempdir())
        self.merged: MergedModel = self.module.merged
        self.data.loop = Trainer(max_steps=own.steps, logger=False, accelerator="cpu", enable_checkpointing=False)
        self.strategy = self.data.loop.strategy
        self.data.serve(self.merged.backbone)
        self.merged.backbone.build_heads(self.data.tasks, self.merged.task_vectors.checkpoints)
        self.real = self.padded = self.passes = 0
        self.merged.register_forward_pre_hook(self._count)

    def _count(self, module: Any, arguments: tuple[Any, ...]) -> None:
        attended = arguments[0]["attention_mask"]
        self.real, self.padded = self.real + int(attended.sum()), self.padded + attended.numel()
        self.passes += 1

    def counted(self, run: Callable[[], Any]) -> dict[str, Any]:
        """Seconds and positions of what runs, and what it returns."""
        self.real = self.padded = self.passes = 0
        start, of_processor = time.perf_counter(), time.process_time()
        result = run()
        return {
            "wall": time.perf_counter() - start, "seconds": time.process_time() - of_processor,
            "real": self.real, "padded": self.padded, "passes": self.passes, "result": result,
        }  # fmt: skip

    def teach(self) -> None:
        """Runs the experts on the samples of all steps."""
        teachers = self.module.teachers
        steps, hidden = self.data.steps(), self.module.objective.hidden
        show, size = self.module.batches.view, steps.batch_size
        teachers.begin(
            self.merged, steps, hidden, show=show, batch_size=size, strategy=self.strategy, default_folder=self.folder
        )
        self.data.teach(teachers.of_samples())

    def step(self, batch: Mapping[str, Batch], micro_batch: int | None = None) -> torch.Tensor:
        """Merges, evaluates and contracts; returns the gradient."""
        (parameter,) = self.merged.trained()
        parameter.grad = None
        self.merged.merge(0)
        evaluation = BatchObjective(self.merged, self.module.objective, {}, micro_batch, ALONE).backward(batch)
        self.merged.pull_back(evaluation.total).backward()
        assert parameter.grad is not None
        return parameter.grad.clone()


def uncut() -> Any:
    """Lets no pass be cut."""
    return mock.patch.object(length_groups, "PASS_ON_CPU", 1 << 60)


def measure_texts(own: argparse.Namespace) -> dict[str, Any]:
    """Steps and experts' passes before and after, by turns."""
    texts = Texts(own)
    taught: dict[str, list[dict[str, Any]]] = {"one after the other": [], "like lengths": []}
    for turn in range(own.rounds + 1):
        with mock.patch.object(teacher_cache, "by_length", lambda indices, samples: (indices, [1] * len(indices))):
            before = texts.counted(texts.teach)
        after = texts.counted(texts.teach)
        if turn:  # the first reads files
            taught["one after the other"].append(before)
            taught["like lengths"].append(after)
    steps, table = texts.data.steps(), {"one pass": [], "like lengths": [], "four passes": []}
    apart = 0.0
    for number in range(own.steps):
        batch = steps[number]
        plain = {task: part._replace(lengths=None) for task, part in batch.items()}
        samples = sum(len(part.indices) for part in batch.values())
        with uncut():
            before = texts.counted(lambda plain=plain: texts.step(plain))
        after = texts.counted(lambda batch=batch: texts.step(batch))
        joint = length_groups.join([part.inputs for part in batch.values()])
        wide = {task: part._replace(inputs=_as_wide(part.inputs, joint), lengths=None) for task, part in batch.items()}
        with uncut():
            four = texts.counted(lambda wide=wide, size=-(-samples // 4): texts.step(wide, size))
        apart = max(apart, float((before["result"] - after["result"]).abs().max() / before["result"].abs().max()))
        if number:
            for kind, row in zip(table, (before, after, four), strict=True):
                table[kind].append(row)
    ratios = [a["seconds"] / b["seconds"] for a, b in zip(table["like lengths"], table["one pass"], strict=True)]
    costs = [
        (four["seconds"] - one["seconds"]) / (four["passes"] - 1) / (one["seconds"] / one["padded"])
        for four, one in zip(table["four passes"], table["one pass"], strict=True)
    ]
    return {
        "a step": {kind: _means(rows) for kind, rows in table.items()}
        | {"ratio": statistics.median(ratios), "quartiles": statistics.quantiles(ratios, n=4)[::2]},
        "experts": {kind: _means(rows) for kind, rows in taught.items()},
        "pass_cost": statistics.median(costs),
        "gradients_apart": apart,
    }


def _as_wide(inputs: Any, joint: Any) -> Any:
    """A task's inputs as wide as those of all."""
    wide = {name: value.new_zeros(len(inputs[name]), value.shape[1]) for name, value in joint.items()}
    for name, value in inputs.items():
        wide[name][:, : value.shape[1]] = value
    return wide


def _means(rows: list[dict[str, Any]]) -> dict[str, float]:
    found = {name: statistics.fmean(row[name] for row in rows) for name in ("real", "padded", "passes")}
    return found | {name: statistics.median(row[name] for row in rows) for name in ("seconds", "wall")}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="0.1B")
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--batch", type=int, default=1, help="samples per task")
    parser.add_argument("--texts", help="a pool's configuration: its texts are run instead of random tokens")
    parser.add_argument("--steps", type=int, default=20, help="with --texts, of which the first is not counted")
    parser.add_argument("--rounds", type=int, default=3, help="with --texts, of the experts' passes")
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
    if own.texts:
        given = {name: getattr(own, name) for name in ("texts", "batch", "steps", "rounds")}
        load = {"threads": torch.get_num_threads(), "load": os.getloadavg()[0]}
        print(json.dumps(given | load | measure_texts(own), indent=1))
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
