"""One task vector of all experts: the root of the sum of squares, wherever a tensor is cut, of factors too."""

import pytest
import torch
from rounding import gamma

from adamerge.checkpoints.lora_factors import Factors
from adamerge.deltas.base import DenseDeltas
from adamerge.deltas.low_rank import LowRankDeltas
from adamerge.task_vectors.storage import Disk, Resident
from adamerge.task_vectors.task_vectors import TaskVectors
from adamerge.transforms import RootSumSquare, Scale

CPU = torch.device("cpu")


def test_three_experts_by_hand():
    deltas = DenseDeltas(torch.tensor([[2.0, 0.0, -1.0], [-3.0, 0.0, 0.0], [6.0, 0.0, 0.0]]))
    found = RootSumSquare().deltas("w", deltas, {}, ("a", "b", "c"))
    assert found.dense().tolist() == [[7.0, 0.0, 1.0]]


def test_it_has_a_name_and_others_work_on_it():
    base, experts = {"w": torch.zeros(2)}, {"a": {"w": torch.tensor([3.0, 1.0])}, "b": {"w": torch.tensor([4.0, 0.0])}}
    vectors = TaskVectors(base, experts, [RootSumSquare("all"), Scale({"all": 2.0})])
    assert vectors.experts == ("all",) and vectors["w"].dense().tolist() == [[10.0, 2.0]]


def test_an_element_has_the_same_bits_wherever_a_tensor_is_cut():
    values = torch.randn(5, 4099)
    deltas = RootSumSquare().deltas("w", DenseDeltas(values), {}, tuple("abcde"))
    whole = deltas.rows(torch.float32)
    exact = values.double().square().sum(dim=0).sqrt()
    assert ((whole[0].double() - exact).abs() <= gamma(8) * exact).all()
    for start, stop in ((0, 1), (1, 8), (3, 4099), (17, 2048)):
        assert torch.equal(deltas.rows(torch.float32, slice(start, stop)), whole[:, start:stop])


@pytest.mark.parametrize("storage", [Resident(), Disk()], ids=str)
def test_storage_keeps_it_once(storage):
    """As many numbers as the model has, not as many as the experts have."""
    base = {"w": torch.zeros(8, 8)}
    experts = {task: {"w": torch.randn(8, 8)} for task in "abcd"}
    placed = storage.place(TaskVectors(base, experts, [RootSumSquare()]), CPU)
    assert placed["w"].rows(torch.float32).shape == (1, 64)
    if isinstance(storage, Resident):
        assert placed["w"].values.numel() == 64


def test_factors_are_made_dense_one_tensor_at_a_time():
    left, right = torch.randn(2, 6, 3), torch.randn(2, 3, 5)
    experts = [Factors(3, 0.5, lambda k=k: left[k], lambda k=k: right[k]) for k in range(2)]
    deltas = RootSumSquare().deltas("w", LowRankDeltas.of(experts, torch.Size((6, 5)), CPU), {}, ("a", "b"))
    dense = 0.5 * left.double() @ right.double()
    wanted = dense.square().sum(dim=0).sqrt()
    assert deltas.elements(1) == (30, 0)
    assert (deltas.dense()[0].double() - wanted).abs().max() <= gamma(16) * (left.abs() @ right.abs()).max()
