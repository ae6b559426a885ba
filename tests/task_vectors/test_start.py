"""A start: one more vector with coefficient 1, in every storage, copy and file, whatever the coefficients are."""

from __future__ import annotations

import shutil

import pytest
import torch
from rounding import gamma
from safetensors.torch import save_file
from starts import save_start
from torch import nn

from adamerge.artifacts.coefficients import Coefficients, load_coefficients, save_coefficients
from adamerge.artifacts.export import merged_tensors
from adamerge.artifacts.lora_export import export_adapter
from adamerge.errors import CheckpointError, CoefficientsError, ExportError
from adamerge.merging.copies import Place
from adamerge.merging.merged_tensor import merged_tensor, updates
from adamerge.merging.pullback import MergeGradients
from adamerge.parametrizations import Concrete, ElementWise, LayerWise, RowColumnWise
from adamerge.task_vectors.memory import Sizes
from adamerge.task_vectors.storage import Disk, LowBit, Pinned, Resident
from adamerge.task_vectors.task_vectors import TaskVectors
from adamerge.transforms import RootSumSquare, Ties

SHAPES = {"a.weight": (24, 40), "a.bias": (40,), "b.weight": (8, 3, 2), "scale": ()}
CPU = torch.device("cpu")


def numbers(seed: int, size: float = 1.0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: size * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """Base, two experts and a start that lacks one tensor."""
    root = tmp_path_factory.mktemp("start")
    base = numbers(0)
    save_file(base, root / "base.safetensors")
    for seed, task in enumerate(("one", "two"), 1):
        moved = numbers(seed, 0.1)
        save_file({name: base[name] + moved[name] for name in base}, root / f"{task}.safetensors")
    deltas = {name: value for name, value in numbers(7, 0.1).items() if name != "a.bias"}
    start = save_start(root / "task_vectors" / "merged.safetensors", deltas, root / "base.safetensors")
    experts = {task: root / f"{task}.safetensors" for task in ("one", "two")}
    return {"base": root / "base.safetensors", "experts": experts, "start": start}, base, deltas


def filled(parametrization, value):
    parametrization.load_values({group: torch.full_like(own, value) for group, own in parametrization.values().items()})
    return parametrization


def whole(parametrization, vectors, name, **cut):
    pieces = updates(parametrization, name, vectors[name], start=vectors.start_deltas(name), **cut)
    return torch.cat([update for _, update in pieces])


STORAGES = [Resident(), Disk(), Resident("bfloat16"), LowBit(8), Pinned()]


@pytest.mark.parametrize("kind", [LayerWise, RowColumnWise, ElementWise])
@pytest.mark.parametrize("storage", STORAGES, ids=str)
def test_coefficients_of_zero_give_the_start_bit_for_bit(given, kind, storage):
    arguments, base, deltas = given
    vectors = storage.place(TaskVectors(**arguments), CPU)
    parametrization = filled(kind(vectors, init=0.3), 0.0)
    for name in vectors:
        start = torch.zeros(SHAPES[name]) if name not in deltas else deltas[name]
        if name in deltas and storage.rounding != "none":  # what the storage keeps of it
            start = vectors.start_deltas(name).dense()[0]
            assert (start - deltas[name]).abs().max() <= deltas[name].abs().max() / 127
        for cut in ({}, {"size": 7}):
            found = merged_tensor(base[name].view(-1), whole(parametrization, vectors, name, **cut), torch.float32)
            assert torch.equal(found, merged_tensor(base[name], start, torch.float32).view(-1))


@pytest.mark.parametrize("transforms", [(), (Ties(0.5),), (RootSumSquare(),)], ids=["none", "ties", "one"])
def test_it_is_added_after_the_sum_and_no_transform_sees_it(given, transforms):
    arguments, _, deltas = given
    vectors = TaskVectors(**arguments, transforms=transforms)
    plain = TaskVectors(arguments["base"], arguments["experts"], transforms)
    assert vectors.experts == plain.experts and vectors.states == plain.states
    parametrization = filled(LayerWise(vectors), 0.7)
    for name in vectors:
        own = torch.cat([update for _, update in updates(parametrization, name, plain[name])])
        start = deltas.get(name, torch.zeros(SHAPES[name])).reshape(-1)
        assert torch.equal(whole(parametrization, vectors, name), own + start)
        part = slice(own.numel() // 3, own.numel() - own.numel() // 4)
        assert torch.equal(whole(parametrization, vectors, name, part=part), (own + start)[part])


def test_a_mask_is_not_of_the_start(given):
    arguments, _, deltas = given
    vectors = TaskVectors(**arguments)
    inner = filled(LayerWise(vectors), 0.5)
    masked = Concrete(vectors, lambda _: inner)
    with torch.no_grad():
        for name in deltas:
            wanted = masked(name, vectors[name]).reshape(-1) + deltas[name].reshape(-1)
            assert torch.equal(whole(masked, vectors, name), wanted)


def test_the_formula_in_float64(given):
    arguments, base, deltas = given
    vectors = TaskVectors(**arguments)
    parametrization = RowColumnWise(vectors)
    values = {group: torch.randn(own.shape) for group, own in parametrization.values().items()}
    parametrization.load_values(values)
    taus = [vectors.checkpoints[task]["a.weight"].double() - base["a.weight"].double() for task in vectors.experts]
    expected, size = base["a.weight"].double() + deltas["a.weight"].double(), torch.zeros(24, 40, dtype=torch.float64)
    for rows, columns, tau in zip(values["a.weight/rows"], values["a.weight/columns"], taus, strict=True):
        coefficient = rows.double().unsqueeze(1) + columns.double().unsqueeze(0)
        expected, size = expected + coefficient * tau, size + (coefficient * tau).abs()
    found = base["a.weight"] + whole(parametrization, vectors, "a.weight").view(24, 40)
    # the subtraction, r + c, products and sums of two, the start and the base
    bound = gamma(8) * (size + expected.abs() + base["a.weight"].abs() + deltas["a.weight"].abs() + 0.3)
    assert ((found.double() - expected).abs() <= bound).all()


def test_the_file_says_it_and_an_export_adds_it(given, tmp_path):
    arguments, _, _ = given
    vectors = TaskVectors(**arguments)
    parametrization = filled(LayerWise(vectors), 0.4)
    path = tmp_path / "coefficients.safetensors"
    save_coefficients(Coefficients(vectors, parametrization), path)
    loaded = load_coefficients(path)
    assert loaded.task_vectors.start.fingerprint == vectors.start.fingerprint
    for name, tensor in merged_tensors(loaded, torch.float32):
        update = whole(parametrization, vectors, name).view(tensor.shape)
        assert torch.equal(tensor, merged_tensor(vectors.base[name], update, torch.float32))
    save_coefficients(loaded, tmp_path / "again.safetensors")
    assert path.read_bytes() == (tmp_path / "again.safetensors").read_bytes()
    with pytest.raises(ExportError, match="begins from a start"):
        export_adapter(loaded, tmp_path / "adapter")


def test_a_start_that_changed_is_refused_and_one_that_moved_is_pointed_to(given, tmp_path):
    arguments, _, deltas = given
    start = tmp_path / "merged.safetensors"
    shutil.copy(arguments["start"], start)
    vectors = TaskVectors(arguments["base"], arguments["experts"], start=start)
    path = tmp_path / "coefficients.safetensors"
    save_coefficients(Coefficients(vectors, LayerWise(vectors)), path)
    moved = start.rename(tmp_path / "moved.safetensors")
    with pytest.raises(CheckpointError, match="no such file"):
        load_coefficients(path)
    assert load_coefficients(path, start=moved).task_vectors.start.sources == (moved,)
    save_start(start, {name: 2 * value for name, value in deltas.items()}, arguments["base"])
    with pytest.raises(CoefficientsError, match="the start at .* is not the model"):
        load_coefficients(path)
    plain = TaskVectors(arguments["base"], arguments["experts"])
    save_coefficients(Coefficients(plain, LayerWise(plain)), path)
    with pytest.raises(CoefficientsError, match="has no start"):
        load_coefficients(path, start=moved)


def test_a_run_that_moved_finds_the_start_inside_it(given, tmp_path):
    arguments, _, _ = given
    run = tmp_path / "run"
    start = run / "1_solve" / "task_vectors" / "merged.safetensors"
    start.parent.mkdir(parents=True)
    shutil.copy(arguments["start"], start)
    (run / "stages.json").write_text("{}")
    (run / "2_learn").mkdir()
    vectors = TaskVectors(arguments["base"], arguments["experts"], start=start)
    save_coefficients(Coefficients(vectors, LayerWise(vectors)), run / "2_learn" / "coefficients.safetensors")
    other = run.rename(tmp_path / "elsewhere")
    shutil.copy(other / "2_learn" / "coefficients.safetensors", other)  # as the last stage's is
    for folder in (other / "2_learn", other):
        loaded = load_coefficients(folder / "coefficients.safetensors")
        assert loaded.task_vectors.start.sources == (other / "1_solve" / "task_vectors" / "merged.safetensors",)


def test_what_is_no_start_is_refused(given, tmp_path):
    arguments, _, _ = given
    models = arguments["base"], arguments["experts"]
    with pytest.raises(CheckpointError, match="holds no task vectors"):
        TaskVectors(*models, start=arguments["experts"]["one"])
    foreign = save_start(tmp_path / "foreign.safetensors", {"other": torch.zeros(3)}, arguments["base"])
    with pytest.raises(CheckpointError, match="start: .* lacks: 'other'"):
        TaskVectors(*models, start=foreign)
    shaped = save_start(tmp_path / "shaped.safetensors", {"a.bias": torch.zeros(3)}, arguments["base"])
    with pytest.raises(CheckpointError, match="another shape"):
        TaskVectors(*models, start=shaped)
    with pytest.raises(CheckpointError, match="changes 1 tensors that are not merged"):
        TaskVectors(*models, start=arguments["start"], exclude=["scale"])
    broken = save_start(tmp_path / "broken.safetensors", {"scale": torch.tensor(torch.nan)}, arguments["base"])
    with pytest.raises(CheckpointError, match="NaN"):
        TaskVectors(*models, start=broken).check()


def test_one_that_an_earlier_stage_has_yet_to_write_is_counted(given):
    arguments, _, deltas = given
    unwritten = TaskVectors(arguments["base"], arguments["experts"], start="{task_vectors}")
    assert unwritten.start is None
    plain = Sizes.of(TaskVectors(arguments["base"], arguments["experts"]))
    there, awaited = Sizes.of(TaskVectors(**arguments)), Sizes.of(unwritten)
    more = 4 * sum(value.numel() for value in deltas.values())
    for sizes, own in ((there, more), (awaited, more + 4 * 40)):
        for storage in (Resident(), Pinned()):
            assert storage.footprint(sizes, CPU).host == storage.footprint(plain, CPU).host + own
        assert Disk().transient(sizes, CPU).host > Disk().transient(plain, CPU).host


def test_gradients_do_not_depend_on_it(given):
    """The start is a constant: what comes back is ``sum_e G[e] tau_k[e]``, as without it."""
    arguments, _, _ = given
    found = []
    for start in (None, arguments["start"]):
        vectors = TaskVectors(arguments["base"], arguments["experts"], start=start)
        parametrization = LayerWise(vectors)
        slope = torch.linspace(-1, 1, 24 * 40)
        gradients = MergeGradients(list(parametrization.parameters()))
        whole(parametrization, vectors, "a.weight", gradients=gradients)
        place = nn.Parameter(torch.zeros(24, 40))
        place.grad = slope.view(24, 40)
        found.append(gradients.gradients({"a.weight": Place(place)})[0])
    assert torch.equal(*found) and found[0].any()


def test_a_start_may_come_to_be_tensor_by_tensor():
    """As a solver writes it: what reads a delta is asked for at every merge, and other task vectors keep their own start."""
    base, experts = {"a": torch.ones(2, 3), "b": torch.ones(4)}, {"one": {"a": torch.zeros(2, 3), "b": torch.zeros(4)}}
    plain, written = TaskVectors(base, experts), {}
    growing = plain.begun(lambda name: (lambda: written[name]) if name in written else None).to("cpu")
    assert growing.start_deltas("a") is None and not growing.starts("a")
    written["a"] = torch.full((2, 3), 0.5)
    assert torch.equal(growing.start_deltas("a").dense()[0], written["a"]) and growing.starts("a")
    assert growing.start_deltas("b") is None and plain.start_deltas("a") is None
