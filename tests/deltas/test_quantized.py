"""Kept deltas: rounding within the stated bounds, sums in fp32, a few experts widened at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from adamerge.deltas.base import DenseDeltas
from adamerge.deltas.groups import Chunks, Ids, Whole
from adamerge.deltas.quantized import BLOCK, Blockwise, Code, EncodedDeltas, Floats
from adamerge.deltas.streamed import StreamedDeltas
from adamerge.deltas.tuning import FEW
from adamerge.errors import ConfigError

CODES = {
    "float32": Floats(torch.float32),
    "bfloat16": Floats(torch.bfloat16),
    "float16": Floats(torch.float16),
    "8 bits": Blockwise(8),
    "4 bits": Blockwise(4),
}


def numbers(*shape: int) -> Tensor:
    """Of many magnitudes: deltas of 1e-9 to 1e3, both signs, and zeros."""
    generator = torch.Generator().manual_seed(7)
    exponents = torch.rand(shape, generator=generator) * 12 - 9
    values = torch.randn(shape, generator=generator) * 10**exponents
    return torch.where(torch.rand(shape, generator=generator) < 0.1, 0.0, values)


def encoded(code: Code, row: Tensor) -> Tensor:
    """All of it at once."""
    held = code.room(len(row), row.device)
    code.encode(row, held, len(row), slice(0, len(row)))
    return held


def decoded(code: Code, held: Tensor, numel: int) -> Tensor:
    """All of it at once."""
    found = torch.full((numel,), torch.nan)
    code.decode(held, numel, slice(0, numel), found)
    return found


def bound(code: Code, row: Tensor) -> Tensor:
    """The largest error of each number that the docstrings state, in float64."""
    x = row.double().abs()
    if isinstance(code, Floats):
        half_steps = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
        return torch.maximum(x * half_steps[code.dtype], torch.tensor(2.0**-25 if code.dtype == torch.float16 else 0.0))
    blocks = torch.nn.functional.pad(x, (0, -len(x) % BLOCK)).view(-1, BLOCK)
    largest = blocks.amax(dim=1, keepdim=True).expand(blocks.shape).reshape(-1)[: len(x)]
    return largest / (254 if code.bits == 8 else 14) * (1 + 2.0**-20)  # the scale itself is rounded to fp32


@pytest.mark.parametrize("name", CODES)
@pytest.mark.parametrize("numel", [0, 1, 63, 64, 65, 5000])
def test_each_number_is_within_the_stated_bound(name, numel):
    code, row = CODES[name], numbers(numel)
    held = encoded(code, row)
    found = decoded(code, held, numel)
    assert held.nbytes == code.nbytes(numel) and found.shape == (numel,) and not found.isnan().any()
    error = (found.double() - row.double()).abs()
    assert (error <= bound(code, row)).all()
    assert not found[row == 0].any()
    if numel == 5000 and name != "float32":  # and the bound is not far from the truth
        assert (error / bound(code, row).clamp_min(1e-300)).max() > 0.9


def test_blocks_of_eight_and_four_bits_by_hand():
    row = torch.zeros(128)
    row[:4] = torch.tensor([127.0, -1.4, 0.6, -127.0])
    row[64:67] = torch.tensor([-7.0, 3.4, 0.4])
    assert decoded(Blockwise(8), encoded(Blockwise(8), row), 128)[:4].tolist() == [
        127.0,
        -1.0,
        1.0,
        -127.0,
    ]
    found = decoded(Blockwise(4), encoded(Blockwise(4), row), 128)
    assert found[64:67].tolist() == [-7.0, 3.0, 0.0] and found[:4].tolist() == [127.0, 0.0, 0.0, -127.0]
    assert Blockwise(8).nbytes(128) == 2 * (4 + 64) and Blockwise(4).nbytes(128) == 2 * (4 + 32)


def test_an_outlier_spoils_its_own_block_alone():
    row = torch.full((192,), 0.01)
    row[70] = 100.0
    found = decoded(Blockwise(8), encoded(Blockwise(8), row), 192)
    assert not found[64:70].any() and torch.allclose(found[:64], row[:64]) and torch.allclose(found[128:], row[128:])


def test_what_float16_cannot_hold_is_refused():
    with pytest.raises(ConfigError, match="too large for float16"):
        encoded(Floats(torch.float16), torch.tensor([1.0, 7e4]))


@pytest.mark.parametrize("name", CODES)
@pytest.mark.parametrize(
    "groups",
    [Whole(), Chunks(1), Chunks(4), Ids(3, lambda: torch.arange(60) % 3)],
    ids=lambda groups: type(groups).__name__,
)
def test_sums_and_contractions_are_the_formula_on_the_decoded_numbers(name, groups):
    deltas = EncodedDeltas.of(DenseDeltas(torch.randn(3, 4, 15)), CODES[name], lambda row: row)
    tau = deltas.dense().double().view(3, 60)
    assert deltas.dense().dtype == torch.float32 and deltas.dense().shape == (3, 4, 15)
    columns = torch.arange(60) % 3 if isinstance(groups, Ids) else torch.arange(60) * groups.count // 60
    coefficients = torch.randn(3, groups.count, requires_grad=True)
    combined = deltas.combine(coefficients, groups)
    slope = torch.randn(4, 15)
    combined.backward(slope)
    wanted = coefficients.detach().double().requires_grad_(True)
    expected = (wanted[:, columns] * tau).sum(dim=0)
    expected.backward(slope.double().flatten())
    assert combined.dtype == torch.float32
    assert (combined.detach().double().flatten() - expected.detach()).abs().max() < 2e-6
    assert (coefficients.grad.double() - wanted.grad).abs().max() < 1e-5


@pytest.mark.parametrize("name", CODES)
def test_sums_are_in_fp32_also_where_numbers_are_not(name):
    """256 experts of 1 and a coefficient of 1 + 2^-12: a sum in bfloat16 would stop at 256, one in half at 2048."""
    deltas = EncodedDeltas.of(DenseDeltas(torch.ones(300, 4096)), CODES[name], lambda row: row)
    coefficients = torch.full((300, 1), 1 + 2.0**-12)
    assert torch.allclose(deltas.combine(coefficients, Whole()), torch.full((4096,), 300 * (1 + 2.0**-12)), rtol=1e-5)
    found = deltas.contract(torch.full((4096,), 1 + 2.0**-12), Whole())
    assert torch.allclose(found, torch.full((300, 1), 4096.0 + 1), rtol=1e-6)


class Peak(TorchDispatchMode):
    """The elements of the largest tensor that any operation makes or writes a part of, and those of all operations."""

    largest = elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        if not function.is_view:
            sizes = [x.numel() for x in tree_leaves((args, kwargs, found)) if isinstance(x, Tensor)]
            self.elements += max(sizes, default=0)
            outputs = [x.untyped_storage().nbytes() // x.itemsize for x in tree_leaves(found) if isinstance(x, Tensor)]
            self.largest = max(self.largest, *outputs, 0)
        return found


@pytest.mark.parametrize(
    "groups", [Whole(), Chunks(5), Ids(3, lambda: torch.arange(6400) % 3)], ids=lambda groups: type(groups).__name__
)
@pytest.mark.parametrize("name", [name for name in CODES if name != "float32"])
def test_no_more_than_a_few_experts_are_widened_at_once(name, groups):
    deltas = EncodedDeltas.of(DenseDeltas(torch.randn(10, 6400)), CODES[name], lambda row: row)
    with Peak() as peak:
        deltas.contract(deltas.combine(torch.randn(10, groups.count), groups), groups)
    assert FEW * 6400 <= peak.largest <= FEW * 6400 + BLOCK * 16


@pytest.mark.parametrize(("name", "most"), [("bfloat16", 30), ("float16", 30), ("8 bits", 41), ("4 bits", 61)])
def test_operations_are_those_stated(name, most):
    """Ten experts, merged and contracted."""
    deltas = EncodedDeltas.of(DenseDeltas(torch.randn(10, 6400)), CODES[name], lambda row: row)
    with Peak() as peak:
        deltas.contract(deltas.combine(torch.randn(10, 1), Whole()), Whole())
    assert most - 2 <= peak.elements / 6400 <= most + 0.1, peak.elements / 6400


@pytest.mark.parametrize("code", CODES.values(), ids=CODES)
@pytest.mark.parametrize("experts", [1, 5, 9])
def test_encoded_in_pieces_it_is_the_same_bits(monkeypatch, code, experts):
    """And each expert has memory of its own, although what is read of them is read into the same."""
    rows, base = numbers(experts, 5000).clamp(-1e4, 1e4), torch.zeros(5000)
    deltas = StreamedDeltas(lambda: base, [lambda row=row: row for row in rows], base.shape, base.device)
    whole = EncodedDeltas.of(deltas, code, lambda held: held)
    monkeypatch.setattr("adamerge.deltas.quantized.PIECE", 700)  # 704: pieces are of whole blocks
    cut = EncodedDeltas.of(deltas, code, lambda held: held)
    for one, other, row in zip(whole.encoded, cut.encoded, rows, strict=True):
        assert torch.equal(one, other) and torch.equal(one, encoded(code, row))
