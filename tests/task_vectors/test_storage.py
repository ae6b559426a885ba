"""Storages: one merge and one gradient whatever holds the deltas, within the stated bounds, cost and memory."""

from __future__ import annotations

import inspect
from functools import partial

import pytest
import torch
from merging.test_merged_model import Mlp, Net, cost, files, lora_files, models
from rounding import gamma

import adamerge.task_vectors.automatic_storage
import adamerge.task_vectors.storage
from adamerge.deltas.base import DenseDeltas
from adamerge.deltas.low_rank import LowRankDeltas
from adamerge.deltas.quantized import EncodedDeltas
from adamerge.deltas.tuning import FEW
from adamerge.errors import ConfigError
from adamerge.merging.merged_model import MergedModel
from adamerge.parametrizations import ChunkWise, LayerWise, RandomPartition
from adamerge.task_vectors.automatic_storage import Automatic
from adamerge.task_vectors.memory import Memory, Sizes
from adamerge.task_vectors.storage import Disk, LowBit, Pinned, Resident, Storage
from adamerge.task_vectors.task_vectors import TaskVectors
from adamerge.transforms import Magnitude, Scale, Ties

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class Conveyed(Pinned):
    """As on a device: through the arena and the conveyor, which need none."""

    def place(self, vectors, device):
        return self.placed(vectors, device, pinned=False)


# fraction of sum_k |c_k tau_k| that a merged weight may be off by; of few bits, of the largest delta of a block
ROUNDED = {"bfloat16": 2.0**-8, "float16": 2.0**-11}
EXACT = [Resident(), Pinned(), Conveyed(), Disk(), Automatic()]
STORAGES = [
    *(kind(dtype) for kind in (Resident, Pinned, Conveyed) for dtype in ("float32", "bfloat16", "float16")),
    *(LowBit(8), LowBit(4), Disk(), Automatic()),
]


def error_bound(storage: Storage, deltas: torch.Tensor, coefficients: torch.Tensor) -> torch.Tensor:
    """Of each merged weight; deltas ``(experts, numel)`` and coefficients ``(experts, 1)`` in float64."""
    each = deltas.abs() * ROUNDED.get(getattr(storage, "dtype", ""), 0.0)
    if getattr(storage, "dtype", "") == "float16":
        each = each.clamp_min(2.0**-25)
    if isinstance(storage, LowBit):
        padded = torch.nn.functional.pad(deltas.abs(), (0, -deltas.shape[1] % 64)).unflatten(1, (-1, 64))
        largest = padded.amax(dim=2, keepdim=True).expand(padded.shape).flatten(1)[:, : deltas.shape[1]]
        each = largest * {8: 1 / 254, 4: 1 / 14}[storage.bits]
    return (coefficients.abs() * each).sum(dim=0) * (1 + 1e-5)


def made(storage, kind=LayerWise, transforms=(), tasks=3):
    vectors = TaskVectors(**models(tasks), transforms=transforms)
    parametrization = kind(vectors)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        parametrization.w.copy_(torch.rand(parametrization.w.shape, generator=generator))
    return MergedModel(Mlp(), vectors, parametrization, storage)


def test_every_storage_is_swept_here():
    finals = {
        member
        for module in (adamerge.task_vectors.storage, adamerge.task_vectors.automatic_storage)
        for _, member in inspect.getmembers(module, inspect.isclass)
        if issubclass(member, Storage) and not inspect.isabstract(member)
    }
    assert finals == {type(storage) for storage in STORAGES} - {Conveyed}


@pytest.mark.parametrize("storage", STORAGES, ids=str)
def test_merged_weights_are_within_the_stated_bound(storage):
    merged = made(storage)
    merged.merge()
    base, worst = models()["base"], 0.0
    for name in merged.task_vectors:
        tau = TaskVectors(**models())[name].dense().double().reshape(3, -1)
        coefficients = merged.parametrization.shares(name)[0].detach().double()
        wanted = base[name].double().flatten() + (coefficients * tau).sum(dim=0)
        error = (merged.backbone.tensors()[name].detach().double().flatten() - wanted).abs()
        bound = error_bound(storage, tau, coefficients)
        assert (error <= bound + 1e-6).all(), name
        worst = max(worst, float((error / (bound + 1e-6)).max()))
    assert worst > 0.1 or isinstance(storage, Disk | Automatic) or storage.dtype == "float32"


@pytest.mark.parametrize("kind", [LayerWise, ChunkWise, partial(RandomPartition, parts=3)], ids=str)
@pytest.mark.parametrize("storage", STORAGES, ids=str)
def test_the_gradient_is_that_of_the_deltas_that_are_held(storage, kind):
    """``<G, tau_k>`` in fp32 with the held deltas, whatever a sum of so many terms loses."""
    merged = made(storage, kind)
    merged.merge()
    slopes = {name: torch.randn(value.shape) for name, value in models()["base"].items()}
    for name in merged.task_vectors:
        merged.backbone.tensors()[name].grad = slopes[name].clone()
    merged.pull_back(torch.zeros(())).backward()
    parametrization = merged.parametrization
    gradient, expected = parametrization.w.grad, torch.zeros_like(parametrization.w, dtype=torch.float64)
    bound = torch.zeros_like(expected)
    for name, deltas in merged.task_vectors.items():
        # the coefficient that each element uses, found by counting them up one at a time
        products = (deltas.dense().double() * slopes[name].double()).reshape(len(gradient), -1)
        group, groups = parametrization._columns[parametrization.group(name)], parametrization.shares(name)[1]
        ids = torch.zeros(products.shape[1], dtype=torch.int64)
        for one in range(groups.count):
            chosen = torch.zeros(parametrization.w.shape[0], groups.count)
            chosen[:, one] = 1.0
            ones = DenseDeltas(torch.ones(len(chosen), *deltas.shape) / len(chosen))
            ids[ones.combine(chosen, groups).flatten().round().bool()] = one
        for one in range(groups.count):
            expected[:, group.start + one] += products[:, ids == one].sum(dim=1)
            bound[:, group.start + one] += gamma(1 + products.shape[1]) * products[:, ids == one].abs().sum(dim=1)
    assert ((gradient - expected).abs() <= bound).all()


@pytest.mark.parametrize("storage", EXACT, ids=str)
@pytest.mark.parametrize("transforms", [[], [Ties(keep=0.5)], [Scale({"task1": -2.0})]], ids=["none", "ties", "scale"])
def test_exact_storages_merge_alike(storage, transforms):
    one, other = made(storage, transforms=transforms), made(Disk(), transforms=transforms)
    one.merge()
    other.merge()
    for name, tensor in one.backbone.tensors().items():
        assert torch.allclose(tensor, other.backbone.tensors()[name], rtol=0, atol=1e-6), name


@pytest.mark.parametrize("storage", STORAGES, ids=str)
def test_factors_stay_factors_in_fp32(tmp_path, storage):
    vectors = lora_files(tmp_path, 3, 16)
    placed = storage.place(vectors, CPU)
    coefficients = torch.randn(3, 1)
    for name in vectors:
        assert isinstance(placed[name], LowRankDeltas)
        assert {factor.dtype for factor in placed[name].read()} == {torch.float32}
        from adamerge.deltas.groups import Whole

        assert torch.equal(placed[name].combine(coefficients, Whole()), vectors[name].combine(coefficients, Whole()))


# cost ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tasks", [2, 4, 8])
@pytest.mark.parametrize("storage", STORAGES, ids=str)
def test_cost_is_linear_in_tasks_whatever_holds_them(tmp_path, storage, tasks):
    """(3T + 2) P of stored floats, also narrow ones; the codes of few bits as EncodedDeltas states them, and 1 P to add."""
    most = {Disk: 5 * tasks + 2, LowBit: {8: 4, 4: 8}.get(getattr(storage, "bits", 0), 0) * tasks + 2.1}
    if isinstance(storage, Conveyed):
        most[Conveyed] = 5 * tasks + 2  # the copies to the device count here
    vectors = files(tmp_path, tasks, 96)
    found = cost(MergedModel(Mlp(Net(96)), vectors, LayerWise(vectors), storage), torch.randn(3, 96))
    print(f"T={tasks} {storage}: {found.both:.3f} P")
    assert 2 * tasks <= found.both <= most.get(type(storage), 3 * tasks + 2)


@pytest.mark.parametrize("storage", STORAGES, ids=str)
def test_memory_between_merge_and_backward_does_not_know_the_number_of_tasks(tmp_path, storage):
    found = {}
    for tasks in (2, FEW + 1, 16):
        folder = tmp_path / str(tasks)
        folder.mkdir()
        vectors = files(folder, tasks, 96)
        found[tasks] = cost(MergedModel(Mlp(Net(96)), vectors, LayerWise(vectors), storage), torch.randn(3, 96))
    largest = 4 * 2 * 96 * 96
    assert found[16].between <= 16 * 4 * 5 * 8 * 2
    assert found[16].peak - found[FEW + 1].peak <= 16 * 4 * 5 * 8 * 2  # a few are read or decoded at once, then others
    assert found[2].peak <= 4 * largest


def live(placed: TaskVectors) -> int:
    """Bytes of tensors that are held for the deltas."""
    found = 0
    for name in placed:
        deltas = placed[name]
        if isinstance(deltas, EncodedDeltas):
            found += sum(one.nbytes for one in deltas.encoded)
        elif isinstance(deltas, LowRankDeltas):
            found += sum(factor.nbytes for factor in deltas.read())
        else:
            found += deltas.values.nbytes
    return found


@pytest.mark.parametrize("storage", [s for s in STORAGES if not isinstance(s, Disk | Conveyed | Automatic)], ids=str)
@pytest.mark.parametrize("adapters", [False, True], ids=["dense", "lora"])
def test_what_is_held_is_what_was_predicted(tmp_path, storage, adapters):
    vectors = lora_files(tmp_path, 3, 32) if adapters else files(tmp_path, 3, 32)
    predicted = storage.footprint(Sizes.of(vectors), CPU)
    assert predicted == Memory(host=live(storage.place(vectors, CPU)))
    if not adapters:
        bits = {"float32": 32, "bfloat16": 16, "float16": 16}.get(getattr(storage, "dtype", ""), 0)
        bits = bits or storage.bits + 0.5
        size = 3 * sum(vectors.shape(name).numel() for name in vectors)
        assert predicted.host == pytest.approx(size * bits / 8, rel=0.05)


def test_predictions_for_a_device_by_hand(tmp_path):
    """Three experts of P elements; the base goes to the device, or to pinned memory, as it is stored."""
    vectors = files(tmp_path, 3, 32)
    sizes = Sizes.of(vectors)
    size, largest = sizes.merged, 4 * 64 * 32
    assert Resident().footprint(sizes, CUDA) == Memory(device=3 * 4 * size + 4 * size)
    assert Resident("bfloat16").footprint(sizes, CUDA) == Memory(device=3 * 2 * size + 4 * size)
    pinned = Pinned().footprint(sizes, CUDA)
    assert pinned == Memory(host=4 * 4 * size + 4 * size, device=2 * largest)
    assert Disk().footprint(sizes, CUDA) == Memory() and Disk().transient(sizes, CUDA) == Memory(device=3 * largest)
    assert Disk().transient(sizes, CPU) == Memory(host=3 * largest)  # as many as are added at once, at most
    assert (
        Resident().transient(sizes, CPU) == Memory() and Resident("float16").transient(sizes, CPU).host == 3 * largest
    )


def test_a_transform_needs_room_when_deltas_are_read(tmp_path):
    """Three copies of every expert's largest tensor, in the place of a gradient that is not there by then."""
    sizes = Sizes.of(TaskVectors(**models(8), transforms=[Ties(keep=0.5)]))
    largest, merged = 72, 2 * 72 + 12 + 6 + 1
    assert (sizes.largest, sizes.merged) == (largest, merged)
    for storage in (Resident(), Resident("bfloat16"), LowBit(8)):
        assert storage.transient(sizes, CPU).host == 4 * (3 * 8 * largest - merged)
    assert Disk().transient(sizes, CPU).host == 4 * 3 * 8 * largest


def test_what_is_read_in_pieces_needs_room_for_a_piece(tmp_path, monkeypatch):
    """A threshold for a whole matrix looks at the whole; signs are elected element by element."""
    monkeypatch.setattr("adamerge.task_vectors.memory.PIECE", 10)
    for transform, read in ((Ties(keep=0.5), 10), (Magnitude(), 72)):
        sizes = Sizes.of(TaskVectors(**models(8), transforms=[transform]))
        assert (sizes.largest, sizes.read(CPU), sizes.read(CUDA)) == (72, read, 72)
        assert Disk().transient(sizes, CPU).host == 4 * 3 * 8 * read
        assert Resident().transient(sizes, CPU).host == max(0, 4 * (3 * 8 * read - sizes.merged))
        assert Resident("bfloat16").transient(sizes, CPU).host == 4 * (3 * 8 * 72 - sizes.merged)
    plain = Sizes.of(TaskVectors(**models(8)))
    assert Disk().transient(plain, CPU).host == Resident("float16").transient(plain, CPU).host == FEW * 4 * 10


# refusals and names --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Resident("int8"), "no dtype 'int8'"),
        (lambda: Pinned("float64"), "no dtype 'float64'"),
        (lambda: LowBit(5), "8 or 4, got 5"),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_a_delta_that_float16_cannot_hold_is_refused_when_it_is_read():
    base = {"w": torch.zeros(3)}
    vectors = TaskVectors(base, {"one": {"w": torch.tensor([0.0, 1e5, 0.0])}})
    with pytest.raises(ConfigError, match="too large for float16"):
        Resident("float16").place(vectors, CPU)


def test_a_storage_says_what_it_is():
    assert str(Resident("bfloat16")) == "Resident(bfloat16)" and str(LowBit(4)) == "LowBit(4)"
    assert str(Disk()) == "Disk()"


def test_the_recipe_does_not_know_the_storage(tmp_path):
    from adamerge.artifacts.coefficients import Coefficients, save_coefficients

    written = []
    for storage in (Resident("bfloat16"), LowBit(4), Disk()):
        vectors = files(tmp_path, 2, 16)
        merged = MergedModel(Mlp(Net(16)), vectors, LayerWise(vectors), storage)
        merged.merge()
        path = tmp_path / f"{storage}.safetensors"
        found = Coefficients(merged.task_vectors.to("cpu"), merged.parametrization, dtype=merged.dtype)
        save_coefficients(found, path)
        written.append(path.read_bytes())
        exact = found.task_vectors["blocks.0.weight"].dense()
        assert torch.equal(exact, files(tmp_path, 2, 16)["blocks.0.weight"].dense())
    assert written[0] == written[1] == written[2]
