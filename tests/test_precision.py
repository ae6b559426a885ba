"""Precision: fp32 products whatever is set for the network, which holds again afterwards."""

import pytest
import torch
from merging.test_merged_model import Mlp, lora_files, models

from adamerge.merging.merged_model import MergedModel
from adamerge.parametrizations import LayerWise
from adamerge.precision import exact
from adamerge.task_vectors.storage import Disk, LowBit, Resident
from adamerge.task_vectors.task_vectors import TaskVectors
from adamerge.transforms import Combine, Dare, Magnitude, Scale, Ties

CPU = torch.device("cpu")


@pytest.fixture(params=["highest", "high", "medium"])
def precision(request):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield request.param
    torch.set_float32_matmul_precision(before)


def test_products_are_in_fp32_inside_and_as_chosen_afterwards(precision):
    torch.manual_seed(0)
    one, other = torch.randn(64, 512), torch.randn(512, 64)
    wanted = (one.double() @ other.double()).float()
    with torch.autocast("cpu", torch.bfloat16):
        with exact(CPU):
            found = one @ other
        assert (one @ other).dtype == torch.bfloat16
    assert (found - wanted).abs().max() <= 1e-4 * wanted.abs().max()
    assert torch.get_float32_matmul_precision() == precision
    with pytest.raises(ZeroDivisionError), exact(CPU):
        assert torch.get_float32_matmul_precision() == "highest"
        1 / 0  # noqa: B018
    assert torch.get_float32_matmul_precision() == precision


def test_what_was_chosen_for_one_library_holds_again():
    library = torch.backends.mkldnn.matmul
    library.fp32_precision = "bf16"
    try:
        with exact(CPU):
            assert library.fp32_precision == "ieee"
        assert library.fp32_precision == "bf16" and torch.backends.cuda.matmul.fp32_precision in {"none", "ieee"}
    finally:
        torch.set_float32_matmul_precision("highest")


def step_of(make, storage):
    """Merged tensors, and the coefficients' gradients for some gradient of them: the network itself may round."""
    merged, generator = make(storage), torch.Generator().manual_seed(3)
    merged.merge()
    tensors = merged.backbone.tensors()
    values = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    for name in merged.task_vectors:
        tensors[name].grad = torch.randn(tensors[name].shape, generator=generator)
    merged.pull_back(torch.zeros(())).backward()
    return values, [parameter.grad for parameter in merged.trained()]


def dense(transforms):
    def make(storage):
        vectors = TaskVectors(**models(3), transforms=transforms)
        return MergedModel(Mlp(), vectors, LayerWise(vectors, init=0.7), storage)

    return make


@pytest.mark.parametrize("storage", [Resident(), Disk(), LowBit(8)], ids=str)
@pytest.mark.parametrize(
    "transforms",
    [
        [],
        [Scale({"task1": -0.7})],
        [Combine({"both": {"task0": 0.3, "task2": 0.9}})],
        [Ties(keep=0.5)],
        [Magnitude()],
        [Dare(0.5)],
    ],
    ids=["none", "scale", "combine", "ties", "magnitude", "dare"],
)
def test_nothing_is_rounded_when_a_step_runs_under_autocast(storage, transforms, precision):
    """Also when deltas are placed, which the first merge of a fit does."""
    with torch.autocast("cpu", torch.bfloat16):
        found, gradients = step_of(dense(transforms), storage)
    torch.set_float32_matmul_precision("highest")
    wanted, others = step_of(dense(transforms), storage)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert all(torch.equal(one, other) for one, other in zip(gradients, others, strict=True))


@pytest.mark.parametrize("transforms", [[], [Ties(keep=0.5)], [Scale({"task1": -0.7})]], ids=["none", "ties", "scale"])
def test_factors_are_multiplied_in_fp32(tmp_path, transforms, precision):
    vectors = lora_files(tmp_path, 3, 64)
    coefficients = torch.rand(3, 1, generator=torch.Generator().manual_seed(1))
    from adamerge.deltas.groups import Whole

    def sums():
        vectors_ = TaskVectors(vectors.base, vectors.checkpoints, transforms=transforms)
        placed = Resident().place(vectors_, CPU)
        return {name: placed[name].combine(coefficients, Whole()) for name in placed}

    with torch.autocast("cpu", torch.bfloat16):
        found = sums()
        dense = {name: vectors.checkpoints["task0"][name] for name in vectors}
    torch.set_float32_matmul_precision("highest")
    assert all(torch.equal(own, found[name]) for name, own in sums().items())
    assert all(torch.equal(own, vectors.checkpoints["task0"][name]) for name, own in dense.items())
