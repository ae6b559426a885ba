"""A tensor as bytes: its values in order, little-endian, whatever its dtype and strides."""

import pytest
import torch

from adamerge.io.tensor_bytes import byte_chunks, tensor_bytes


def test_bytes_by_hand():
    assert tensor_bytes(torch.tensor([1, -1], dtype=torch.int16)).tobytes() == b"\x01\x00\xff\xff"
    assert tensor_bytes(torch.tensor(1.0)).tobytes() == b"\x00\x00\x80\x3f"
    assert tensor_bytes(torch.tensor([1.0], dtype=torch.bfloat16)).tobytes() == b"\x80\x3f"


def test_values_are_in_the_order_of_the_shape_and_not_of_the_memory():
    values = torch.arange(6, dtype=torch.uint8).view(2, 3)
    assert tensor_bytes(values.t()).tobytes() == bytes([0, 3, 1, 4, 2, 5])
    assert tensor_bytes(values[:, 1:]).tobytes() == bytes([1, 2, 4, 5])


def test_a_parameter_and_an_empty_tensor_have_bytes_too():
    assert tensor_bytes(torch.nn.Parameter(torch.ones(1))).tobytes() == b"\x00\x00\x80\x3f"
    assert tensor_bytes(torch.empty(0, 3)).tobytes() == b""


@pytest.mark.parametrize("size", [1, 5, 24, 100])
def test_chunks_are_the_bytes(size):
    values = torch.randn(6)
    chunks = list(byte_chunks(values, size))
    assert b"".join(chunks) == tensor_bytes(values).tobytes() and {len(chunk) for chunk in chunks[:-1]} <= {size}
