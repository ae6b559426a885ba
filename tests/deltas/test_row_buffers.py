"""Row buffers: memory that holds what was asked for, and is used again for the experts after the first few."""

import pytest
import torch

from adamerge.deltas.row_buffers import filled, made_at_once, room
from adamerge.deltas.tuning import FEW

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [[0], [3], [2, 5], [4, 0]])
def test_room_is_of_the_shape_and_the_dtype_and_can_be_written(shape, dtype):
    found = room(shape, dtype, CPU)
    assert found.shape == torch.Size(shape) and found.dtype == dtype and found.is_contiguous()
    assert torch.equal(found.fill_(2), torch.full(shape, 2, dtype=dtype))


@pytest.mark.parametrize(("experts", "sizes"), [(0, []), (2, [2]), (3, [3]), (7, [3, 3, 1])])
def test_each_expert_comes_once_in_order_in_the_same_few_rows(experts, sizes):
    rows, found, blocks = torch.zeros(3, 2), [], []
    for block in filled(range(experts), rows, lambda expert, row: row.fill_(expert)):
        assert block.data_ptr() == rows.data_ptr()
        blocks.append(len(block))
        found += block[:, 1].tolist()
    assert blocks == sizes and found == list(range(experts))


def test_a_few_are_made_at_once_and_on_a_device_one():
    assert [made_at_once(experts, CPU) for experts in (1, FEW, FEW + 3)] == [1, FEW, FEW]
    assert made_at_once(9, torch.device("cuda")) == 1
