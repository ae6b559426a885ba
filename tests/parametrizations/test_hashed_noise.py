"""Noise: the same from the same key, unlike from any other, spread as it should be, never infinite."""

import subprocess
import sys

import numpy
import pytest
import torch

from adamerge.parametrizations import hashed_noise as module
from adamerge.parametrizations.hashed_noise import logistic

CPU = torch.device("cpu")
N = 400_001


def uniform(*key: object, numel: int = N) -> torch.Tensor:
    return logistic(key, numel, CPU).double().sigmoid()


def splitmix(key: tuple, numel: int) -> numpy.ndarray:
    """The hash in unsigned integers, one number at a time in plain Python."""
    import hashlib

    start, mask, found = int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "little"), (1 << 64) - 1, []

    def carried(z: int, by: int) -> int:  # a shift that carries the sign
        return ((z - (1 << 64) if z >> 63 else z) >> by) & mask

    for index in range((numel + 1) // 2):
        z = (index * 0x9E3779B97F4A7C15 + start) & mask
        z = ((z ^ carried(z, 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ carried(z, 27)) * 0x94D049BB133111EB) & mask
        high = z >> 32
        for half in ((z & 0xFFFFFFFF) ^ high, high):
            signed = half - (1 << 32) if half >> 31 else half
            found.append(((signed >> 9) + (1 << 22) + 0.5) / (1 << 23))
    return numpy.array(found[:numel])


@pytest.mark.parametrize("numel", [0, 1, 2, 7])
def test_the_integers_are_those_of_the_hash(numel):
    u = torch.from_numpy(splitmix((3, 1, "a.weight"), numel)) if numel else torch.zeros(0, dtype=torch.float64)
    expected = (u / (1 - u)).log()
    assert torch.allclose(logistic((3, 1, "a.weight"), numel, CPU).double(), expected, rtol=1e-5, atol=1e-6)


def test_the_constants_are_those_of_splitmix64():
    signed = (-7046029254386353131, -4658895280553007687, -7723592293110705685)
    assert [hex(n % (1 << 64)) for n in signed] == ["0x9e3779b97f4a7c15", "0xbf58476d1ce4e5b9", "0x94d049bb133111eb"]


def test_it_is_spread_evenly_and_nothing_hangs_together():
    u, next_draw, other_name = uniform(0, 1, "a"), uniform(0, 2, "a"), uniform(0, 1, "b")
    assert abs(float(u.mean()) - 0.5) < 5 * (1 / 12 / N) ** 0.5
    assert abs(12 * float(u.var()) - 1) < 0.01
    counts = torch.histc(u, 64, 0, 1)
    assert float(((counts - N / 64) ** 2 / (N / 64)).sum()) < 63 + 5 * (2 * 63) ** 0.5
    pairs = [(u[:-k], u[k:]) for k in (1, 2, 3, 64, 4096)] + [(u, next_draw), (u, other_name)]
    for one, two in pairs:
        assert abs(float(torch.corrcoef(torch.stack([one, two]))[0, 1])) < 5 / N**0.5


def test_the_ends_are_never_reached(monkeypatch):
    """The largest and the smallest integer there can be give finite noise, of both signs."""
    bits = torch.tensor([-(1 << 22), (1 << 22) - 1], dtype=torch.int32)
    u = torch.add(bits, (1 << 22) + 0.5).mul_(2.0**-23)
    assert u.tolist() == [2.0**-24, 1 - 2.0**-24]
    assert torch.isfinite(torch.logit(u)).all()
    assert float(uniform(0, numel=3_000_000).max()) < 1


def test_pieces_change_nothing(monkeypatch):
    whole = logistic((1, "x"), 1001, CPU)
    monkeypatch.setattr(module, "HASHED_NOISE", 64)
    assert torch.equal(logistic((1, "x"), 1001, CPU), whole)


@pytest.mark.slow
def test_no_generator_is_asked_and_another_process_finds_the_same():
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    here = logistic((5, 2, "layer.weight"), 33, CPU)
    assert torch.equal(torch.random.get_rng_state(), before)
    code = (
        "import torch; from adamerge.parametrizations.hashed_noise import logistic; torch.manual_seed(9);"
        "print(logistic((5, 2, 'layer.weight'), 33, torch.device('cpu')).view(torch.int32).tolist())"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert run.stdout.strip() == str(here.view(torch.int32).tolist())
