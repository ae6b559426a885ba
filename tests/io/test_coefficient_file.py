"""The coefficient file: its sections are told apart and checked, and its digest covers the mask."""

import json

import pytest
import safetensors.torch
import torch

from adamerge.artifacts.coefficients import Coefficients, load_coefficients, save_coefficients
from adamerge.errors import CoefficientsError
from adamerge.io.coefficient_file import METADATA_KEY, digest_of, read_coefficients
from adamerge.io.safetensors_file import TensorFile
from adamerge.parametrizations import Concrete, LayerWise
from adamerge.task_vectors.task_vectors import TaskVectors


@pytest.fixture
def saved(tmp_path):
    """A file with a mask."""
    for name, factor in (("base", 1.0), ("one", 2.0), ("two", 3.0)):
        safetensors.torch.save_file(
            {"a.w": factor * torch.ones(2, 3), "s": torch.tensor(factor)}, tmp_path / f"{name}.safetensors"
        )
    experts = {task: tmp_path / f"{task}.safetensors" for task in ("one", "two")}
    vectors = TaskVectors(tmp_path / "base.safetensors", experts)
    made = Concrete(vectors, LayerWise)
    made.load_masks({"a.w": torch.arange(6.0).view(2, 3) - 3, "s": torch.tensor(0.5)})
    save_coefficients(Coefficients(vectors, made), tmp_path / "c.safetensors")
    return tmp_path / "c.safetensors"


@pytest.fixture
def with_buffers(tmp_path):
    """A file with a buffer."""
    base = {"w": torch.ones(2), "mean": torch.zeros(3), "steps": torch.tensor(4)}
    for name in ("base", "one"):
        weights = {key: value + (name == "one") for key, value in base.items()}
        safetensors.torch.save_file(weights, tmp_path / f"{name}.safetensors")
    vectors = TaskVectors(tmp_path / "base.safetensors", {"one": tmp_path / "one.safetensors"}, exclude=["mean"])
    made = Coefficients(vectors, LayerWise(vectors), buffers={"mean": torch.tensor([1.0, 2, 3])})
    save_coefficients(made, tmp_path / "b.safetensors")
    return tmp_path / "b.safetensors"


def rewritten(saved, change, signed=True):
    """The file with other tensors."""
    file = TensorFile(saved)
    metadata = json.loads(file.metadata[METADATA_KEY])
    tensors = {name: file.read(name).clone() for name in file.tensors}
    change(tensors)
    if signed:
        metadata["digest"] = digest_of(metadata, {name: value.float() for name, value in tensors.items()})
    target = saved.with_name("changed-coefficients.safetensors")
    target.write_bytes(safetensors.torch.save(tensors, {METADATA_KEY: json.dumps(metadata)}))
    return target


def test_the_sections_come_by_name_and_shape(saved):
    metadata, sections = read_coefficients(saved)
    assert metadata["format"] == 2 and sections.keys() == {"w", "mask", "buffer"} and sections["buffer"] == {}
    assert sections["w"].keys() == sections["mask"].keys() == {"a.w", "s"}
    assert sections["mask"]["a.w"].tolist() == [[-3, -2, -1], [0, 1, 2]] and sections["mask"]["s"].shape == ()
    assert sections["w"]["s"].shape == (2, 1)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.update({"mask/a.w": t["mask/a.w"].half()}), "unexpected tensor 'mask/a.w'"),
        (lambda t: t.update({"other/a.w": torch.ones(1)}), "unexpected tensor 'other/a.w'"),
        (lambda t: t["mask/a.w"].fill_(float("nan")), "'mask/a.w' holds NaN"),
        (lambda t: t.update({"w/s": torch.ones(2)}), "unexpected tensor 'w/s'"),
        (lambda t: t.update({"buffer/mean": torch.ones(3).double()}), "unexpected tensor 'buffer/mean'"),
    ],
)
def test_what_is_no_section_is_refused(saved, change, says):
    with pytest.raises(CoefficientsError, match=says):
        read_coefficients(rewritten(saved, change))


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.pop("mask/s"),
        lambda t: t.update({"mask/a.w": torch.zeros(3, 2)}),
        lambda t: t.update({"mask/more": torch.zeros(3)}),
        lambda t: [t.pop("mask/s"), t.pop("mask/a.w")],
    ],
)
def test_a_mask_of_other_tensors_or_shapes_is_refused(saved, change):
    with pytest.raises(CoefficientsError, match="does not fit the values"):
        load_coefficients(rewritten(saved, change))


def test_buffers_come_back(with_buffers):
    _, sections = read_coefficients(with_buffers)
    assert sections["buffer"].keys() == {"mean"} and sections["w"].keys() == {"w"}
    assert load_coefficients(with_buffers).buffers["mean"].tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.update({"buffer/mean": torch.ones(2)}), r"buffer 'mean' is \(2,\), in the base \(3,\)"),
        (lambda t: t.update({"buffer/w": torch.ones(2)}), "buffer 'w' is no"),
        (lambda t: t.update({"buffer/steps": torch.ones(())}), "buffer 'steps' is no"),
        (lambda t: t.update({"buffer/other": torch.ones(3)}), "buffer 'other' is no"),
    ],
    ids=["shape", "merged", "counter", "unknown"],
)
def test_a_buffer_that_the_base_has_no_place_for_is_refused(with_buffers, change, says):
    with pytest.raises(CoefficientsError, match=f"does not fit the values: {says}"):
        load_coefficients(rewritten(with_buffers, change))


def test_the_digest_covers_the_mask(saved):
    with pytest.raises(CoefficientsError, match="digest"):
        read_coefficients(rewritten(saved, lambda t: t["mask/a.w"].add_(1e-6), signed=False))


def test_a_run_that_has_not_ended_says_how_to_go_on(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(CoefficientsError, match="has not ended") as caught:
        read_coefficients(tmp_path)
    assert f"--resume {tmp_path}" in caught.value.todo
