"""Coefficients of rows, columns and elements: numbers by hand, three steps of an optimiser, and what is shown of them."""

import math

import pytest
import torch
from modules import randomised
from rounding import gamma

from adamerge.merging.copies import Place
from adamerge.merging.merged_tensor import updates
from adamerge.merging.pullback import MergeGradients
from adamerge.objectives.penalties import DistanceToInitial
from adamerge.parametrizations import Concrete, ElementWise, Frozen, LayerWise, RowColumnWise
from adamerge.task_vectors.task_vectors import TaskVectors
from adamerge.transforms import RootSumSquare

SHAPES = {"conv": (3, 2, 4), "matrix": (5, 7), "vector": (6,), "number": ()}


def vectors_of(seed=0, transforms=(), dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    base = {name: torch.randn(shape, generator=generator, dtype=dtype) for name, shape in SHAPES.items()}
    experts = {
        task: {name: own + 0.5 * torch.randn(own.shape, generator=generator, dtype=dtype) for name, own in base.items()}
        for task in ("one", "two", "three")
    }
    return TaskVectors(base, experts, transforms)


def taus(vectors):
    """Deltas as ``(experts, rows, columns)`` in float64; of a vector, rows are elements and there are no columns."""
    return {name: vectors[name].dense().double().view(len(vectors.experts), *matrix(name)) for name in vectors}


def matrix(name):
    shape = SHAPES[name]
    return (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (math.prod(shape), 1)


def multiplies(values, name):
    """``r_k[i] + c_k[j]``, ``(experts, rows, columns)``, of a vector the elements' own."""
    if name in values:
        return values[name].unsqueeze(2)
    return values[f"{name}/rows"].unsqueeze(2) + values[f"{name}/columns"].unsqueeze(1)


def by_group(parametrization):
    """Gradients, in the groups of the values."""
    kept = {group: own.clone() for group, own in parametrization.values().items()}
    with torch.no_grad():
        for parameter in parametrization.parameters():
            parameter.copy_(parameter.grad)
    found = {group: own.clone() for group, own in parametrization.values().items()}
    parametrization.load_values(kept)
    return found


def test_rows_and_columns_by_hand():
    base, expert = torch.zeros(2, 2), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    vectors = TaskVectors({"w": base}, {"one": {"w": expert}})
    parametrization = RowColumnWise(vectors, init=0.5)
    assert parametrization("w", vectors["w"]).tolist() == [[0.5, 1.0], [1.5, 2.0]]
    parametrization.load_values({"w/rows": torch.tensor([[10.0, 20.0]]), "w/columns": torch.tensor([[1.0, 2.0]])})
    update = parametrization("w", vectors["w"])
    assert update.tolist() == [[11.0, 24.0], [63.0, 88.0]]
    update.backward(torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
    assert parametrization.w[0].grad.tolist() == [[3.0, -1.0, 4.0, -2.0]]


def test_elements_by_hand():
    vectors = TaskVectors({"w": torch.zeros(3)}, {"one": {"w": torch.tensor([1.0, 2.0, 3.0])}})
    parametrization = ElementWise(vectors)
    assert parametrization("w", vectors["w"]).tolist() == [0.0, 0.0, 0.0]
    parametrization.load_values({"w": torch.tensor([[1.0, 10.0, 100.0]])})
    update = parametrization("w", vectors["w"])
    update.backward(torch.tensor([1.0, -1.0, 2.0]))
    assert update.tolist() == [1.0, 20.0, 300.0] and parametrization.w[0].grad.tolist() == [[1.0, -2.0, 6.0]]


def test_one_number_an_element_in_units_of_all_experts():
    """The deltas 3 and -4 of two experts are a unit of 5, whatever their signs."""
    experts = {"one": {"w": torch.tensor([3.0, 0.0])}, "two": {"w": torch.tensor([-4.0, 0.0])}}
    vectors = TaskVectors({"w": torch.zeros(2)}, experts, [RootSumSquare()])
    parametrization = ElementWise(vectors, init=-1.0)
    assert vectors.experts == ("scale",) and parametrization("w", vectors["w"]).tolist() == [-5.0, 0.0]


@pytest.mark.parametrize("kind", [RowColumnWise, ElementWise])
def test_each_tensor_has_its_own_parameter_and_begins_at_init(kind):
    vectors = vectors_of()
    parametrization = kind(vectors, init=0.25)
    assert len(list(parametrization.parameters())) == len(vectors) and not parametrization.probed
    counts = {name: own.shape[1] for name, own in parametrization.values().items()}
    rows = {"conv/rows": 3, "conv/columns": 8, "matrix/rows": 5, "matrix/columns": 7}
    elements = {"conv": 24, "matrix": 35}
    assert counts == (rows if kind is RowColumnWise else elements) | {"vector": 6, "number": 1}
    for group, value in parametrization.values().items():
        assert set(value.unique().tolist()) == {parametrization.begun(group)}
    assert parametrization.initial == 0.25


def test_a_group_of_a_tensor_with_such_a_name_is_no_column():
    """A tensor may be called anything."""
    vectors = TaskVectors({"a/columns": torch.zeros(2)}, {"one": {"a/columns": torch.ones(2)}})
    parametrization = RowColumnWise(vectors, init=0.5)
    assert parametrization.begun("a/columns") == 0.5
    assert {name: pair[0].tolist() for name, pair in RowColumnWise.moments(parametrization.values()).items()} == {
        "a/columns": [0.5]
    }


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("kind", [RowColumnWise, ElementWise])
def test_loss_gradient_and_three_steps_in_float64(kind, optimizer):
    """``L = sum (theta - t)^2 / 2``: so ``G = theta - t``, ``dL/dr_k[i] = sum_j G tau_k``, ``dL/dc_k[j] = sum_i G tau_k``."""
    vectors, lr = vectors_of(), 0.05
    parametrization = kind(vectors, init=0.3)
    values = {group: own.double() for group, own in randomised(parametrization).items()}
    targets = {
        name: torch.linspace(-1, 1, math.prod(SHAPES[name]), dtype=torch.float64).view(matrix(name)) for name in vectors
    }
    made = torch.optim.SGD if optimizer == "sgd" else torch.optim.Adam
    search = made(parametrization.parameters(), lr=lr)
    first = {group: torch.zeros_like(own) for group, own in values.items()}
    second = {group: torch.zeros_like(own) for group, own in values.items()}
    for step in range(1, 4):
        # the package: updates piece by piece, G in the place of the copy, one contraction
        gradients, places, loss = MergeGradients(list(parametrization.parameters())), {}, 0.0
        for name in vectors:
            update = torch.cat([own for _, own in updates(parametrization, name, vectors[name], gradients=gradients)])
            theta = vectors.base[name].reshape(-1) + update
            parameter = torch.nn.Parameter(theta.view(SHAPES[name]))
            parameter.grad = (theta - targets[name].float().reshape(-1)).view(SHAPES[name])
            loss += float(parameter.grad.double().square().sum()) / 2
            places[name] = Place(parameter)
        for parameter, gradient in zip(parametrization.parameters(), gradients.gradients(places), strict=True):
            parameter.grad = gradient
        # the formula
        wanted_loss, wanted = 0.0, {}
        for name, tau in taus(vectors).items():
            own = values[name].view(tau.shape) if kind is ElementWise else multiplies(values, name)
            slope = vectors.base[name].double().view(matrix(name)) + (own * tau).sum(dim=0) - targets[name]
            wanted_loss += float(slope.square().sum()) / 2
            products = slope * tau
            if kind is ElementWise or name in values:
                wanted[name] = products.reshape(len(tau), -1)
            else:
                wanted |= {f"{name}/rows": products.sum(dim=2), f"{name}/columns": products.sum(dim=1)}
        assert loss == pytest.approx(wanted_loss, rel=1e-6)
        largest = max(float(own.abs().max()) for own in wanted.values())
        for group, own in by_group(parametrization).items():
            assert (own.double() - wanted[group]).abs().max() <= 1e-6 * largest, group
        search.step()
        for group, gradient in wanted.items():
            first[group] = 0.9 * first[group] + 0.1 * gradient
            second[group] = 0.999 * second[group] + 0.001 * gradient.square()
            moved = first[group] / (1 - 0.9**step) / ((second[group] / (1 - 0.999**step)).sqrt() + 1e-8)
            values[group] = values[group] - lr * (gradient if optimizer == "sgd" else moved)
        for group, value in parametrization.values().items():
            assert (value.double() - values[group]).abs().max() < 2e-5, (step, group)


@pytest.mark.parametrize("wrapped", [False, True])
def test_what_is_shown_is_the_effective_coefficient(wrapped):
    """Mean and spread of ``r[i] + c[j]`` over all elements, from those of r and of c."""
    vectors = vectors_of()
    inner = RowColumnWise(vectors)
    values = {group: own.double() for group, own in randomised(inner).items()}
    parametrization = Frozen(vectors, lambda _: inner) if wrapped else inner
    moments = RowColumnWise.moments(parametrization.values())
    assert set(moments) == set(SHAPES)
    for name, (mean, spread) in moments.items():
        own = multiplies(values, name).flatten(1)
        own = own.expand(3, -1)
        assert torch.allclose(mean.double(), own.mean(dim=1), atol=1e-6)
        assert torch.allclose(spread.double(), own.std(dim=1, correction=0), atol=1e-6)
        size = parametrization.sizes()[name].double()
        assert torch.allclose(size, own.square().mean(dim=1).sqrt(), atol=1e-6)


def test_a_penalty_knows_where_rows_and_columns_begin():
    vectors = vectors_of()
    parametrization = RowColumnWise(vectors, init=0.3)
    assert float(DistanceToInitial()(parametrization).detach()) == 0.0
    with torch.no_grad():
        parametrization.w[0] += 0.5
    groups = parametrization.coefficients()
    count = parametrization.w[0].numel()
    assert float(DistanceToInitial()(parametrization).detach()) == pytest.approx(0.5 * count / (3 * len(groups)))


def test_zero_gives_the_base_and_r_against_c_cancels_bit_for_bit():
    """``r = a`` and ``c = -a`` are 0 in any rounding."""
    vectors = vectors_of()
    parametrization = RowColumnWise(vectors, init=0.0)
    for name in vectors:
        assert not parametrization(name, vectors[name]).any()
    values = {
        group: torch.full_like(own, -0.7 if group.endswith("columns") else 0.7)
        for group, own in parametrization.values().items()
    }
    parametrization.load_values(values)
    for name in ("conv", "matrix"):
        assert not parametrization(name, vectors[name]).any()


def test_rows_alone_and_columns_alone_scale_the_expert():
    """A merge law: with ``c = 0`` and all rows one number it is layer-wise; likewise for columns."""
    vectors = vectors_of()
    layers, both = LayerWise(vectors, init=0.4), RowColumnWise(vectors, init=0.4)
    turned = RowColumnWise(vectors, init=0.0)
    turned.load_values(
        {g: torch.full_like(own, 0.0 if g.endswith("/rows") else 0.4) for g, own in turned.values().items()}
    )
    for name in vectors:
        wanted = layers(name, vectors[name])
        size = (0.4 * vectors[name].dense().abs()).sum(dim=0)
        for other in (both, turned):
            assert ((other(name, vectors[name]) - wanted).abs() <= gamma(6) * size).all()


def test_a_mask_goes_around_it():
    vectors = vectors_of()
    masked = Concrete(vectors, RowColumnWise, initial_logit=0.0)
    assert masked.inner.w[0].requires_grad and masked.probed is False
    assert torch.isfinite(masked("matrix", vectors["matrix"])).all()
