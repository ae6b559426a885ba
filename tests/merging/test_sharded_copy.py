"""Sharded over two processes: the coefficients that one process finds, on both; and only rows of the weights in each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pico import TASKS
from rounding import gamma
from running import child
from torch import nn
from toys import Tied

from adamerge.backbones.inputs import stack
from adamerge.backbones.structure import owner, whole_modules
from adamerge.errors import ConfigError
from adamerge.merging.copies import WholeCopy
from adamerge.merging.merged_model import MergedModel
from adamerge.merging.sharded_copy import ShardedCopy, _holders
from adamerge.parametrizations import LayerWise, TaskWise
from adamerge.task_vectors.storage import Resident
from adamerge.task_vectors.task_vectors import TaskVectors

SCRIPT = """
import json, sys
from functools import partial
import torch
from lightning import Trainer
from torch.optim import SGD
from adamerge import CausalLM, ChunkWise, Concrete, Entropy, LanguageCalibration, LanguageTask, LayerWise
from adamerge import Descent, Merging, MergingModule, RandomPartition, ShardedCopy, TaskVectors, WholeCopy
from adamerge.transforms import Ties

given = json.loads(sys.argv[1])
torch.set_num_threads(1)
pool = given["pool"]
parts = {
    "layer": LayerWise, "chunk": partial(ChunkWise, chunks=3), "partition": partial(RandomPartition, parts=4),
    "mask": partial(Concrete, inner=LayerWise),
}
vectors = TaskVectors(pool["base"], pool["experts"], [Ties(0.5)] if given["ties"] else [])
data = LanguageCalibration(tasks={t: LanguageTask(f, train="train") for t, f in given["texts"].items()}, batch_size=4)
data.calibration_fraction = 0.8
copy = ShardedCopy() if given["sharded"] else WholeCopy()
module = MergingModule(Merging(
    backbone=CausalLM(pool["base"]), task_vectors=vectors, parametrization=parts[given["part"]], objective=Entropy(),
    search=Descent(partial(SGD, lr=1.0), 0.5), micro_batch=given["micro_batch"], copy=copy,
))
parallel = {"devices": 2, "strategy": "ddp"} if given["sharded"] else {"devices": 1}
trainer = Trainer(
    max_steps=3, max_epochs=1, accelerator="cpu", use_distributed_sampler=False, logger=False, limit_val_batches=1,
    num_sanity_val_steps=1, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, **parallel,
)
trainer.fit(module, data)
places = module.merged._places.values()
held = sum(place.tensor.numel() for place in places)
found = {"values": [p.detach() for p in module.merged.trained()], "held": held,
         "score": trainer.callback_metrics["validation/token_loss"]}
torch.save(found, f"{given['out']}_{trainer.global_rank}.pt")
"""


def fitted(folder: Path, pool: dict[str, Any], name: str, **settings: Any) -> list[dict[str, Any]]:
    script, texts = folder / "fit.py", {}
    script.write_text(SCRIPT)
    for task in ("one", "two"):
        texts[task] = str(folder / f"{task}.jsonl")
        Path(texts[task]).write_text("\n".join(json.dumps({"text": f"{task} says hello {i} times"}) for i in range(12)))
    given = {"pool": {key: pool[key] for key in ("base", "experts")}, "texts": texts, "out": name, "micro_batch": None}
    done = child([script, json.dumps({**given, "part": "layer", "ties": False, **settings})], folder, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(path, weights_only=True) for path in sorted(folder.glob(f"{name}_*.pt"))]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("llama", {}),
        ("gpt2", {"part": "chunk", "micro_batch": 3}),  # its head is tied
        ("llama", {"part": "partition"}),
        ("llama", {"part": "mask"}),
        ("llama", {"ties": True}),
    ],
    ids=["layer-wise", "chunks of a tied model", "partition", "mask", "TIES"],
)
def test_two_processes_find_what_one_finds(kind, settings, pool_of, tmp_path):
    pool = pool_of(kind)
    (alone,) = fitted(tmp_path, pool, "alone", sharded=False, **settings)
    first, second = fitted(tmp_path, pool, "both", sharded=True, **settings)
    for one, other, right in zip(first["values"], second["values"], alone["values"], strict=True):
        assert torch.equal(one, other), "the ranks drifted apart"
        assert (one - right).abs().max() <= 1e-6
    assert (alone["values"][0] - 0.3).abs().max() > 1e-4, "something was learned"
    assert float(first["score"]) == pytest.approx(float(alone["score"]), rel=1e-5)
    share = 0.75 if kind == "gpt2" else 0.51  # what is tied is whole in both
    assert first["held"] <= share * alone["held"] and first["held"] + second["held"] >= alone["held"]


def test_one_process_alone_is_told(pool_of):
    pool = pool_of("llama")
    vectors = TaskVectors(pool["base"], pool["experts"])
    merged = MergedModel(pool["backbone"](), vectors, TaskWise(vectors), copy=ShardedCopy())
    with pytest.raises(ConfigError, match="a sharded copy needs several processes"):
        merged.merge()


def test_experts_that_each_process_would_hold_whole_are_refused(pool_of):
    pool = pool_of("llama")
    vectors = TaskVectors(pool["base"], pool["experts"])
    with pytest.raises(ConfigError, match=r"model.storage Resident\(float32\) holds whole tensors"):
        MergedModel(pool["backbone"](), vectors, TaskWise(vectors), Resident(), copy=ShardedCopy())


@pytest.fixture
def group(tmp_path):
    torch.distributed.init_process_group("gloo", f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("kind", ["llama", "bert", "resnet", "vit", "clip", "qwen2_vl"])
def test_networks_in_bfloat16_run_sharded_as_they_run_whole(kind, group, pool_of):
    """Between their passes, the rows of sharded weights are in fp32, and so says whoever asks them for their dtype."""
    pool, logits, gradients = pool_of(kind), [], []
    for copy in (WholeCopy(), ShardedCopy()):
        vectors = TaskVectors(pool["base"], pool["experts"], include=pool["include"], exclude=pool["exclude"])
        backbone = pool["backbone"]("bfloat16")
        merged = MergedModel(backbone, vectors, LayerWise(vectors), copy=copy)
        merged.fill(vectors.base.__getitem__)
        backbone.build_heads(TASKS, vectors.checkpoints)
        merged.merge()
        output = backbone.output(merged(stack([backbone.preprocess(one) for one in pool["samples"]["one"]])), "one")
        logits.append(output.logits)
        output.logits.float().square().mean().backward()
        merged.pull_back(torch.zeros(())).backward()
        gradients.append(torch.cat([parameter.grad.view(-1) for parameter in merged.trained()]))
    assert gradients[0].abs().max() > 0
    assert (gradients[1] - gradients[0]).abs().max() <= 2e-2 * gradients[0].abs().max()
    assert logits[1].dtype == logits[0].dtype and torch.allclose(logits[1], logits[0], rtol=2e-2, atol=2e-2)


def test_pieces_of_fused_parameters_are_refused(group, pool_of):
    pool = pool_of("qwen3_moe")
    vectors = TaskVectors(pool["base"], pool["experts"])
    merged = MergedModel.__new__(MergedModel)
    with pytest.raises(ConfigError, match="cannot be sharded: the network keeps it in a piece of a larger parameter"):
        merged.__init__(pool["backbone"](), vectors, TaskWise(vectors), copy=ShardedCopy())


def test_a_process_of_its_own_group_is_the_whole(group, pool_of):
    """One process that shards among itself: gathered, reduced and contracted as among many; twice is refused."""
    pool = pool_of("llama")
    vectors, found = TaskVectors(pool["base"], pool["experts"]), []
    for copy in (None, ShardedCopy()):
        merged = MergedModel(pool["backbone"](), vectors, TaskWise(vectors), copy=copy)
        merged.merge()
        ids = torch.arange(5, 17).view(2, 6)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "predicted": torch.ones_like(ids)}
        loss = merged(inputs).features.square().mean()
        loss.backward()
        merged.pull_back(loss.detach()).backward()
        found.append(merged.trained()[0].grad)
    elements = sum(value.numel() for value in vectors.base.values())  # that one coefficient's gradient sums over
    assert (found[0] - found[1]).abs().max() <= 2 * gamma(elements) * found[0].abs().max()
    with pytest.raises(ConfigError, match="sharded already"):
        ShardedCopy().move(merged.backbone.network, torch.device("cpu"))


def test_what_was_sent_is_let_go_at_once(group):
    """Else each process would hold the gradient of all units until the backward pass is over."""

    class Network(nn.Module):
        def __init__(self, count: int) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(64, 64, bias=False) for _ in range(count)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

    def beside(count: int) -> int:
        """The most that is there in a second backward pass beside the gradients, in units of a layer."""
        network = Network(count)
        ShardedCopy().places(network, {}, torch.device("cpu"))
        for _ in range(2):
            network.zero_grad()
            loss = network(torch.ones(1, 64, requires_grad=True)).sum()
            with torch.profiler.profile(profile_memory=True) as profile:
                loss.backward()
        events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
        sums = torch.tensor([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]).cumsum(0)
        return round(float(sums.max()) / (4 * 64 * 64)) - count

    assert beside(9) <= 4


def test_nothing_whole_is_kept(group, pool_of):
    """Not the weights as they were before, whoever knows them, and no second gradient beside the rows'."""
    pool = pool_of("llama")
    vectors, backbone = TaskVectors(pool["base"], pool["experts"]), pool["backbone"]()
    before = [*backbone.network.parameters()]
    assert all(parameter.numel() for parameter in before)
    merged = MergedModel(backbone, vectors, LayerWise(vectors), copy=ShardedCopy())
    assert not any(parameter.numel() for parameter in before)
    merged.merge()
    ids = torch.arange(5, 17).view(2, 6)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "predicted": torch.ones_like(ids)}
    merged(inputs).features.square().mean().backward()
    place = merged._places["model.layers.0.self_attn.q_proj.weight"]
    assert place.gradient.data_ptr() == place.parameter.grad.to_local().data_ptr()


def test_units_and_what_they_share():
    network = Tied()
    units = whole_modules(network)
    assert units == [*network.layers, network.embed, network.head]
    holders, shared = _holders(units)
    assert shared == {network.embed.weight} and len(holders) == 2 * 4
    assert holders[id(network.layers[1][0].bias)] == (network.layers[1][0], "bias")
    assert owner(network.scale) is network.scale and id(network.scale) not in holders
