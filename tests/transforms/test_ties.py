"""TIES against a literal float64 reading of the paper on one long vector per expert."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some

from adamerge.errors import ConfigError
from adamerge.parametrizations import TaskWise
from adamerge.task_vectors.task_vectors import TaskVectors
from adamerge.transforms import DisjointMean, Ties

SHAPES = {"a": (7, 3), "b": (11,), "c": (), "d": (2, 2, 2)}
SIZE = sum(math.prod(shape) for shape in SHAPES.values())


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Tiny tensors: a second thread only waits for a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def vectors_of(long, transforms):
    """Task vectors whose deltas are exactly the rows of ``long``: the base is zero."""
    pieces = dict(zip(SHAPES, long.float().split([math.prod(s) for s in SHAPES.values()], dim=1), strict=True))
    experts = {f"e{k}": {n: p[k].reshape(SHAPES[n]).clone() for n, p in pieces.items()} for k in range(len(long))}
    return TaskVectors({n: torch.zeros(s) for n, s in SHAPES.items()}, experts, transforms)


def reference(long, keep):
    long = long.float().double()
    rank = max(long.shape[1] - math.floor(keep * long.shape[1]), 1)
    thresholds = torch.stack([torch.kthvalue(row.abs(), rank).values for row in long])
    trimmed = torch.stack([torch.where(row.abs() >= t, row, 0.0) for row, t in zip(long, thresholds, strict=True)])
    signs = []
    for e in range(long.shape[1]):
        total = float(trimmed[:, e].sum())
        signs.append((total > 0) - (total < 0))
    majority = (sum(signs) > 0) - (sum(signs) < 0)
    signs = torch.tensor([s if s != 0 else majority for s in signs], dtype=torch.float64)
    return torch.where(torch.sign(trimmed) == signs, trimmed, 0.0), thresholds, majority


def check(long, keep):
    vectors = vectors_of(long, [Ties(keep)])
    expected, thresholds, majority = reference(long, keep)
    (state,) = vectors.states
    assert state["thresholds"] == thresholds.tolist()
    assert state["majority"] == [float(majority)]
    found = torch.cat([vectors[name].dense().view(len(long), -1) for name in SHAPES], dim=1)
    assert torch.equal(found.double(), expected)
    return found


@pytest.mark.parametrize("keep", [0.01, 0.2, 0.5, 0.77, 1.0])
@pytest.mark.parametrize("experts", [1, 2, 5])
@pytest.mark.parametrize("scale", [1.0, 1e-12, 1e20, 1e-42])
def test_random_vectors(keep, experts, scale):
    torch.manual_seed(experts)
    check(torch.randn(experts, SIZE, dtype=torch.float64) * scale, keep)


@settings(max_examples=60, deadline=None)
@given(
    some.integers(1, 4).flatmap(lambda t: some.lists(some.lists(some.integers(-3, 3), min_size=SIZE, max_size=SIZE),
                                                     min_size=t, max_size=t)),
    some.sampled_from([0.05, 0.2, 0.5, 1.0]),
)  # fmt: skip
def test_few_distinct_values_tie_at_the_threshold_and_cancel(rows, keep):
    check(torch.tensor(rows, dtype=torch.float64) / 4, keep)


def test_ties_at_the_threshold_all_survive():
    long = torch.full((1, SIZE), 0.5)
    long[0, 0], long[0, 1] = 2.0, 0.25
    found = check(long, 0.2)
    assert int((found != 0).sum()) == SIZE - 1  # more than the fifth that was asked for, as in the papers' code


def test_cancelled_elements_go_to_the_majority():
    long = torch.zeros(2, SIZE)
    long[:, 0] = torch.tensor([1.0, -1.0])  # cancels
    long[:, 1] = torch.tensor([1.0, 3.0])
    long[:, 2] = torch.tensor([2.0, 4.0])
    long[:, 3] = torch.tensor([-2.0, 1.0])
    found = check(long, 1.0)
    assert found[:, :4].tolist() == [[1.0, 1.0, 2.0, -2.0], [0.0, 3.0, 4.0, 0.0]]
    found = check(-long, 1.0)
    assert found[:, 0].tolist() == [-1.0, 0.0]


def test_cancelled_elements_vanish_without_a_majority():
    """The released code keeps the negative ones."""
    long = torch.zeros(2, SIZE)
    long[:, 0] = torch.tensor([1.0, -1.0])
    assert check(long, 1.0).abs().sum() == 0
    torch.manual_seed(0)
    one = torch.randn(1, SIZE)
    assert check(torch.cat([one, -one]), 1.0).abs().sum() == 0, "each other's negative"
    long[:, 1:3] = torch.tensor([[2.0, -3.0], [1.0, -1.0]])  # one elected sign each: a majority of 0
    assert check(long, 1.0)[:, :3].tolist() == [[0.0, 2.0, -3.0], [0.0, 1.0, -1.0]]


@pytest.mark.parametrize(("experts", "keep"), [(1, 0.2), (3, 0.2), (5, 0.5)])
def test_the_papers_disjoint_mean(experts, keep):
    """Algorithm 1 in float64: trim, elect ``gamma``, and the mean over the experts whose sign is ``gamma``, times lambda."""
    torch.manual_seed(experts)
    long = torch.randn(experts, SIZE)
    vectors = vectors_of(long, [Ties(keep), DisjointMean()])
    merged = torch.cat([TaskWise(vectors, init=0.7)(name, vectors[name]).reshape(-1) for name in SHAPES])
    wide = long.double()
    least = wide.abs().sort(dim=1).values[:, SIZE - math.floor(keep * SIZE) - 1]
    trimmed = torch.where(wide.abs() >= least[:, None], wide, 0.0)
    for e, column in enumerate(trimmed.T.tolist()):
        total = math.fsum(column)
        agreeing = [value for value in column if value * total > 0]
        expected = 0.7 * math.fsum(agreeing) / max(len(agreeing), 1)
        # of each expert's entry: one rounding of the quotient, the product and the sum, and 0.7's own
        bound = (experts + 3) * 2.0**-24 * 0.7 * sum(map(abs, agreeing)) / max(len(agreeing), 1)
        assert abs(float(merged[e].detach()) - expected) <= bound, e


def test_the_threshold_is_exact_among_neighbouring_floats():
    """Two histogram passes over the bits: neighbours that share their upper 16 bits must still be told apart."""
    start = torch.tensor(1.0).view(torch.int32)
    long = (start + torch.arange(SIZE, dtype=torch.int32)).view(torch.float32).double().unsqueeze(0)
    found = check(long, 0.2)
    assert int((found != 0).sum()) == math.floor(0.2 * SIZE) + 1


def test_the_threshold_is_global_over_tensors_not_per_tensor():
    long = torch.ones(1, SIZE, dtype=torch.float64) * torch.arange(1, SIZE + 1)
    vectors = vectors_of(long, [Ties(0.2)])
    assert vectors["a"].dense().abs().sum() == 0 and vectors["d"].dense().abs().min() > 0


def test_excluded_tensors_do_not_count():
    torch.manual_seed(0)
    base = {"in": torch.zeros(10), "out": torch.zeros(1000)}
    expert = {"in": torch.arange(1.0, 11.0), "out": torch.full((1000,), 100.0)}
    vectors = TaskVectors(base, {"one": expert}, [Ties(0.2)], include=["in"])
    assert vectors.states[0]["thresholds"] == [8.0]  # the (10 - 2)-th smallest, inclusive: three survive
    assert vectors["in"].dense().tolist() == [[0.0] * 7 + [8.0, 9.0, 10.0]]


@pytest.mark.parametrize("keep", [0.0, -0.1, 1.0001, math.nan])
def test_keep_out_of_range_is_refused(keep):
    with pytest.raises(ConfigError, match=r"Ties: keep must be in \(0, 1\]"):
        Ties(keep)


def test_the_state_is_a_few_plain_numbers():
    torch.manual_seed(0)
    (state,) = vectors_of(torch.randn(3, SIZE), [Ties()]).states
    assert {key: len(value) for key, value in state.items()} == {"thresholds": 3, "majority": 1}
    assert all(type(number) is float for value in state.values() for number in value)


def test_the_order_of_experts_decides_no_sign():
    """In fp32, 1 + 2**-25 - 1 is 0 or 2**-25 by the order of the sum; in float64 it is 2**-25 in any order."""
    experts = {"x": [1.0, -5.0], "y": [2.0**-25, -5.0], "z": [-1.0, -5.0]}
    found = []
    for order in ("xyz", "xzy", "zyx"):
        tensors = {name: {"a": torch.tensor(experts[name])} for name in order}
        kept = TaskVectors({"a": torch.zeros(2)}, tensors, [Ties(1.0)])["a"].dense()
        found.append({name: kept[order.index(name)].tolist() for name in "xyz"})
    assert found[0] == found[1] == found[2]
