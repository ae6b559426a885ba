"""Factors: a product by hand, nothing at rank 0, read only when asked."""

import pytest
import torch

from adamerge.checkpoints.lora_factors import Factors, matrix_shape, no_change


def factors(left, right, scale=1.0):
    return Factors(left.shape[1], scale, lambda: left, lambda: right)


def test_the_product_by_hand():
    found = factors(torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0, -1.0, 0.5]]), 0.5)
    assert found.dense().tolist() == [[1.5, -0.5, 0.25], [3.0, -1.0, 0.5]]
    assert found.dense(torch.float64).dtype == torch.float64


@pytest.mark.parametrize(
    ("shape", "rows", "columns"),
    [((), 1, 1), ((5,), 1, 5), ((4, 3), 4, 3), ((4, 3, 2, 2), 4, 12), ((0, 3), 0, 3), ((3, 0), 3, 0)],
)
def test_a_tensor_as_a_matrix(shape, rows, columns):
    assert matrix_shape(torch.Size(shape)) == (rows, columns)
    none = no_change(torch.Size(shape))
    assert none.rank == 0 and none.dense().shape == (rows, columns) and not none.dense().any()


def test_equality_is_that_of_scale_and_both_factors():
    left, right = torch.randn(3, 2), torch.randn(2, 4)
    one = factors(left, right)
    assert one.equals(factors(left.clone(), right.clone()))
    assert not one.equals(factors(left, right, 2.0)) and not one.equals(factors(left[:, :1], right[:1]))
    assert not one.equals(factors(left + 1, right)) and not one.equals(factors(left, right + 1))


def test_nothing_is_read_before_it_is_used():
    def fail():
        raise AssertionError("read too early")

    assert Factors(3, 0.5, fail, fail).rank == 3
