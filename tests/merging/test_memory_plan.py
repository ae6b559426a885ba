"""The plan: its numbers by hand, what it advises, and that a real fit takes what it says."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial

import pytest
import torch
from pico import tokenizer
from running import numbers_of
from safetensors.torch import save_file

from adamerge.artifacts.recipe import describe
from adamerge.merging.block_copy import BlockCopy
from adamerge.merging.copies import WholeCopy
from adamerge.merging.footprint import Unit
from adamerge.merging.memory_plan import Plan
from adamerge.merging.sharded_copy import ShardedCopy
from adamerge.parametrizations import (
    ChunkWise,
    Concrete,
    ElementWise,
    ImportanceChunkWise,
    LayerWise,
    RandomPartition,
    RowColumnWise,
    TaskWise,
)
from adamerge.solvers import Components
from adamerge.solvers.solving import write_task_vectors
from adamerge.task_vectors.automatic_storage import Automatic
from adamerge.task_vectors.memory import Available, Memory, size
from adamerge.task_vectors.storage import Disk, LowBit, Pinned, Resident
from adamerge.task_vectors.task_vectors import TaskVectors
from merging.test_merged_model import files, lora_files

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LOTS = Available(1 << 40, 1 << 40)


def planned(vectors, kind=LayerWise, device=CPU, storage=None, there=LOTS, copy=None, processes=1, units=None):
    merged = sum(vectors.shape(name).numel() for name in vectors)
    units = [Unit(1000, 250, merged)] if units is None else units
    found = Plan.of(
        vectors,
        kind(vectors),
        units=units,
        device=CPU,
        storage=storage or Automatic(),
        copy=copy,
        processes=processes,
    )
    return replace(found, device=device, there=there)


def split(vectors):
    """Two blocks, a module beside them, and something shared; together they are what is merged, in bfloat16."""
    merged = sum(vectors.shape(name).numel() for name in vectors)
    sizes = [merged // 4, merged // 4 + 5, 30, 20]
    sizes.append(merged - sum(sizes))
    return [
        *(Unit(2 * n, n, n, block=True) for n in sizes[:2]),
        Unit(2 * sizes[2], sizes[2], sizes[2]),
        Unit(2 * sizes[3], sizes[3], sizes[3], shared=True),
        Unit(2 * sizes[4], sizes[4], sizes[4]),
    ]


def test_a_peak_is_copy_gradient_learned_numbers_and_storage(tmp_path):
    plan = planned(files(tmp_path, 3, 32))
    elements = 2 * (32 * 64) + 32 + 64 + 1
    assert plan.sizes.merged == elements and (plan.coefficients, plan.groups, plan.logits) == (15, 5, 0)
    beside = 1000 + 4 * elements + 20 * 15
    assert plan.beside == Memory(host=beside)
    assert plan.peak(Resident()) == Memory(host=beside + 3 * 4 * elements)
    assert plan.peak(Resident("bfloat16")) == Memory(host=beside + 3 * 2 * elements + 3 * 4 * 32 * 64)
    assert plan.peak(Disk()) == Memory(host=beside + 3 * 4 * 32 * 64)
    on_device = planned(files(tmp_path, 3, 32), device=CUDA)
    assert on_device.peak(Resident()) == Memory(device=beside + 4 * 4 * elements)
    assert on_device.peak(Pinned()).host == 5 * 4 * elements


def test_a_mask_is_learned_too(tmp_path):
    plan = planned(files(tmp_path, 2, 16), partial(Concrete, inner=TaskWise))
    assert plan.logits == plan.sizes.merged and plan.coefficients == 2 and plan.groups == 1
    assert plan.learned == 20 * (2 + plan.sizes.merged)


def test_ids_of_a_random_partition_are_kept(tmp_path):
    vectors = files(tmp_path, 2, 16)
    for kind in (partial(RandomPartition, parts=5), partial(Concrete, inner=partial(RandomPartition, parts=5))):
        plan = planned(vectors, kind)
        assert plan.learned == 20 * (plan.coefficients + plan.logits) + plan.sizes.merged
    large = planned(vectors, partial(RandomPartition, parts=300))
    # two bytes an element where a tensor has more than 256 parts
    assert large.learned == 20 * large.coefficients + 2 * 2 * (16 * 32) + 16 + 32 + 1

    # and where sums are made each is an index for a moment, and has its coefficient
    def unlearned(plan):
        peak = plan.peak(Disk())
        return peak.host + peak.device - plan.learned

    for device in (CPU, CUDA):
        plain = planned(vectors, device=device)
        assert unlearned(replace(large, device=device)) - unlearned(plain) == (2 + 8 + 4) * 16 * 32


def test_what_this_process_has_taken_counts_as_available(tmp_path, monkeypatch):
    monkeypatch.setattr(Available, "on", classmethod(lambda cls, device, local_world_size=None: cls(5000, None)))
    vectors = files(tmp_path, 2, 16)
    plan = Plan.of(vectors, LayerWise(vectors), units=[], device=CPU, storage=Automatic(), taken=Memory(host=1000))
    assert plan.there == Available(6000, None)


def test_the_choice_is_automatic_or_what_was_said(tmp_path):
    vectors = files(tmp_path, 3, 32)
    needed = planned(vectors).peak(Resident()).host
    assert str(planned(vectors, there=Available(round(needed / 0.8) + 1, 0)).chosen) == "Resident(float32)"
    assert str(planned(vectors, there=Available(round(needed / 0.8) - 8, 0)).chosen) == "Disk()"
    plan = planned(vectors, storage=LowBit(8), there=Available(1, 0))
    assert plan.chosen is plan.storage and not plan.fits(plan.chosen)


def test_it_says_what_to_do_when_nothing_or_something_smaller_fits(tmp_path):
    vectors = files(tmp_path, 8, 32)
    assert planned(vectors).advice() is None
    plan = planned(vectors, storage=Resident())
    room = Available(round(plan.peak(Resident("bfloat16")).host / 0.8) + 1, 0)
    found = planned(vectors, storage=Resident(), there=room).advice()
    assert "Resident(float32) does not fit" in found and "Resident(bfloat16)" in found
    assert "--model.storage=Disk" in found
    found = planned(vectors, there=Available(1000, 0)).advice()
    assert "not even the merged copy and its gradient fit" in found and "backbone.dtype" in found


def test_of_a_block_copy_what_is_in_no_block_and_the_largest_block(tmp_path):
    vectors = files(tmp_path, 3, 32)
    one, other, rest, shared, last = split(vectors)
    plan = planned(vectors, copy=BlockCopy(), units=[one, other, rest, shared, last])
    always = rest.numel + shared.numel + last.numel
    assert plan.footprint.weights == plan.footprint.made == 2 * always and plan.footprint.gradient == 4 * always
    assert plan.footprint.running == (2 + 4) * other.numel
    beside = 6 * always + 6 * other.numel + 20 * 15
    assert plan.beside == Memory(host=beside)
    assert plan.peak(Disk()) == Memory(host=beside + 3 * 4 * 32 * 64)
    assert planned(vectors, copy=BlockCopy(), processes=4, units=plan.units).beside == plan.beside


def test_of_a_sharded_copy_a_part_and_what_is_gathered(tmp_path):
    vectors = files(tmp_path, 3, 32)
    units = split(vectors)
    parted = sum(unit.numel for unit in units) - 20
    largest = max(unit.numel for unit in units)
    for processes in (2, 7):
        plan = planned(vectors, storage=Disk(), copy=ShardedCopy(), processes=processes, units=units, device=CUDA)
        rows = -(-parted // processes)
        assert plan.footprint.weights == 4 * rows + 2 * 20 and plan.footprint.gradient == 4 * rows + 4 * 20
        assert plan.footprint.running == (2 + 2 + 4 + 4) * largest
        # contracted when the backward pass is over, so what runs and what is read from disk are never there together
        most = 8 * rows + 6 * 20 + max(12 * largest, 3 * 4 * 32 * 64)
        assert plan.peak(plan.chosen) == Memory(device=most + 20 * 15)
        assert list(map(str, plan.storages)) == ["Disk()"]


def test_a_whole_copy_is_whole_in_every_process(tmp_path):
    vectors = files(tmp_path, 3, 32)
    plan = planned(vectors, copy=WholeCopy())
    assert planned(vectors, copy=WholeCopy(), processes=8).peak(Disk()) == plan.peak(Disk())


def test_the_choice_of_storage_knows_the_copy(tmp_path):
    vectors = files(tmp_path, 3, 32)
    blocks = planned(vectors, copy=BlockCopy(), units=split(vectors))
    room = Available(round(blocks.peak(Resident()).host / 0.8) + 8, 0)
    assert str(replace(blocks, there=room).chosen) == "Resident(float32)"
    assert str(replace(blocks, there=room, copy=WholeCopy()).chosen) == "Disk()"


def test_it_names_another_copy_that_fits(tmp_path):
    vectors = files(tmp_path, 3, 32)
    whole = planned(vectors, units=split(vectors), device=CUDA)

    def advised(copy, room, processes=1):
        return replace(whole, copy=copy, processes=processes, there=Available(0, round(room / 0.8) + 8)).advice()

    needed = replace(whole, copy=BlockCopy()).peak(Disk()).device
    found = advised(WholeCopy(), needed)
    assert "not even the merged copy and its gradient fit" in found and "--model.copy=BlockCopy" in found
    assert size(needed) in found
    assert "--model.copy" not in (found := advised(BlockCopy(), 1000)) and "backbone.dtype" in found

    heavy = [Unit(2 * 9000, 9000, 9000, block=True), *(Unit(2 * 9000, 9000, 9000) for _ in range(20))]
    whole = replace(whole, units=heavy)
    needed = {n: replace(whole, copy=ShardedCopy(), processes=n).peak(Disk()).device for n in (4, 5)}
    assert needed[4] > needed[5]
    for copy, processes in ((WholeCopy(), 1), (BlockCopy(), 1), (ShardedCopy(), 2)):
        found = advised(copy, needed[5], processes)
        assert "--model.copy=ShardedCopy" in found and "on 5 devices like this" in found
    assert "--model.copy=ShardedCopy" in (text := advised(WholeCopy(), needed[4])) and "on 4 devices" in text


def test_factors_are_never_rounded_so_no_line_says_so(tmp_path):
    names = [str(storage) for storage in planned(lora_files(tmp_path, 3, 32)).storages]
    assert names == ["Resident(float32)", "Disk()"]
    (tmp_path / "dense").mkdir()
    dense = files(tmp_path / "dense", 2, 8)
    assert len(planned(dense).storages) == 5 and len(planned(dense, device=CUDA).storages) == 6
    assert str(planned(dense, storage=Resident("float16")).storages[0]) == "Resident(float16)"


@pytest.mark.parametrize(
    "kind",
    [
        *(TaskWise, LayerWise, partial(ChunkWise, chunks=3), partial(RandomPartition, parts=7)),
        partial(ImportanceChunkWise, allocation={"blocks.0.weight": 3, "blocks.1.weight": 1}, init=0.2),
        partial(Concrete, inner=LayerWise),
        *(RowColumnWise, ElementWise),
    ],
    ids=str,
)
def test_a_parametrization_without_numbers_gives_the_same_plan(tmp_path, kind):
    """7B logits are not made to be counted."""
    vectors = files(tmp_path, 3, 16)
    if isinstance(kind, partial) and kind.func is ImportanceChunkWise:
        kind = partial(kind, allocation=dict.fromkeys(vectors, 0) | kind.keywords["allocation"])
    with torch.device("meta"):
        empty = kind(vectors)
    assert all(parameter.is_meta for parameter in empty.parameters())
    real = kind(vectors)
    one, other = (Plan.of(vectors, made, units=[Unit(7, 1, 1)], device=CPU, storage=Disk()) for made in (empty, real))
    assert one.record()["predicted_peak"] == other.record()["predicted_peak"]
    assert (one.coefficients, one.groups, one.logits) == (other.coefficients, other.groups, other.logits)
    assert empty.initial == real.initial


def test_sizes_for_the_eye():
    assert [size(n) for n in (None, 0, 512, 1536, 3 << 20, 5 << 40)] == [
        "?",
        "0 B",
        "512 B",
        "1.50 KiB",
        "3.00 MiB",
        "5120.00 GiB",
    ]


# a real fit ----------------------------------------------------------------------------------------------------------

CHILD = """
import sys, threading, time
from pathlib import Path
import torch
from adamerge.backbones import CausalLM, OpenClipClassifier
from adamerge.merging.merged_model import MergedModel
from adamerge.parametrizations import ComponentWise, ElementWise, LayerWise, RankMask, RowColumnWise
from adamerge.transforms import RootSumSquare
from adamerge.merging.memory_plan import Plan
from adamerge.task_vectors.storage import Disk, LowBit, Resident
from adamerge.task_vectors.task_vectors import TaskVectors
from adamerge.merging.footprint import units_of
from transformers import AutoModelForCausalLM

class Ranked(RankMask):
    def __init__(self, vectors):
        super().__init__(vectors, inner=LayerWise)

def anonymous():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024

peak, done = 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.002)

root, kind, storage = Path(sys.argv[1]), sys.argv[2], eval(sys.argv[3])
kind_of, transforms = eval(sys.argv[4]) if len(sys.argv) > 4 else (LayerWise, [])
import open_clip  # what libraries take that a network or an optimiser's first step imports is of no plan
if kind_of is not LayerWise:
    first = torch.nn.Parameter(torch.zeros(1))
    first.grad = torch.zeros(1)
    torch.optim.Adam([first]).step()
start = anonymous()
thread = threading.Thread(target=watch)
if kind == "clip":
    experts = {f"e{k}": root / f"expert{k}.safetensors" for k in range(8)}
    backbone = OpenClipClassifier("ViT-B-32-quickgelu")
    components = root / "components.safetensors" if kind_of in (ComponentWise, Ranked) else None
    vectors = TaskVectors(root / "base.safetensors", experts, transforms, include=["visual.*"], components=components)
    inputs = torch.zeros(1, 3, 224, 224, dtype=torch.uint8)
else:
    backbone = CausalLM(str(root / "llama"))
    vectors = TaskVectors(root / "llama", {f"e{k}": root / f"llama{k}.safetensors" for k in range(8)})
    inputs = {"input_ids": torch.ones(1, 4, dtype=torch.long), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    inputs["predicted"] = torch.ones(1, 4, dtype=torch.bool)
parametrization = kind_of(vectors)
units = units_of(backbone.network, backbone.tensors(), vectors)
plan = Plan.of(vectors, parametrization, units=units, device=torch.device("cpu"), storage=storage)
merged = MergedModel(backbone, vectors, parametrization, storage)
search = None
thread.start()
for _ in range(2):
    merged.merge()
    found = merged(inputs)
    found = found.features if kind == "clip" else backbone.output(found, "any").logits
    found.float().pow(2).mean().backward()
    merged.pull_back(torch.zeros(())).backward()
    if kind_of is not LayerWise:  # where they are many, they count
        before = [parameter.detach().clone() for parameter in merged.trained()]
        search = torch.optim.Adam(merged.trained()) if search is None else search
        search.step()
        assert all(parameter.grad.any() for parameter in merged.trained())
        search.zero_grad()
        del before
done = True
thread.join()
print(plan.peak(storage).host, peak - start)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """ViT-B/32 and a Llama of 0.1B with random weights, and eight experts of each, which are two under four names."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from adamerge.backbones import OpenClipClassifier

    root = tmp_path_factory.mktemp("large")
    torch.manual_seed(0)
    clip = OpenClipClassifier("ViT-B-32-quickgelu").network.state_dict()
    save_file(clip, root / "base.safetensors")
    sizes = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12}
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=16000, **sizes))
    llama.save_pretrained(root / "llama")
    tokenizer(root / "llama")
    towers = {n: v for n, v in clip.items() if n.startswith("visual.")}
    for prefix, weights in (("expert", towers), ("llama", dict(llama.state_dict()))):
        for k in range(2):
            save_file(
                {n: v + 1e-3 * torch.randn_like(v) for n, v in weights.items()}, root / f"{prefix}{k}.safetensors"
            )
            for other in range(k + 2, 8, 2):
                os.link(root / f"{prefix}{k}.safetensors", root / f"{prefix}{other}.safetensors")
    yield root
    for path in (*root.glob("*.safetensors"), *root.glob("llama/*")):
        path.unlink()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("storage", ["Resident()", "Resident('bfloat16')", "LowBit(8)", "Disk()"])
@pytest.mark.parametrize("kind", ["clip", "llama"])
def test_a_real_step_takes_what_was_predicted(large, kind, storage):
    predicted, measured = numbers_of(CHILD, large, kind, storage)
    print(f"{kind} {storage}: predicted {predicted >> 20} MiB, measured {measured >> 20} MiB")
    assert 0.85 <= predicted / measured <= 1.15


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("storage", ["Resident()", "Resident('bfloat16')", "LowBit(8)", "Disk()"])
@pytest.mark.parametrize("many", ["(RowColumnWise, [])", "(ElementWise, [RootSumSquare()])"])
def test_a_real_step_with_many_coefficients_takes_what_was_predicted(large, many, storage):
    predicted, measured = numbers_of(CHILD, large, "clip", storage, many)
    print(f"{many} {storage}: predicted {predicted >> 20} MiB, measured {measured >> 20} MiB")
    assert 0.85 <= predicted / measured <= 1.15


class Random(Components):
    """Factors as small as real ones, which take no decomposition."""

    def tensors(self, name, vectors):
        for shape in self.entries(name, vectors).values():
            yield 1e-3 * torch.randn(shape)


@pytest.fixture(scope="module")
def components(large):
    """A quarter of each matrix's components."""
    experts = {f"e{k}": large / f"expert{k}.safetensors" for k in range(8)}
    vectors, path = (
        TaskVectors(large / "base.safetensors", experts, include=["visual.*"]),
        large / "components.safetensors",
    )
    write_task_vectors(path, Random(0.25), vectors, recipe=describe(Components(0.25)))
    return large


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("storage", ["Resident()", "Disk()"])
@pytest.mark.parametrize("many", ["(ComponentWise, [])", "(Ranked, [])"])
def test_a_real_step_of_components_takes_what_was_predicted(components, many, storage):
    """Factors are never rounded, so that there are two storages."""
    predicted, measured = numbers_of(CHILD, components, "clip", storage, many)
    print(f"{many} {storage}: predicted {predicted >> 20} MiB, measured {measured >> 20} MiB")
    assert 0.85 <= predicted / measured <= 1.15
