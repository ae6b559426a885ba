"""Random partitions: the same ids on every machine, even, a tensor's own, and no generator."""

import hashlib

import pytest
import torch

from adamerge.errors import ConfigError
from adamerge.parametrizations import RandomPartition
from adamerge.parametrizations.constraints import Sigmoid
from adamerge.parametrizations.partition import partition_ids
from adamerge.task_vectors.task_vectors import TaskVectors

SHAPES = {"matrix": (64, 40), "twin": (64, 40), "vector": (97,), "scalar": (), "kernel": (8, 4, 3, 3), "empty": (0, 3)}


@pytest.fixture(scope="module")
def vectors():
    torch.manual_seed(0)
    base = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    return TaskVectors(base, {task: {n: v + torch.randn(v.shape) for n, v in base.items()} for task in ("one", "two")})


def by_hand(seed: int, name: str, index: int, parts: int) -> int:
    """splitmix64's output number ``index`` from a start that seed and name give, scaled to ``parts``."""
    z = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "little")
    z = (z + (index + 1) * 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return ((z ^ (z >> 31)) >> 32) * parts >> 32


@pytest.mark.parametrize("parts", [1, 2, 255, 256, 257, 1200, 40_000])
def test_ids_are_the_hash_in_plain_integers(parts):
    found = partition_ids(3, "a.weight", 50, parts)
    assert found.tolist() == [by_hand(3, "a.weight", index, parts) for index in range(50)]
    size = 1 if parts <= 256 else 2 if parts <= 2**15 else 4
    assert found.element_size() == size


def test_ids_beyond_the_first_million_are_of_the_same_sequence():
    found = partition_ids(0, "a", (1 << 20) + 5, 7)
    assert found[-5:].tolist() == [by_hand(0, "a", (1 << 20) + i, 7) for i in range(5)]


def test_the_known_sequence_of_splitmix64():
    """The generator's published first outputs for start 1234567, here through its last two steps."""
    z, outputs = 1234567, []
    for index in range(3):
        y = (z + (index + 1) * 0x9E3779B97F4A7C15) % 2**64
        y = (y ^ (y >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        y = (y ^ (y >> 27)) * 0x94D049BB133111EB % 2**64
        outputs.append(y ^ (y >> 31))
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@pytest.mark.parametrize("parts", [2, 5, 300])
def test_parts_are_even_and_independent_of_place(parts):
    numel = 300_000
    ids = partition_ids(0, "w", numel, parts).long()
    counts = torch.bincount(ids, minlength=parts).double()
    expected = numel / parts
    assert float(((counts - expected) ** 2 / expected).sum()) < parts + 5 * (2 * parts) ** 0.5 + 5  # chi squared
    neighbours = (ids[1:] == ids[:-1]).double().mean()
    assert abs(float(neighbours) - 1 / parts) < 5 * (1 / parts / numel) ** 0.5


def test_tensors_and_seeds_have_partitions_of_their_own():
    plain = partition_ids(0, "matrix", 2560, 5)
    assert torch.equal(plain, partition_ids(0, "matrix", 2560, 5))
    for other in (partition_ids(0, "twin", 2560, 5), partition_ids(1, "matrix", 2560, 5)):
        assert abs(float((plain == other).double().mean()) - 0.2) < 0.05


def test_the_global_generator_is_neither_used_nor_moved(vectors):
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    one = RandomPartition(vectors, init=0.5)("matrix", vectors["matrix"])
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(RandomPartition(vectors, init=0.5)("matrix", vectors["matrix"]), one)


@pytest.mark.parametrize("name", SHAPES)
def test_tensors_of_any_rank_are_merged_part_by_part(vectors, name):
    parametrization = RandomPartition(vectors, parts=5, seed=4)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        parametrization.w.copy_(torch.randn(parametrization.w.shape, generator=generator))
    numel = vectors.shape(name).numel()
    parts = max(1, min(5, numel))
    values = parametrization.values()[name].double()
    assert values.shape == (2, parts)
    ids = [by_hand(4, name, index, parts) for index in range(numel)]
    wanted = (values[:, ids] * vectors[name].dense().double().view(2, numel)).sum(dim=0).view(SHAPES[name])
    found = parametrization(name, vectors[name])
    assert found.shape == SHAPES[name] and torch.allclose(found.double(), wanted, atol=1e-6)


def test_it_starts_from_zero_as_the_paper_does(vectors):
    parametrization = RandomPartition(vectors)
    assert parametrization.initial == 0 and parametrization.parts == 5
    with pytest.raises(ConfigError, match="Sigmoid"):
        RandomPartition(vectors, constraint=Sigmoid())


@pytest.mark.parametrize("parts", [0, -1, 1 << 32])
def test_impossible_parts_are_refused(vectors, parts):
    with pytest.raises(ConfigError, match="parts"):
        RandomPartition(vectors, parts=parts)
