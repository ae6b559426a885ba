"""Units of a network: from names and from the network itself the same, but for ties and what is in no module list."""

from __future__ import annotations

import pytest
import torch
from pico import pico_pool
from safetensors.torch import save_file
from torch import nn
from toys import Tied

from adamerge.merging.footprint import Unit, units_by_name, units_of
from adamerge.task_vectors.task_vectors import TaskVectors


def ordered(units):
    return sorted(units, key=repr)


def test_names_tell_blocks_modules_and_numbers_apart(tmp_path):
    base = {
        "embed.weight": torch.zeros(5, 3),
        "layers.0.fc.weight": torch.zeros(2, 3),
        "layers.0.experts.7.weight": torch.zeros(4),
        "layers.1.fc.weight": torch.zeros(2, 3),
        "norm.weight": torch.zeros(3),
        "norm.bias": torch.zeros(3),
        "steps": torch.tensor(3),
    }
    save_file(base, tmp_path / "base.safetensors")
    expert = {name: value + 1 for name, value in base.items()}
    vectors = TaskVectors(tmp_path / "base.safetensors", {"one": expert}, exclude=["norm.bias"])
    assert ordered(units_by_name(vectors, torch.bfloat16)) == ordered([
        Unit(2 * 15, 15, 15),
        Unit(2 * 10, 10, 10, block=True),
        Unit(2 * 6, 6, 6, block=True),
        Unit(2 * 6, 6, 3),
        Unit(8, 0, 0, shared=True),
    ])  # fmt: skip


def test_the_network_tells_what_is_shared():
    network = Tied()
    network.layers[1][0].bias = network.layers[0][0].bias
    network.norm = nn.BatchNorm1d(2)
    tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    merged = {name for name, tensor in tensors.items() if isinstance(tensor, nn.Parameter) and name != "norm.bias"}
    assert ordered(units_of(network, tensors, merged)) == ordered([
        Unit(4 * 8, 8, 8, shared=True),  # the tie
        Unit(4 * 2, 2, 2, shared=True),  # between blocks
        Unit(4 * 2, 2, 2, shared=True),  # beside modules
        *(Unit(4 * 2, 2, 0, shared=True) for _ in range(2)),  # running statistics
        Unit(8, 0, 0, shared=True),
        *(Unit(4 * 10, 10, 10, block=True) for _ in range(2)),
        Unit(4 * 4, 4, 2),
    ])  # fmt: skip


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
def test_headers_and_network_agree(kind, tmp_path):
    pool = pico_pool(kind, tmp_path)
    vectors, backbone = TaskVectors(pool["base"], pool["experts"]), pool["backbone"]()
    found = ordered(units_of(backbone.network, backbone.tensors(), vectors))
    assert found == ordered(units_by_name(vectors, torch.float32)) and len([u for u in found if u.block]) == 2


def test_a_tie_is_told_by_the_network_alone(tmp_path):
    pool = pico_pool("qwen2_tied", tmp_path)
    vectors, backbone = TaskVectors(pool["base"], pool["experts"]), pool["backbone"]()
    assert not any(unit.shared for unit in units_by_name(vectors, torch.float32))
    (tied,) = [unit for unit in units_of(backbone.network, backbone.tensors(), vectors) if unit.shared]
    assert tied == Unit(4 * 64 * 16, 64 * 16, 64 * 16, shared=True)
