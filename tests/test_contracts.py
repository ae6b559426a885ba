"""One sweep over every transform, parametrization, constraint and objective that the package has or will have.

A new part is found by itself; what it must bring is its formula in float64, written here from the paper.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect
import itertools
import json
import math
import pkgutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from component_files import OF_COMPONENTS, with_components
from rounding import UNIT
from safetensors.torch import save_file
from torch import Tensor, nn

import adamerge.objectives
import adamerge.objectives.penalties
import adamerge.parametrizations
import adamerge.parametrizations.constraints
import adamerge.transforms
from adamerge.artifacts.coefficients import Coefficients, load_coefficients, save_coefficients
from adamerge.artifacts.recipe import build, build_factory, describe
from adamerge.backbones import Backbone, Batch, Encoded, Output, Teacher
from adamerge.io.model_folder import Layout
from adamerge.merging.merged_model import MergedModel
from adamerge.objectives import Objective
from adamerge.objectives.penalties import Penalty
from adamerge.parametrizations import (
    BlockWise,
    ChunkWise,
    ExpectedMask,
    LayerWise,
    Linear,
    Mask,
    Parametrization,
    TaskWise,
)
from adamerge.parametrizations.constraints import Constraint
from adamerge.parametrizations.wrapper import Wrapper
from adamerge.task_vectors.storage import Disk, Resident
from adamerge.task_vectors.task_vectors import TaskVectors
from adamerge.transforms import Transform

SHAPES = {
    "blocks.0.weight": (5, 7), "blocks.0.bias": (7,), "blocks.1.weight": (3, 4, 2), "head.weight": (2, 9),
    "logit_scale": (), "single": (1,),
}  # fmt: skip
EXPERTS = {"first": torch.float32, "second": torch.bfloat16, "third": torch.float64}


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Tiny tensors: a second thread only waits for a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def finals(package: object, kind: type) -> list[type]:
    """Every class of a module or package that can be made: a subclass of ``kind`` without abstract methods."""
    modules = [package]
    for found in pkgutil.iter_modules(getattr(package, "__path__", [])):
        modules.append(importlib.import_module(f"{package.__name__}.{found.name}"))
    classes = {
        member
        for module in modules
        for _, member in inspect.getmembers(module, inspect.isclass)
        if issubclass(member, kind) and not inspect.isabstract(member) and member.__module__.startswith("adamerge.")
    }
    return sorted(classes, key=lambda member: member.__name__)


TRANSFORMS = finals(adamerge.transforms, Transform)
PARAMETRIZATIONS = finals(adamerge.parametrizations, Linear)
WRAPPERS = finals(adamerge.parametrizations, Wrapper)
MASKS = finals(adamerge.parametrizations, Mask)
CONSTRAINTS = finals(adamerge.parametrizations.constraints, Constraint)
OBJECTIVES = finals(adamerge.objectives, Objective)
PENALTIES = finals(adamerge.objectives.penalties, Penalty)
REACHES_ANYTHING = [kind for kind in CONSTRAINTS if kind.__name__ in {"Free", "Clamp", "Projection"}]

# the formulas, in float64 and from the papers ------------------------------------------------------------------------

PHI: dict[str, Callable[[Tensor], Tensor]] = {
    "Free": lambda w: w,
    "Clamp": lambda w: torch.minimum(torch.maximum(w, torch.zeros_like(w)), torch.ones_like(w)),
    "Projection": lambda w: w,
    "Sigmoid": lambda w: 1 / (1 + torch.exp(-w)),
    "Softmax": lambda w: torch.exp(w) / torch.exp(w).sum(dim=0, keepdim=True),
}


def two_chunks(name: str, numel: int) -> list[tuple[str, int]]:
    if numel == 1:
        return [(name, 0)]
    return [(name, 0)] * (numel // 2) + [(name, 1)] * (numel - numel // 2)


BLOCKS = {"blocks.0.weight": "blocks.0", "blocks.0.bias": "blocks.0", "blocks.1.weight": "blocks.1"}
BLOCKS |= {"head.weight": "head", "logit_scale": "logit_scale", "single": "single"}
ALLOCATION = {"blocks.0.weight": 3, "blocks.0.bias": 0, "blocks.1.weight": 2, "head.weight": 1, "logit_scale": 1}
ALLOCATION |= {"single": 0}


def allocated(name: str, numel: int) -> list[tuple[str | None, int]]:
    """The papers' chunks are contiguous; a tensor without any keeps the initial coefficient, here None."""
    count = ALLOCATION[name]
    if count == 0:
        return [(None, 0)] * numel
    return [(name, next(i for i in range(count) if e < (i + 1) * numel // count)) for e in range(numel)]


def hashed(name: str, numel: int, parts: int = 5, seed: int = 0) -> list[tuple[str, int]]:
    """splitmix64 of the flat index, started at a hash of seed and name; in plain integers."""
    start = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "little")
    found = []
    for index in range(numel):
        z = (start + (index + 1) * 0x9E3779B97F4A7C15) % 2**64
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
        found.append((name, ((z ^ (z >> 31)) >> 32) * min(parts, numel) >> 32))
    return found


def rows_and_columns(name: str, numel: int) -> list[list[tuple[str, int]]]:
    """Of element (i, j): the coefficient of row i and that of column j; an element's own in a vector."""
    shape = SHAPES[name]
    if len(shape) < 2:
        return [[(name, e)] for e in range(numel)]
    columns = math.prod(shape[1:])
    return [[(f"{name}/rows", e // columns), (f"{name}/columns", e % columns)] for e in range(numel)]


# of each element of a flattened tensor: the group it belongs to, and its place there; a list of those that are added
GROUP_OF: dict[str, Callable[[str, int], list]] = {
    "TaskWise": lambda name, numel: [("model", 0)] * numel,
    "BlockWise": lambda name, numel: [(BLOCKS[name], 0)] * numel,
    "LayerWise": lambda name, numel: [(name, 0)] * numel,
    "ChunkWise": two_chunks,
    "ImportanceChunkWise": allocated,
    "RandomPartition": hashed,
    "RowColumnWise": rows_and_columns,
    "ElementWise": lambda name, numel: [(name, e) for e in range(numel)],
    "ComponentWise": lambda name, numel: [
        (name, e) for e in range(numel)
    ],  # of a vector; of a matrix see ``components``
}


def ties(taus: dict[str, Tensor], keep: float = 0.2) -> dict[str, Tensor]:
    """TIES with a disjoint sum on one long vector per expert."""
    long = torch.cat(list(taus.values()), dim=1)
    size = long.shape[1]
    rank = max(size - math.floor(keep * size), 1)
    thresholds = torch.stack([torch.kthvalue(row.abs(), rank).values for row in long])
    trimmed = torch.where(long.abs() >= thresholds[:, None], long, 0.0)
    elected = torch.sign(trimmed.sum(dim=0))
    elected = torch.where(elected == 0, torch.sign(elected.sum()), elected)
    kept = torch.where(torch.sign(trimmed) == elected, trimmed, 0.0)
    return dict(zip(taus, kept.split([tau.shape[1] for tau in taus.values()], dim=1), strict=True))


def magnitude(taus: dict[str, Tensor], keep: float = 0.2) -> dict[str, Tensor]:
    """The floor(keep n) largest entries of each matrix of each expert; here no two are equal."""
    found = {}
    for name, tau in taus.items():
        found[name] = tau
        if len(SHAPES[name]) == 2:
            places = tau.abs().topk(math.floor(keep * tau.shape[1]), dim=1).indices
            found[name] = torch.zeros_like(tau).scatter(1, places, tau.gather(1, places))
    return found


def dare(taus: dict[str, Tensor], drop: float = 0.5, seed: int = 3) -> dict[str, Tensor]:
    """Entries whose hash lies in the first ``drop`` of all 64-bit numbers vanish, the others are divided by ``1 - drop``."""
    found = {}
    for name, tau in taus.items():
        kept = torch.ones_like(tau)
        for expert, row in zip(EXPERTS, kept, strict=True):
            start = int.from_bytes(hashlib.sha256(repr((seed, expert, name)).encode()).digest()[:8], "little")
            for index in range(len(row)):
                z = (start + index * 0x9E3779B97F4A7C15) % 2**64
                for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
                    repeated = (2**64 - 2 ** (64 - shift)) * (z >> 63)  # the sign, shifted in
                    z = ((z ^ (z >> shift) ^ repeated) * factor) % 2**64
                row[index] = (z + 2**63) % 2**64 >= drop * 2**64
        found[name] = tau * kept / (1 - drop)
    return found


SCALES = {"first": -1.0, "third": 0.5}
SUMS = {"third": {"first": -1.0, "second": 1.0, "third": 1.0}, "new": {"second": 0.5}, "first": {"third": 2.0}}


def times(rows: list[list[float]]) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda taus: {name: torch.tensor(rows, dtype=torch.float64) @ tau for name, tau in taus.items()}


TRANSFORMED: dict[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {
    "None": lambda taus: taus,
    "Ties": ties,
    "Magnitude": magnitude,
    "Dare": dare,
    "RootSumSquare": lambda taus: {n: (t * t).sum(dim=0, keepdim=True) ** 0.5 for n, t in taus.items()},
    "DisjointMean": lambda taus: {n: t / (t != 0).sum(dim=0).clamp(min=1) for n, t in taus.items()},
    "Scale": times([[-1, 0, 0], [0, 1, 0], [0, 0, 0.5]]),
    "Combine": times([[-1, 1, 1], [0, 0.5, 0], [0, 0, 2]]),
}
# what a part needs to be of any use, where its defaults are not
GIVEN: dict[str, dict] = {"Scale": {"factors": SCALES}, "Combine": {"sums": SUMS}, "Dare": {"drop": 0.5, "seed": 3}}


FREE = adamerge.parametrizations.constraints.Free()


def constrained(kind: type) -> bool:
    """Whether a parametrization takes a constraint; what has none is free."""
    return "constraint" in inspect.signature(kind).parameters


def made(kind: type, vectors: TaskVectors, **arguments: object) -> Parametrization:
    if kind.__name__ == "ImportanceChunkWise":
        arguments["allocation"] = {name: ALLOCATION[name] for name in vectors}
    if isinstance(arguments.get("constraint"), adamerge.parametrizations.constraints.Softmax):
        arguments["init"] = None  # it starts nowhere else
    if not constrained(kind):
        assert isinstance(arguments.pop("constraint", FREE), type(FREE))
    return kind(vectors, **{"init": 0.3, **arguments})


def frozen(kind: type) -> set[str]:
    """Tensors that a parametrization leaves at the initial coefficient."""
    return {name for name in SHAPES if formula(GROUP_OF, kind)(name, 1)[0][0] is None}


def vectors_of(
    files: dict, transform: type | None, kind: type, experts: dict[str, str] | None = None, **more: object
) -> TaskVectors:
    """The task vectors of a kind of parametrization: components of what the transform gives, where it needs such."""
    experts = experts or files["experts"]
    plain = TaskVectors(files["base"], experts, transforms_of(transform), **more)
    if named(kind) not in OF_COMPONENTS:
        return plain
    told = "-".join([named(transform), *experts, *map(str, more.values())])
    return with_components(Path(files["base"]).with_name(f"{told}.safetensors"), plain)


def components(vectors: TaskVectors, name: str) -> Tensor | None:
    """``u_kj v_kj^T``, ``(experts, n, numel)`` in float64, from the factors that experts are; None of what is no matrix."""
    if len(SHAPES[name]) < 2:
        return None
    rows = SHAPES[name][0]
    factors = torch.stack([vectors.components[f"{expert}/factors/{name}"] for expert in vectors.experts]).double()
    return torch.einsum("kin,kjn->knij", factors[:, :rows], factors[:, rows:]).flatten(2)


# a loss that needs no network ----------------------------------------------------------------------------------------


class Probe(Backbone):
    """``loss(x) = x * sum_e (a[e] theta[e] + theta[e]^2 / 2)``: its gradient is known and touches every element."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(5)
        self.network = nn.Module()
        self.names = {f"p{i}": name for i, name in enumerate(SHAPES)}
        self.slopes = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
        for key, name in self.names.items():
            self.network.register_parameter(key, nn.Parameter(torch.zeros(SHAPES[name])))
        self.heads = {}

    def tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self.network, key) for key, name in self.names.items()}

    def build_heads(self, tasks: object, experts: object) -> None:
        raise AssertionError("no heads here")

    def layout(self) -> Layout:
        return Layout()

    def preprocess(self, sample: Tensor) -> Tensor:
        return sample

    def encode(self, inputs: Tensor, hidden: object = ()) -> Encoded:
        return Encoded(inputs * sum((self.slopes[name] * t + t * t / 2).sum() for name, t in self.tensors().items()))


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, object]:
    """A base and three experts of three dtypes, as files."""
    root = tmp_path_factory.mktemp("contract")
    generator = torch.Generator().manual_seed(0)

    def write(name: str, weights: dict[str, Tensor], dtype: torch.dtype) -> str:
        save_file({key: value.to(dtype).contiguous() for key, value in weights.items()}, root / f"{name}.safetensors")
        return str(root / f"{name}.safetensors")

    base = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    experts = {
        task: write(task, {n: v + 0.5 * torch.randn(v.shape, generator=generator) for n, v in base.items()}, dtype)
        for task, dtype in EXPERTS.items()
    }
    return {"base": write("base", base, torch.float32), "experts": experts}


def transforms_of(kind: type | None) -> list[Transform]:
    return [] if kind is None else [kind(**GIVEN.get(kind.__name__, {}))]


def stored(path: str) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return {name: value.double() for name, value in load_file(path).items()}


def taus_of(files: dict, experts: list[str] | None = None) -> dict[str, Tensor]:
    """``(experts, numel)`` in float64; an fp32 subtraction first, since thresholds are of fp32 magnitudes."""
    base = stored(files["base"])
    models = [stored(files["experts"][task]) for task in experts or files["experts"]]
    return {
        name: torch.stack([(model[name] - base[name]).float().double().reshape(-1) for model in models])
        for name in sorted(base)
    }


def random_values(parametrization: Parametrization, low: float = -0.4, high: float = 1.4) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(9)
    values = {
        group: low + (high - low) * torch.rand(value.shape, generator=generator)
        for group, value in parametrization.values().items()
    }
    for value in values.values():
        if len(value) == 1:
            continue
        value[0, 0], value[1, 0] = low, (low + high) / 2  # one outside [0, 1] and one inside, in each group
    return values


def named(kind: type | None) -> str:
    return "None" if kind is None else kind.__name__


def sweep(quick: bool) -> list:
    """Every combination; of the transforms beyond TIES, which constraints cannot see, those with two constraints.

    Args:
        quick: whether all are; those of transforms are slow tests otherwise.
    """
    found = []
    for transform in (None, *TRANSFORMS):
        two = {"Free"} if named(transform) == "RootSumSquare" else {"Free", "Softmax"}  # one expert's share is always 1
        few = two if named(transform) not in {"None", "Ties"} else {named(kind) for kind in CONSTRAINTS}
        for kind, constraint in itertools.product(PARAMETRIZATIONS, CONSTRAINTS):
            if named(constraint) in few and (constrained(kind) or named(constraint) == "Free"):
                parts = (transform, kind, constraint)
                marks = [] if quick or transform is None else [pytest.mark.slow]
                found.append(pytest.param(*parts, id="-".join(map(named, parts)), marks=marks))
    return found


def pairs(constraints: list[type]) -> list:
    """Every parametrization with every of these constraints that it takes."""
    both = itertools.product(PARAMETRIZATIONS, constraints)
    return [
        pytest.param(kind, own, id=f"{named(kind)}-{named(own)}")
        for kind, own in both
        if constrained(kind) or named(own) == "Free"
    ]


def over_all(test: Callable, quick: bool = True) -> Callable:
    return pytest.mark.parametrize(("transform", "kind", "constraint"), sweep(quick))(test)


over_all_slowly = functools.partial(over_all, quick=False)
"""For tests that ask nothing of a transform but that its vectors are constant."""


def formula(table: dict, kind: type | None) -> Callable:
    if named(kind) not in table:
        pytest.fail(f"{named(kind)} is new: write its formula, in float64, into this file")
    return table[named(kind)]


def theta(files: dict, transform: type | None, kind: type, constraint: type, values: dict[str, Tensor]) -> dict:
    """theta0 + sum_k phi(w[k, g(e)]) tau'_k[e], element by element in float64."""
    phi, group_of = formula(PHI, constraint), formula(GROUP_OF, kind)
    coefficients: dict = {group: phi(value) for group, value in values.items()}
    found = {}
    for name, tau in formula(TRANSFORMED, transform)(taus_of(files)).items():
        still = 1 / len(tau) if constraint.__name__ == "Softmax" else 0.3
        coefficients[None] = torch.full((len(tau), 1), still, dtype=torch.float64)
        added = [own if isinstance(own, list) else [own] for own in group_of(name, tau.shape[1])]
        own = components(vectors_of(files, transform, kind), name) if named(kind) in OF_COMPONENTS else None
        if own is None:
            columns = [sum(coefficients[group][:, at] for group, at in own) for own in added]
            update = (torch.stack(columns, dim=1) * tau).sum(dim=0)
        else:
            update = torch.einsum("kn,kne->e", coefficients[name], own)
        found[name] = stored(files["base"])[name] + update.view(SHAPES[name])
    return found


def test_the_sweep_finds_the_parts_that_there_are():
    assert {named(kind) for kind in TRANSFORMS} >= {"Ties"}
    assert {named(kind) for kind in PARAMETRIZATIONS} >= {"TaskWise", "BlockWise", "LayerWise", "ChunkWise"}
    assert {named(kind) for kind in CONSTRAINTS} >= {"Free", "Clamp", "Projection", "Sigmoid", "Softmax"}
    assert {named(kind) for kind in OBJECTIVES} >= {"Entropy"}


# of the logits x of one tensor, times what is inside
AROUND: dict[str, Callable[[Tensor], Tensor]] = {
    "Frozen": torch.ones_like,
    "Concrete": lambda x: (1 / (1 + torch.exp(-x))) / (1 / (1 + torch.exp(-x))).mean(),
    "RankMask": lambda x: (1 / (1 + torch.exp(-x / 10)) > 0.5).double(),  # of components
}


@pytest.mark.parametrize("wrapper", [kind for kind in WRAPPERS if named(kind) not in OF_COMPONENTS], ids=named)
@pytest.mark.parametrize(("kind", "constraint"), pairs(CONSTRAINTS))
def test_what_wraps_a_parametrization_multiplies_its_update(files, wrapper, kind, constraint):
    vectors = vectors_of(files, None, kind)
    around = formula(AROUND, wrapper)
    inside = functools.partial(made, kind, constraint=constraint(), init=0.3)
    wrapped = wrapper(vectors, inside, **({"mask": ExpectedMask()} if wrapper.__name__ == "Concrete" else {}))
    wrapped.load_values(random_values(wrapped))
    generator = torch.Generator().manual_seed(2)
    wrapped.load_masks({n: torch.randn(x.shape, generator=generator) for n, x in wrapped.masks().items()})
    expected = theta(files, None, kind, constraint, {g: value.double() for g, value in wrapped.values().items()})
    with torch.no_grad():
        for name in vectors:
            factor = around(wrapped.masks().get(name, torch.zeros(SHAPES[name])).double())
            update = (expected[name] - stored(files["base"])[name]) * factor
            assert (wrapped(name, vectors[name]).double() - update).abs().max() < 2e-6


@pytest.mark.parametrize("wrapper", [kind for kind in WRAPPERS if named(kind) in OF_COMPONENTS], ids=named)
@pytest.mark.parametrize("kind", [TaskWise, BlockWise, LayerWise], ids=named)
def test_what_chooses_components_leaves_the_others_out(files, wrapper, kind):
    vectors, around = vectors_of(files, None, wrapper), formula(AROUND, wrapper)
    wrapped = wrapper(vectors, functools.partial(made, kind))
    wrapped.load_values(random_values(wrapped))
    generator = torch.Generator().manual_seed(2)
    wrapped.load_masks({n: torch.randn(x.shape, generator=generator) for n, x in wrapped.masks().items()})
    inside = theta(files, None, kind, type(FREE), {g: value.double() for g, value in wrapped.values().items()})
    with torch.no_grad():
        for name in vectors:
            own = components(vectors, name)
            if own is None:
                update = inside[name] - stored(files["base"])[name]
            else:
                group, at = formula(GROUP_OF, kind)(name, 1)[0]
                factor = wrapped.values()[group][:, at : at + 1].double() * around(wrapped.masks()[name].double())
                update = torch.einsum("kn,kne->e", factor, own).view(SHAPES[name])
            assert (wrapped(name, vectors[name]).double() - update).abs().max() < 2e-6


@over_all
@pytest.mark.parametrize("storage", [Resident(), Disk()], ids=["resident", "streamed"])
def test_merge_and_gradient_are_those_of_the_formula(files, transform, kind, constraint, storage):
    vectors = vectors_of(files, transform, kind)
    parametrization = made(kind, vectors, constraint=constraint(), init=0.3)
    parametrization.load_values(random_values(parametrization))
    assert {p.dtype for p in parametrization.parameters()} == {torch.float32}
    backbone = Probe()
    merged = MergedModel(backbone, vectors, parametrization, storage)
    merged.merge()

    values = {group: value.double().requires_grad_(True) for group, value in parametrization.values().items()}
    expected = theta(files, transform, kind, constraint, values)
    for name, tensor in backbone.tensors().items():
        assert (tensor.detach().double() - expected[name].detach()).abs().max() < 1e-6

    loss = merged(torch.tensor([1.5, -0.25])).features.sum()
    loss.backward()
    scalar = merged.pull_back(loss.detach())
    assert float(scalar.detach()) == float(loss.detach())
    scalar.backward()

    (1.25 * sum((backbone.slopes[n].double() * t + t * t / 2).sum() for n, t in expected.items())).backward()
    with torch.no_grad():  # the gradient takes the shape of the values, by whatever columns a group has
        for parameter in parametrization.parameters():
            parameter.copy_(parameter.grad.clone())
    found = parametrization.values()
    largest = max(float(value.grad.abs().max()) for value in values.values())
    assert largest > 1e-2
    for group, value in values.items():
        assert (found[group].double() - value.grad).abs().max() <= 1e-6 * largest, group
    if constraint.__name__ == "Clamp":
        outside = torch.cat([((v < 0) | (v > 1)).flatten() for v in values.values()])
        flat = torch.cat([v.flatten() for v in found.values()])
        assert outside.any() and not flat[outside].any() and flat[~outside].any()


@over_all_slowly
def test_gradient_agrees_with_finite_differences_in_float64(files, transform, kind, constraint):
    vectors = vectors_of(files, transform, kind)
    # 0.37: away from the bounds, where a clamp has no derivative
    parametrization = made(kind, vectors, init=0.37, constraint=constraint()).double()
    slopes = {name: torch.randn(SHAPES[name], dtype=torch.float64) for name in vectors}
    parameters = list(parametrization.parameters())

    def loss() -> Tensor:
        updates = {name: parametrization(name, vectors[name]) for name in vectors}
        return sum((slopes[name] * update + update**2).sum() for name, update in updates.items())

    gradients = torch.autograd.grad(loss(), parameters)
    assert max(float(gradient.abs().max()) for gradient in gradients) > 1e-2
    for parameter, gradient in zip(parameters, gradients, strict=True):
        for index in range(0, parameter.numel(), max(1, parameter.numel() // 7)):
            flat = parameter.data.view(-1)
            before, step = float(flat[index]), 1e-5
            with torch.no_grad():
                flat[index] = before + step
                up = float(loss())
                flat[index] = before - step
                down = float(loss())
                flat[index] = before
            slope = (up - down) / (2 * step)
            assert abs(slope - float(gradient.view(-1)[index])) <= 1e-7 * max(1.0, float(gradient.abs().max()))


@over_all
def test_every_part_starts_where_it_says(files, transform, kind, constraint):
    vectors = vectors_of(files, transform, kind)
    for init in (0.25, None):
        parametrization = made(kind, vectors, init=init, constraint=constraint())
        for group, value in parametrization.coefficients().items():
            assert torch.allclose(value, torch.zeros_like(value) + parametrization.begun(group), atol=1e-6), group
        wanted = 1 / len(vectors.experts) if init is None or constraint.__name__ == "Softmax" else init
        assert parametrization.initial == pytest.approx(wanted)
        for mean, spread in parametrization.moments(parametrization.coefficients()).values():
            assert torch.allclose(mean, torch.full_like(mean, wanted)) and torch.allclose(spread, 0 * spread, atol=1e-6)


@over_all
def test_merging_is_deterministic_and_of_the_tensors_shape_in_fp32(files, transform, kind, constraint):
    vectors = vectors_of(files, transform, kind)
    parametrization = made(kind, vectors, constraint=constraint(), init=0.3)
    parametrization.load_values(random_values(parametrization))
    with torch.no_grad():
        for name in vectors:
            update = parametrization(name, vectors[name])
            assert update.shape == SHAPES[name] and update.dtype == torch.float32 and torch.isfinite(update).all()
            assert torch.equal(update, parametrization(name, vectors[name]))


@pytest.mark.parametrize("transform", [None, *TRANSFORMS], ids=named)
@pytest.mark.parametrize("kind", PARAMETRIZATIONS, ids=named)
def test_update_is_linear_in_the_coefficients(files, transform, kind):
    vectors = vectors_of(files, transform, kind)
    parametrization = made(kind, vectors)

    def updates(values: dict[str, Tensor]) -> dict[str, Tensor]:
        parametrization.load_values(values)
        with torch.no_grad():
            return {name: parametrization(name, vectors[name]).double() for name in vectors}

    one, two = random_values(parametrization), random_values(parametrization, -1.0, 0.3)
    both = updates({group: 2 * one[group] - 3 * two[group] for group in one})
    first, second = updates(one), updates(two)
    for name in set(vectors) - frozen(kind):
        assert (both[name] - (2 * first[name] - 3 * second[name])).abs().max() < 2e-6 * 5


@pytest.mark.parametrize("transform", [None, *TRANSFORMS], ids=named)
@pytest.mark.parametrize(("kind", "constraint"), pairs(REACHES_ANYTHING))
@pytest.mark.parametrize(
    "storage", [Resident(), pytest.param(Disk(), marks=pytest.mark.slow)], ids=["resident", "streamed"]
)
def test_zero_gives_the_base_bit_for_bit_and_one_gives_the_expert(files, transform, kind, constraint, storage):
    vectors = vectors_of(files, transform, kind)
    parametrization = made(kind, vectors, constraint=constraint(), init=0.3)
    values = parametrization.values()
    backbone = Probe()
    merged = MergedModel(backbone, vectors, parametrization, storage)
    parametrization.load_values({group: torch.zeros_like(value) for group, value in values.items()})
    merged.merge()
    base = stored(files["base"])
    learned = {n: t for n, t in backbone.tensors().items() if n not in frozen(kind)}
    for name, tensor in learned.items():
        assert torch.equal(tensor.detach().view(torch.int32), base[name].float().view(torch.int32))
    kept = formula(TRANSFORMED, transform)(taus_of(files))
    whole = made(kind, vectors, constraint=constraint(), init=1.0).values()
    for index in range(len(vectors.experts)):
        one = {group: torch.zeros_like(value) for group, value in values.items()}
        for group, value in one.items():
            value[index] = whole[group][index]
        parametrization.load_values(one)
        merged.merge()
        for name, tensor in learned.items():
            expert = base[name] + kept[name][index].view(SHAPES[name])
            scale = torch.maximum(base[name].abs(), expert.abs()).float()
            if transform is not None and transform.__name__ == "Combine":
                scale = scale + taus_of(files)[name].abs().sum(dim=0).view(SHAPES[name]).float()  # they may cancel
            ulp = torch.nextafter(scale, torch.tensor(math.inf)) - scale
            if named(kind) in OF_COMPONENTS:  # as a sum of products, after the roundings of a decomposition
                ulp = ulp + 32 * UNIT * kept[name][index].norm().float()
            assert ((tensor.detach().double() - expert).abs() <= ulp).all(), name


@over_all
def test_the_order_of_experts_changes_nothing(files, transform, kind, constraint):
    shuffled = ["third", "first", "second"]
    there = [list(files["experts"]).index(task) for task in shuffled]
    plain = vectors_of(files, transform, kind)
    other = vectors_of(files, transform, kind, {t: files["experts"][t] for t in shuffled})
    if transform is not None and transform.__name__ == "Combine":
        assert plain.experts == other.experts == tuple(SUMS)
        there = [0, 1, 2]
    elif transform is not None and transform.__name__ == "RootSumSquare":
        there = [0]
    else:
        assert plain.experts != other.experts
    one, two = made(kind, plain, constraint=constraint()), made(kind, other, constraint=constraint())
    values = random_values(one)
    one.load_values(values)
    two.load_values({group: value[there] for group, value in values.items()})
    with torch.no_grad():
        for name in plain:
            assert torch.allclose(one(name, plain[name]), two(name, other[name]), rtol=1e-6, atol=1e-6)


@over_all
def test_coefficient_file_keeps_everything(files, transform, kind, constraint, tmp_path):
    vectors = vectors_of(files, transform, kind, exclude=["single"])
    parametrization = made(kind, vectors, init=0.4, constraint=constraint())
    parametrization.load_values(random_values(parametrization))
    protocol = {"calibration_split": "none", "numbers": [1, 2.5, None, True]}
    layout = Layout("w.safetensors", {"a.json": "{}"})
    first, second, third = (tmp_path / f"{number}.safetensors" for number in range(3))
    save_coefficients(
        Coefficients(vectors, parametrization, layout, dtype=torch.bfloat16, step=17, protocol=protocol), first
    )
    save_coefficients(
        Coefficients(vectors, parametrization, layout, dtype=torch.bfloat16, step=17, protocol=protocol), second
    )
    assert first.read_bytes() == second.read_bytes()
    # the file decides the order of experts, whatever order they are pointed to in
    moved = dict(reversed(files["experts"].items()))
    loaded = load_coefficients(first, experts=moved)
    save_coefficients(loaded, third)
    assert first.read_bytes() == third.read_bytes()
    assert (loaded.layout, loaded.dtype, loaded.step, loaded.protocol) == (layout, torch.bfloat16, 17, protocol)
    assert loaded.task_vectors.experts == vectors.experts and list(loaded.task_vectors) == list(vectors)
    assert describe(loaded.parametrization) == describe(parametrization)
    with torch.no_grad():
        for name in vectors:
            ours, theirs = parametrization(name, vectors[name]), loaded.parametrization(name, loaded.task_vectors[name])
            assert torch.equal(ours, theirs)


# parts by themselves ------------------------------------------------------------------------------------------------

OTHER_ARGUMENTS = {
    "Ties": {"keep": 0.45}, "Clamp": {"low": -0.5, "high": 1.5}, "Projection": {"low": -0.25, "high": 0.75},
    "TaskWise": {"init": 0.11}, "BlockWise": {"init": 0.12}, "LayerWise": {"init": None},
    "LogitAlignment": {"temperature": 2.0}, "HiddenAlignment": {"layers": [1, -1]},
    "SummedHiddenAlignment": {"layers": [0.5]}, "NormalisedHiddenAlignment": {"layers": 3},
    "WeightedByConfidence": {"objective": adamerge.objectives.LogitAlignment(), "power": 0.5, "threshold": 0.25},
    "WhereAgreed": {"objective": adamerge.objectives.LogitAlignment()},
    "Sum": {"parts": [adamerge.objectives.Entropy()], "factors": [0.5]}, "MarginalEntropy": {"normalise": True},
    "ChunkWise": {"init": 0.13, "chunks": 5}, "Entropy": {"normalise": True}, "Magnitude": {"keep": 0.5},
    "RandomPartition": {"init": 0.14, "parts": 7, "seed": 3}, "RowColumnWise": {"init": 0.16},
    "ElementWise": {"init": 0.17}, "ComponentWise": {"init": 0.18}, "RootSumSquare": {"name": "all"}, **GIVEN,
    "ImportanceChunkWise": {
        "init": 0.15, "budget": 1.5, "kappa": 0.5, "importance": {name: 1.0 + i for i, name in enumerate(SHAPES)},
    },
    "DistanceToInitial": {"weight": 0.5, "power": 2.0}, "SummedDistanceToInitial": {"weight": 0.25, "power": 1.5},
    "CoefficientNorm": {"weight": 0.25, "order": 2.0},
    "PseudoLabel": {
        "weak": adamerge.objectives.FlipAndShift(), "strong": adamerge.objectives.RandomOperations(), "temperature": 0.7,
        "trust": adamerge.objectives.SurestOfPredicted(), "threshold": 0.8, "share": 0.5, "limit": 7, "part": 0.5, "seed": 3,
    },
    "SoftMask": {"seed": 3, "draw": 4}, "BinaryMask": {"seed": 5}, "HardMask": {"threshold": 0.25},
}  # fmt: skip


@pytest.mark.parametrize(
    "kind", [*TRANSFORMS, *CONSTRAINTS, *PARAMETRIZATIONS, *MASKS, *OBJECTIVES, *PENALTIES], ids=named
)
def test_constructor_arguments_are_attributes_and_describe_builds_them_again(files, kind):
    vectors = vectors_of(files, None, kind)
    names = [name for name in inspect.signature(kind).parameters if name != "task_vectors"]
    given = OTHER_ARGUMENTS.get(kind.__name__, {})
    assert set(given) <= set(names) and (given or set(names) <= {"constraint"}), "give it arguments in OTHER_ARGUMENTS"
    build_it = functools.partial(kind, vectors) if issubclass(kind, Parametrization) else kind
    if "constraint" in names:
        given = {**given, "constraint": adamerge.parametrizations.constraints.Projection(-0.5, 2.0)}
    part = build_it(**given)
    for name in names:
        assert hasattr(part, name), f"{kind.__name__}.{name} is needed to write the recipe"
    for name, value in given.items():
        assert getattr(part, name) == value
    spec = json.loads(json.dumps(describe(part)))
    found, plain = getattr(importlib.import_module(spec["class_path"].rpartition(".")[0]), kind.__name__), set(names)
    assert found is kind and spec["init_args"].keys() == plain
    if kind in {*OBJECTIVES, *PENALTIES}:
        return  # no part of a recipe: a coefficient file may not name it
    again = build_factory(spec, Parametrization)(vectors) if issubclass(kind, Parametrization) else build(spec, kind)
    assert type(again) is kind and json.loads(json.dumps(describe(again))) == spec


def test_one_chunk_is_layer_wise_bit_for_bit(files):
    vectors = TaskVectors(**files)
    chunked, whole = ChunkWise(vectors, chunks=1), LayerWise(vectors)
    values = random_values(whole)
    chunked.load_values(values)
    whole.load_values(values)
    for name in vectors:
        one, two = chunked(name, vectors[name]), whole(name, vectors[name])
        assert torch.equal(one, two)
        slope = torch.randn(one.shape)
        ours = torch.autograd.grad(one, chunked.w, slope)[0]
        assert torch.equal(ours, torch.autograd.grad(two, whole.w, slope)[0]) and ours.any()


# objectives ---------------------------------------------------------------------------------------------------------

QUARTER = [math.log(0.5), math.log(0.25), math.log(0.25)]


class Hand(NamedTuple):
    """Two samples of three classes, each sample's loss worked out by hand, and the formula in float64."""

    expected: list[float]
    formula: Callable[[Tensor], Tensor]
    arguments: dict = {}
    labels: Tensor | None = None
    teacher: Teacher | None = None
    hidden: tuple[Tensor, ...] = ()
    targets: Tensor | None = None
    marginal: Tensor | None = None
    agreed: Tensor | None = None


def entropies(z: Tensor) -> Tensor:
    p = z.softmax(dim=-1)
    return -(p * p.log()).sum(dim=-1)


def divergences(z: Tensor, temperature: float = 1.0) -> Tensor:
    p = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64) ** (1 / temperature)
    p = p / p.sum()
    return temperature**2 * (p * (p.log() - (z / temperature).log_softmax(dim=-1))).sum(dim=-1)


LOGITS = [[0.0, 0.0, 0.0], QUARTER]  # of the merged model, in every case
TAUGHT = Teacher(torch.tensor([QUARTER, QUARTER]))
SURE = torch.tensor([[1.0, 0.0, 0.0], [0.95, 0.05, 0.0]])  # more than 0.9, so that both samples count
EVEN = torch.tensor([5 / 12, 7 / 24, 7 / 24])  # the mean of both predictions
STATES = torch.tensor([[[1.0, 2.0]], [[0.0, -4.0]]], requires_grad=True)
HAND = {
    "Entropy": Hand([math.log(3), 1.5 * math.log(2)], entropies),
    "CrossEntropy": Hand(
        [math.log(3), math.log(2)], lambda z: -z.log_softmax(dim=-1)[[0, 1], [2, 0]], labels=torch.tensor([2, 0])
    ),
    "LogitAlignment": Hand([math.log(3) - 1.5 * math.log(2), 0.0], divergences, teacher=TAUGHT),
    "HiddenAlignment": Hand(
        [2.5, 8.0], lambda z: torch.tensor([2.5, 8.0]) + 0 * z.sum(), {"layers": [1]}, None,
        Teacher(torch.zeros(2, 3), hidden=(torch.zeros(2, 1, 2),)), (STATES,),
    ),
    "SummedHiddenAlignment": Hand(
        [5.0, 16.0], lambda z: torch.tensor([5.0, 16.0]) + 0 * z.sum(), {"layers": [0.5]}, None,
        Teacher(torch.zeros(2, 3), hidden=(torch.zeros(2, 1, 2),)), (STATES,),
    ),
    # the expert's states 3, -1 have mean 1 and variance 4: (2^2 + 3^2) / 2 / 4 and (3^2 + 3^2) / 2 / 4
    "NormalisedHiddenAlignment": Hand(
        [6.5 / 4, 9 / 4], lambda z: torch.tensor([6.5 / 4, 9 / 4]) + 0 * z.sum(), {"layers": 1}, None,
        Teacher(torch.zeros(2, 3), hidden=(torch.tensor([[[3.0, -1.0]], [[3.0, -1.0]]]),)), (STATES,),
    ),
    "ExpertLabels": Hand([math.log(3), math.log(2)], lambda z: -z.log_softmax(dim=-1)[:, 0], teacher=TAUGHT),
    "WeightedByConfidence": Hand(
        [math.log(3), 1.5 * math.log(2)], entropies,
        {"objective": adamerge.objectives.Entropy(), "power": 0.0, "threshold": 0.49}, teacher=TAUGHT,
    ),
    "WhereAgreed": Hand(
        [math.log(3), 1.5 * math.log(2)], entropies, {"objective": adamerge.objectives.Entropy()}, teacher=TAUGHT,
        agreed=torch.tensor([True, True]),
    ),
    "MarginalEntropy": Hand(
        [(math.log(5 / 12) + 2 * math.log(7 / 24)) / 3, (math.log(5 / 12) + math.log(7 / 24)) / 2],
        lambda z: z.softmax(dim=-1) @ torch.tensor([5 / 12, 7 / 24, 7 / 24], dtype=torch.float64).log(), marginal=EVEN,
    ),
    "PseudoLabel": Hand(
        [math.log(3), 1.05 * math.log(2)], lambda z: -(SURE.double() * z.log_softmax(dim=-1)).sum(dim=-1), targets=SURE
    ),
    "Sum": Hand(
        [2.5 * math.log(3) - 0.75 * math.log(2), 3 * math.log(2)],
        lambda z: 2 * entropies(z) + 0.5 * divergences(z),
        {"parts": [adamerge.objectives.Entropy(), adamerge.objectives.LogitAlignment()], "factors": [2.0, 0.5]},
        teacher=TAUGHT,
    ),
}  # fmt: skip


class Untouchable:
    """Labels that may not be looked at."""

    def __getattribute__(self, name: str) -> object:
        raise AssertionError(f"labels were used: {name}")

    def __getitem__(self, index: object) -> object:
        raise AssertionError("labels were indexed")


@pytest.mark.parametrize("kind", OBJECTIVES, ids=named)
def test_objective_is_the_hand_computed_number_without_labels(kind):
    if kind.__name__ not in HAND:
        pytest.fail(f"{kind.__name__} is new: work out two samples by hand, for HAND")
    case = HAND[kind.__name__]
    objective = kind(**case.arguments)
    tensor = torch.tensor(LOGITS, requires_grad=True)
    output = Output(tensor, Encoded(torch.zeros(2, 4), case.hidden))
    batch = Batch(
        torch.zeros(2, 3), case.labels, case.teacher, targets=case.targets, marginal=case.marginal, agreed=case.agreed
    )
    losses = objective(output, batch)
    assert losses.shape == (2,) and losses.dtype == torch.float32
    assert losses.tolist() == pytest.approx(case.expected, rel=1e-6, abs=1e-7)
    assert objective.weight(batch).tolist() == [1.0, 1.0]
    assert (objective.labelled, objective.taught) == (case.labels is not None, case.teacher is not None)
    if not kind.labelled:
        unseen = batch._replace(labels=Untouchable())
        assert torch.equal(objective(output, unseen), losses)
    logits64 = tensor.detach().double().requires_grad_(True)
    reference = torch.autograd.grad(case.formula(logits64).sum(), logits64)[0]
    (found,) = torch.autograd.grad(losses.sum(), tensor, allow_unused=True)
    assert torch.allclose((torch.zeros_like(tensor) if found is None else found).double(), reference, atol=1e-6)


# labels ---------------------------------------------------------------------------------------------------------------

NAMES = {"colours": ["red", "green", "blue"], "shapes": ["circle", "square", "star", "line"]}


def fitted(pool: dict, folders: dict, optimizer: type) -> Tensor:
    """Coefficients after three steps of a real trainer."""
    from lightning import Trainer
    from modules import descending

    from adamerge import ImageCalibration, ImageTask
    from adamerge.backbones import OpenClipClassifier
    from adamerge.objectives import Entropy

    tasks = {t: ImageTask(f, ["a picture of {}"], classnames=NAMES[t]) for t, f in folders.items()}
    data = ImageCalibration(tasks=tasks, batch_size=3, calibration_fraction=0.3)
    module = descending(
        OpenClipClassifier(pool["base"]), TaskVectors(**pool), LayerWise, Entropy(), lr=0.05, optimizer=optimizer
    )
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    Trainer(max_steps=3, accelerator="cpu", limit_val_batches=0, use_distributed_sampler=False, **quiet).fit(
        module, data
    )
    assert module.global_step == 3
    return module.merged.parametrization.w.detach().clone()


@pytest.fixture(scope="module")
def right(pool, image_folders) -> dict:
    return {optimizer: fitted(pool, image_folders, optimizer) for optimizer in (torch.optim.SGD, torch.optim.Adam)}


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("labels", ["permuted", "random", "removed", "raising"])
@pytest.mark.filterwarnings("ignore")
def test_labels_never_reach_an_unlabelled_objective(pool, image_folders, right, tmp_path, labels, optimizer):
    import datasets

    folders = {}
    for task, folder in image_folders.items():
        splits = datasets.load_from_disk(folder)
        train = splits["train"]
        generator = torch.Generator().manual_seed(1)
        if labels == "permuted":
            wrong = [train["label"][i] for i in torch.randperm(len(train), generator=generator).tolist()]
        elif labels == "random":
            wrong = torch.randint(0, len(NAMES[task]), (len(train),), generator=generator).tolist()
        else:
            wrong = []
        features = train.features["label"]
        kept = train.remove_columns("label")
        if wrong:
            assert wrong != list(train["label"])
            train = kept.add_column("label", wrong).cast_column("label", features)
        elif labels == "removed":
            train = kept
        else:  # bytes that are no image: whoever looks at a label gets an exception
            broken = [{"bytes": b"no image", "path": None}] * len(train)
            train = kept.add_column("label", broken).cast_column("label", datasets.Image())
            with pytest.raises(Exception, match="cannot identify image"):
                train[0]["label"]
        datasets.DatasetDict({"train": train, "test": splits["test"]}).save_to_disk(tmp_path / task)
        folders[task] = str(tmp_path / task)
    found = fitted(pool, folders, optimizer)
    assert torch.equal(found, right[optimizer])
    assert (found - 0.3).abs().max() > (1e-2 if optimizer is torch.optim.Adam else 1e-6)  # something was learned
