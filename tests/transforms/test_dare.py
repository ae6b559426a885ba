"""DARE: by hand, how many are dropped, the same bits however and wherever a tensor is read, and its mean."""

import json
import math
from functools import partial

import pytest
import torch

from adamerge.artifacts.coefficients import Coefficients, load_coefficients, save_coefficients
from adamerge.artifacts.recipe import build, describe
from adamerge.deltas import tuning
from adamerge.deltas.groups import Whole
from adamerge.errors import ConfigError
from adamerge.io.model_folder import Layout
from adamerge.parametrizations import LayerWise, TaskWise
from adamerge.task_vectors.storage import Disk, LowBit, Resident
from adamerge.task_vectors.task_vectors import TaskVectors
from adamerge.transforms import Combine, Dare, Scale, Ties, Transform
from adamerge.transforms import dare as module

CPU = torch.device("cpu")
WIDE = (300, 401)
BY_HAND = [[2, 2, 0, 0, 0, 0, 2, 0], [2, 2, 2, 2, 0, 2, 0, 0]]


def vectors_of(transforms, experts=("one", "two"), shape=(4, 2), value=1.0):
    tensors = {name: {"w": torch.full(shape, value), "b": torch.full((3,), value)} for name in experts}
    return TaskVectors({"w": torch.zeros(shape), "b": torch.zeros(3)}, tensors, transforms)


def random_models(shape=WIDE):
    generator = torch.Generator().manual_seed(1)
    base = {"w": torch.randn(shape, generator=generator)}
    return base, {name: {"w": base["w"] + torch.randn(shape, generator=generator)} for name in "abc"}


def test_eight_entries_by_hand():
    """``b_k[e]`` is 1 where the hash, a signed number of 64 bits, is at least ``drop 2^64 - 2^63``.

    Worked out in plain integers: sha256 of ``(0, 'one', 'w')``, plus 0x9E37...C15 an index, then splitmix64's first two
    rounds with shifts that repeat the sign.
    """
    dropped = vectors_of([Dare(0.5)])["w"].dense().flatten(1)
    assert dropped.tolist() == BY_HAND
    assert (vectors_of([Dare(0.5, rescale=False)])["w"].dense().flatten(1) == dropped / 2).all()


def test_nothing_is_dropped_at_0_and_another_seed_drops_others():
    base, experts = random_models()
    plain = TaskVectors(base, experts)["w"].dense()
    assert torch.equal(TaskVectors(base, experts, [Dare(0.0)])["w"].dense(), plain)
    kept = [TaskVectors(base, experts, [Dare(0.5, seed)])["w"].dense() != 0 for seed in (0, 1)]
    assert 0.4 < (kept[0] == kept[1]).float().mean() < 0.6


@pytest.mark.parametrize("drop", [0.05, 0.5, 0.9, 0.99])
def test_the_share_that_is_dropped_is_binomial_and_draws_hang_together_nowhere(drop):
    """Five standard deviations of a binomial: of all, of each residue of the index, and of pairs."""
    deltas = vectors_of([Dare(drop)], ("a", "b"), WIDE)["w"].dense().flatten(1)
    kept, n = deltas != 0, math.prod(WIDE)
    keep = 1 - drop
    assert torch.equal(deltas[kept], torch.full_like(deltas[kept], 1 / keep))

    def within(draws, p):
        return abs(int(draws.sum()) - len(draws) * p) <= 5 * math.sqrt(len(draws) * p * (1 - p))

    for row in kept:
        assert within(row, keep)
        assert all(within(row[first::8], keep) for first in range(8))
        # pairs overlap, so that their count varies by up to twice the variance of independent ones
        for apart in (1, 2, 3, 64, 401):
            both = int((row[:-apart] & row[apart:]).sum())
            variance = n * keep**2 * (1 - keep**2) + 2 * n * keep**3 * (1 - keep)
            assert abs(both - (n - apart) * keep**2) <= 5 * math.sqrt(variance), apart
    assert within(kept[0] & kept[1], keep**2), "each expert has draws of its own"


def test_the_mean_over_seeds_is_the_task_vector():
    """``b / (1 - p)`` has mean 1 and variance ``p / (1 - p)``."""
    seeds, drop = 400, 0.75
    mean = sum(vectors_of([Dare(drop, seed)])["w"].dense().double() for seed in range(seeds)) / seeds
    assert (mean - 1).abs().max() <= 5 * math.sqrt(drop / (1 - drop) / seeds)
    assert abs(float(mean.mean()) - 1) <= 5 * math.sqrt(drop / (1 - drop) / seeds / mean.numel())


def test_pieces_have_the_bits_of_the_whole(monkeypatch):
    base, experts = random_models()
    deltas = TaskVectors(base, experts, [Dare(0.7), Scale({"a": -1.0}), Dare(0.2, seed=1)])["w"]
    whole, n = deltas.rows(torch.float32), math.prod(WIDE)
    assert deltas.divisible
    for size in (1 << 16, 1000, n - 1):
        parts = [deltas.rows(torch.float32, slice(at, min(at + size, n))) for at in range(0, n, size)]
        assert torch.equal(torch.cat(parts, dim=1), whole), size
    sums = torch.cat([values for _, values in deltas.sums(torch.rand(3, 1), Whole(), size=777)])
    assert len(sums) == n and len(deltas.pieces(size=777)) > 100
    monkeypatch.setattr(module, "HASHED_NOISE", 1001)
    assert torch.equal(deltas.rows(torch.float32), whole) and tuning.HASHED_NOISE > 1001


@pytest.mark.parametrize("storage", [Resident(), Resident("bfloat16"), LowBit(8), LowBit(4), Disk()], ids=str)
def test_every_storage_drops_the_same_entries(storage):
    base, experts = random_models()
    streamed = TaskVectors(base, experts, [Dare(0.6)])
    wanted, stored = streamed["w"].dense(), storage.place(streamed, CPU)["w"].dense()
    assert not stored[wanted == 0].any() and (wanted == 0).float().mean() > 0.55
    if storage.rounding == "none":
        assert torch.equal(stored, wanted)


def test_the_order_of_the_experts_changes_no_bit():
    base, experts = random_models()
    plain, transforms = TaskVectors(base, experts, [Dare(0.6)]), [Dare(0.6)]
    for order in ("cab", "bca", "ba"):
        found = TaskVectors(base, {name: experts[name] for name in order}, transforms)["w"].dense()
        wanted = plain["w"].dense()["abc".index(order[0])]
        assert torch.equal(found[0], wanted)
        assert torch.equal(found, plain["w"].dense()[["abc".index(name) for name in order]])


def test_tensors_of_other_names_have_draws_of_their_own():
    values = torch.ones(2000)
    vectors = TaskVectors(dict.fromkeys("xy", 0 * values), {"one": dict.fromkeys("xy", values)}, [Dare(0.5)])
    same = (vectors["x"].dense() == vectors["y"].dense()).float().mean()
    assert abs(float(same) - 0.5) < 5 * math.sqrt(0.25 / 2000)


def test_no_generator_is_asked():
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    vectors_of([Dare()])["w"].dense()
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("transforms", [[Dare(0.6, 4, False)], [Dare(0.6, 4), Ties(0.5)], [Combine(), Dare(0.9)]])
def test_the_recipe_gives_the_same_bits_again(transforms, tmp_path):
    base, experts = random_models((6, 5))
    vectors = TaskVectors(base, experts, transforms)
    for transform in transforms:
        spec = json.loads(json.dumps(describe(transform)))
        assert describe(build(spec, Transform)) == spec
    parametrization = LayerWise(vectors, init=0.7)
    path = tmp_path / "c.safetensors"
    save_coefficients(Coefficients(vectors, parametrization, Layout(), dtype=torch.float32), path)
    again = load_coefficients(path, base=base, experts=experts)
    with torch.no_grad():
        merged = parametrization("w", vectors["w"])
        assert torch.equal(again.parametrization("w", again.task_vectors["w"]), merged) and merged.any()


def test_ties_after_it_elects_among_what_is_left():
    """The paper's DARE with TIES: thresholds are of the rescaled vectors, dropped entries elect nothing."""
    base, experts = random_models((6, 5))
    taus = TaskVectors(base, experts, [Dare(0.5)])["w"].dense().flatten(1).double()
    found = TaskVectors(base, experts, [Dare(0.5), Ties(0.4)])["w"].dense().flatten(1).double()
    least = taus.abs().sort(dim=1).values[:, 30 - 12 - 1 :][:, :1]
    trimmed = torch.where(taus.abs() >= least, taus, 0.0)
    signs = trimmed.sum(dim=0).sign()
    signs = torch.where(signs == 0, signs.sum().sign(), signs)
    assert torch.equal(found, torch.where(trimmed.sign() == signs, trimmed, 0.0)) and found.any()


def test_coefficients_are_learned_on_it():
    vectors = vectors_of([Dare(0.5)])
    parametrization = partial(TaskWise, init=0.3)(vectors)
    parametrization("w", vectors["w"]).sum().backward()
    assert parametrization.w.grad.flatten().tolist() == vectors["w"].dense().sum(dim=(1, 2)).tolist()


@pytest.mark.parametrize(
    "arguments", [{"drop": 1.0}, {"drop": -0.1}, {"drop": math.nan}, {"seed": 1.0}, {"seed": True}]
)
def test_what_is_no_probability_or_seed_is_refused(arguments):
    with pytest.raises(ConfigError, match=f"Dare: {next(iter(arguments))} must be"):
        Dare(**arguments)
