"""A file of components: it takes the place of the experts' weights, in every storage, and only with the models it is of."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from component_files import save_components, with_components
from rounding import UNIT
from safetensors.torch import load_file, save_file
from starts import save_start

from adamerge.artifacts.coefficients import Coefficients, load_coefficients, save_coefficients
from adamerge.artifacts.export import merged_tensors
from adamerge.deltas.groups import Whole
from adamerge.deltas.low_rank import LowRankDeltas
from adamerge.errors import CheckpointError, CoefficientsError
from adamerge.io.safetensors_file import TensorFile
from adamerge.parametrizations import ComponentWise, LayerWise
from adamerge.task_vectors.memory import Sizes
from adamerge.task_vectors.storage import Disk, LowBit, Pinned, Resident
from adamerge.task_vectors.task_vectors import TaskVectors

SHAPES = {"a.weight": (24, 40), "a.bias": (40,), "b.weight": (8, 3, 2), "scale": ()}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    generator = torch.Generator().manual_seed(0)
    base = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    save_file(base, root / "base.safetensors")
    for task in ("one", "two"):
        moved = {name: own + 0.1 * torch.randn(own.shape, generator=generator) for name, own in base.items()}
        save_file(moved, root / f"{task}.safetensors")
    experts = {task: str(root / f"{task}.safetensors") for task in ("one", "two")}
    return {"base": str(root / "base.safetensors"), "experts": experts}


@pytest.fixture(scope="module")
def file(models, tmp_path_factory):
    return save_components(tmp_path_factory.mktemp("file") / "components.safetensors", TaskVectors(**models))


def changed(path, target, tensors=lambda own: own, **metadata):
    """The file with other tensors and metadata."""
    own = json.loads(TensorFile(path).metadata["adamerge"]) | metadata
    save_file(tensors(load_file(path)), target, {"adamerge": json.dumps(own)})
    return target


def test_experts_keep_their_names_and_models(models, file):
    vectors = TaskVectors(**models, components=file)
    assert vectors.experts == ("one", "two") == tuple(vectors.checkpoints) and list(vectors) == sorted(SHAPES)
    assert isinstance(vectors["a.weight"], LowRankDeltas) and vectors.terms("a.weight") == 24
    assert vectors.terms("a.bias") is None and TaskVectors(**models).terms("a.weight") is None
    vectors.check()
    assert vectors.fingerprints()["the components"] == vectors.components.fingerprint
    assert vectors.files == {"components": vectors.components}


@pytest.mark.parametrize("storage", [Resident(), Disk(), Resident("bfloat16"), LowBit(8), LowBit(4), Pinned()], ids=str)
def test_factors_are_exact_in_every_storage(models, file, storage):
    vectors = TaskVectors(**models, components=file)
    placed = storage.place(vectors, CPU)
    for name in ("a.weight", "b.weight"):
        coefficients = torch.randn(2, 1)
        assert torch.equal(placed[name].summed(coefficients, Whole()), vectors[name].summed(coefficients, Whole()))
    sizes = Sizes.of(vectors)
    assert sizes.factors == 2 * (24 * (24 + 40) + 6 * (8 + 6)) and sizes.factored == 2 * 24 * (24 + 40)
    assert sizes.dense == {"a.weight": 0, "b.weight": 0, "a.bias": 80, "scale": 2}
    assert storage.needs(sizes, CPU).host >= 4 * sizes.factored, "factors are counted"


def test_a_narrower_include_takes_its_part(models, file):
    vectors = TaskVectors(**models, components=file, exclude=["b.*", "scale"])
    assert list(vectors) == ["a.bias", "a.weight"]


def test_what_it_lacks_is_told(models, tmp_path):
    part = TaskVectors(**models, exclude=["b.*"])
    path = save_components(tmp_path / "c.safetensors", part)
    with pytest.raises(CheckpointError, match="lacks 1 tensors that are merged: 'b.weight'"):
        TaskVectors(**models, components=path)


def test_other_experts_are_refused(models, file):
    one = {"one": models["experts"]["one"]}
    with pytest.raises(CheckpointError, match="holds components of other experts"):
        TaskVectors(models["base"], one, components=file)


def test_another_model_of_an_experts_name_is_found_when_weights_are_read(models, file, tmp_path):
    moved = {name: value + 1 for name, value in load_file(models["experts"]["two"]).items()}
    save_file(moved, tmp_path / "two.safetensors")
    vectors = TaskVectors(models["base"], models["experts"] | {"two": tmp_path / "two.safetensors"}, components=file)
    with pytest.raises(CheckpointError, match="was made of another model than expert 'two'"):
        vectors.check()


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (
            lambda own: own | {"one/factors/other": torch.zeros(3, 1)},
            "'one/factors/other', which is of no expert and tensor",
        ),
        (
            lambda own: own | {"else/delta/scale": torch.zeros(())},
            "'else/delta/scale', which is of no expert and tensor",
        ),
        (lambda own: own | {"one/factors/a.weight": torch.zeros(63, 2)}, "'one/factors/a.weight' has another shape"),
        (lambda own: own | {"one/factors/a.weight": torch.zeros(64)}, "'one/factors/a.weight' has another shape"),
        (lambda own: own | {"one/delta/a.bias": torch.zeros(3)}, "'one/delta/a.bias' has another shape"),
    ],
)
def test_what_is_not_the_bases_is_refused(tensors, words, models, file, tmp_path):
    path = changed(file, tmp_path / "c.safetensors", tensors)
    with pytest.raises(CheckpointError, match=f"components: .*{words}"):
        TaskVectors(**models, components=path)


def test_one_merged_vector_is_no_file_of_components(models, tmp_path):
    path = save_start(tmp_path / "m.safetensors", {"scale": torch.zeros(())}, models["base"])
    with pytest.raises(CheckpointError, match="holds one task vector and no components"):
        TaskVectors(**models, components=path)
    with pytest.raises(CheckpointError, match="holds no task vectors"):
        TaskVectors(**models, components=models["base"])


def test_numbers_that_are_none(models, file, tmp_path):
    def broken(own):
        own["two/factors/a.weight"][0, 0] = torch.nan
        return own

    vectors = TaskVectors(**models, components=changed(file, tmp_path / "c.safetensors", broken))
    with pytest.raises(CheckpointError, match="NaN or Inf in 1 of"):
        vectors.check()


def test_an_expert_that_lacks_a_matrix_did_not_change_it(models, file, tmp_path):
    def without(own):
        return {key: value for key, value in own.items() if key != "one/factors/b.weight"}

    vectors = TaskVectors(**models, components=changed(file, tmp_path / "c.safetensors", without))
    assert not vectors["b.weight"].dense()[0].any() and vectors["b.weight"].dense()[1].any()
    assert vectors["b.weight"].terms(2) == [0, 6] and vectors.terms("b.weight") == 6


def test_coefficients_say_whose_components_they_are(models, file, tmp_path):
    components = shutil.copy(file, tmp_path / "components.safetensors")
    vectors = TaskVectors(**models, components=components)
    parametrization, path = ComponentWise(vectors, init=0.4), tmp_path / "coefficients.safetensors"
    save_coefficients(Coefficients(vectors, parametrization), path)
    loaded = load_coefficients(path)
    assert loaded.task_vectors.components.fingerprint == vectors.components.fingerprint
    save_coefficients(loaded, tmp_path / "again.safetensors")
    assert path.read_bytes() == (tmp_path / "again.safetensors").read_bytes()
    wanted = dict(merged_tensors(loaded, torch.float32))
    for name, value in wanted.items():
        sum_of = TaskVectors(**models)[name].dense().double().sum(dim=0)
        off = value.double() - vectors.base[name].double() - 0.4 * sum_of
        assert off.norm() <= 64 * UNIT * (sum_of.norm() + vectors.base[name].double().norm())
    moved = (tmp_path / "components.safetensors").rename(tmp_path / "moved.safetensors")
    with pytest.raises(CheckpointError, match="no such file"):
        load_coefficients(path)
    there = load_coefficients(path, components=moved)
    assert all(torch.equal(value, wanted[name]) for name, value in merged_tensors(there, torch.float32))
    other = changed(moved, tmp_path / "other.safetensors", lambda own: {key: 2 * value for key, value in own.items()})
    with pytest.raises(CoefficientsError, match="the components at .* is not the model"):
        load_coefficients(path, components=other)
    plain = TaskVectors(**models)
    save_coefficients(Coefficients(plain, LayerWise(plain)), path)
    with pytest.raises(CoefficientsError, match="has no components"):
        load_coefficients(path, components=moved)


def test_beside_a_start(models, file, tmp_path):
    deltas = {name: torch.full(shape, 0.25) for name, shape in SHAPES.items()}
    start = save_start(tmp_path / "start.safetensors", deltas, models["base"])
    vectors = TaskVectors(**models, start=start, components=file)
    assert list(vectors.files) == ["start", "components"]
    zero = ComponentWise(vectors, init=0.0)
    for name, value in merged_tensors(Coefficients(vectors, zero), torch.float32):
        assert torch.equal(value, vectors.base[name] + 0.25)


def test_it_is_written_for_whatever_vectors_there_are(models, tmp_path):
    again = with_components(tmp_path / "two.safetensors", TaskVectors(**models), 3)
    twice = with_components(tmp_path / "three.safetensors", again)
    assert twice.terms("a.weight") == 3, "components of components are no more"
