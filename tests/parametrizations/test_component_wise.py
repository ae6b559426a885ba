"""Coefficients of components: numbers by hand, three steps from a decomposition in float64, planted ones, threads."""

from __future__ import annotations

import math

import pytest
import torch
from component_files import save_components, with_components
from modules import randomised
from rounding import UNIT, gamma

from adamerge.artifacts.coefficients import Coefficients
from adamerge.artifacts.export import merged_tensors
from adamerge.deltas.low_rank import LowRankDeltas
from adamerge.errors import ConfigError
from adamerge.merging.copies import Place
from adamerge.merging.merged_tensor import merged_tensor, updates
from adamerge.merging.pullback import MergeGradients
from adamerge.parametrizations import ComponentWise, LayerWise
from adamerge.task_vectors.storage import Disk, LowBit, Pinned, Resident
from adamerge.task_vectors.task_vectors import TaskVectors
from adamerge.transforms import Scale, Ties

SHAPES = {"conv": (3, 2, 4), "matrix": (5, 7), "row": (1, 6), "vector": (6,), "number": ()}
TASKS = ("one", "two", "three")
CPU = torch.device("cpu")


def plain(shapes=SHAPES, tasks=TASKS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    base = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    experts = {
        task: {name: own + 0.5 * torch.randn(own.shape, generator=generator) for name, own in base.items()}
        for task in tasks
    }
    return TaskVectors(base, experts)


@pytest.fixture(scope="module")
def vectors(tmp_path_factory):
    return with_components(tmp_path_factory.mktemp("file") / "components.safetensors", plain())


def parts_of(tau, shape):
    """The components ``s u v^T`` of a delta in float64, ``(n, *shape)``, the largest first; of a vector the elements."""
    if len(shape) < 2:
        return torch.diag(tau.double().reshape(-1)).view(-1, *shape)
    matrix = tau.double().reshape(shape[0], -1)
    if len(matrix) > matrix.shape[1]:
        raise AssertionError("of a high matrix the other way round")
    _, left = torch.linalg.eigh(matrix @ matrix.t())  # from the smallest on
    return torch.stack([torch.outer(u, u @ matrix).view(shape) for u in left.flip(1).t()])


def every_part(vectors):
    """``(experts, n, *shape)`` in float64 of every tensor, of what the experts' weights say."""
    raw = TaskVectors(vectors.base, vectors.checkpoints)
    return {name: torch.stack([parts_of(tau, SHAPES[name]) for tau in raw[name].dense()]) for name in vectors}


def test_by_hand(tmp_path):
    """The components of diag(-9, 4) are its two numbers."""
    given = TaskVectors({"w": torch.zeros(2, 2)}, {"one": {"w": torch.tensor([[-9.0, 0.0], [0.0, 4.0]])}})
    vectors = with_components(tmp_path / "c.safetensors", given)
    parametrization = ComponentWise(vectors, init=0.5)
    assert torch.allclose(parametrization("w", vectors["w"]), torch.tensor([[-4.5, 0.0], [0.0, 2.0]]), atol=1e-5)
    parametrization.load_values({"w": torch.tensor([[2.0, -1.0]])})
    update = parametrization("w", vectors["w"])
    assert torch.allclose(update, torch.tensor([[-18.0, 0.0], [0.0, -4.0]]), atol=1e-5)
    update.backward(torch.tensor([[1.0, 7.0], [7.0, 0.5]]))
    assert torch.allclose(parametrization.w[0].grad, torch.tensor([[-9.0, 2.0]]), atol=1e-5)


def test_matrices_have_components_and_vectors_elements(vectors):
    parametrization = ComponentWise(vectors, init=0.25)
    counts = {name: tuple(own.shape) for name, own in parametrization.values().items()}
    assert counts == {"conv": (3, 3), "matrix": (3, 5), "row": (3, 1), "vector": (3, 6), "number": (3, 1)}
    assert len(list(parametrization.parameters())) == len(vectors) and not parametrization.probed
    assert all(bool((own == 0.25).all()) for own in parametrization.values().values())


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_loss_gradient_and_three_steps_in_float64(vectors, optimizer):
    """``L = sum (theta - t)^2 / 2``: so ``G = theta - t`` and ``dL/dw_k[j] = <G, s_kj u_kj v_kj^T>``."""
    lr, parts = 0.05, every_part(vectors)
    parametrization = ComponentWise(vectors)
    values = {group: own.double() for group, own in randomised(parametrization).items()}
    targets = {n: torch.linspace(-1, 1, math.prod(s), dtype=torch.float64).view(s) for n, s in SHAPES.items()}
    search = (torch.optim.SGD if optimizer == "sgd" else torch.optim.Adam)(parametrization.parameters(), lr=lr)
    first, second = ({group: torch.zeros_like(own) for group, own in values.items()} for _ in range(2))
    for step in range(1, 4):
        gradients, places, loss = MergeGradients(list(parametrization.parameters())), {}, 0.0
        for name in vectors:
            update = torch.cat([own for _, own in updates(parametrization, name, vectors[name], gradients=gradients)])
            theta = vectors.base[name] + update.view(SHAPES[name])
            parameter = torch.nn.Parameter(theta)
            parameter.grad = theta - targets[name].float()
            loss += float(parameter.grad.double().square().sum()) / 2
            places[name] = Place(parameter)
        for parameter, gradient in zip(parametrization.parameters(), gradients.gradients(places), strict=True):
            parameter.grad = gradient
        wanted_loss, wanted = 0.0, {}
        for name, own in parts.items():
            slope = vectors.base[name].double() + torch.einsum("kn,kn...->...", values[name], own) - targets[name]
            wanted_loss += float(slope.square().sum()) / 2
            wanted[name] = (own * slope).reshape(*own.shape[:2], -1).sum(dim=2)
        assert loss == pytest.approx(wanted_loss, rel=1e-5)
        # a component is turned by the decomposition's roundings over the distance to the next singular value, here below 30
        largest = max(float(own.abs().max()) for own in wanted.values())
        for group, parameter in zip(values, parametrization.parameters(), strict=True):
            assert (parameter.grad.double() - wanted[group]).abs().max() <= 1e-5 * largest, group
        search.step()
        for group, gradient in wanted.items():
            first[group] = 0.9 * first[group] + 0.1 * gradient
            second[group] = 0.999 * second[group] + 0.001 * gradient.square()
            moved = first[group] / (1 - 0.9**step) / ((second[group] / (1 - 0.999**step)).sqrt() + 1e-8)
            values[group] = values[group] - lr * (gradient if optimizer == "sgd" else moved)
        for group, value in parametrization.values().items():
            assert (value.double() - values[group]).abs().max() < 5e-5, (step, group)


def test_gradient_agrees_with_finite_differences(vectors):
    parametrization = ComponentWise(vectors, init=0.3).double()
    slopes = {name: torch.randn(SHAPES[name], dtype=torch.float64) for name in vectors}

    def loss():
        made = {name: parametrization(name, vectors[name]) for name in vectors}
        return sum((slopes[name] * update + update**2).sum() for name, update in made.items())

    gradients = torch.autograd.grad(loss(), list(parametrization.parameters()))
    for parameter, gradient in zip(parametrization.parameters(), gradients, strict=True):
        for index in range(parameter.numel()):
            flat, found = parameter.data.view(-1), []
            before = float(flat[index])
            for step in (1e-5, -1e-5):
                flat[index] = before + step
                found.append(float(loss().detach()))
            flat[index] = before
            slope = (found[0] - found[1]) / 2e-5
            assert abs(slope - float(gradient.view(-1)[index])) <= 1e-7 * max(1.0, float(gradient.abs().max()))


def test_planted_coefficients_are_recovered(vectors):
    """From the merged weights alone: all experts' components of a tensor are linearly independent here."""
    generator = torch.Generator().manual_seed(4)
    parts = every_part(vectors)
    planted = {n: torch.randn(own.shape[:2], generator=generator, dtype=torch.float64) for n, own in parts.items()}
    names = ("conv", "matrix")  # of the others several experts' elements are the same ones
    goals = {name: torch.einsum("kn,kn...->...", planted[name], parts[name]) for name in names}
    parametrization = ComponentWise(vectors, init=0.0).double()
    search = torch.optim.LBFGS(
        parametrization.parameters(),
        max_iter=300,
        tolerance_grad=1e-12,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def closure():
        search.zero_grad()
        loss = sum((parametrization(name, vectors[name]) - goals[name]).square().sum() for name in names)
        loss.backward()
        return loss

    search.step(closure)
    for name in names:
        assert (parametrization.values()[name] - planted[name]).abs().max() < 2e-4, name


def test_zero_gives_the_base_bit_for_bit(vectors):
    parametrization = ComponentWise(vectors, init=0.0)
    for name in vectors:
        update = parametrization(name, vectors[name]).detach()
        assert torch.equal(merged_tensor(vectors.base[name], update, torch.float32), vectors.base[name])


def test_ones_of_an_expert_give_that_expert_within_roundings(vectors):
    parametrization, raw = ComponentWise(vectors), TaskVectors(vectors.base, vectors.checkpoints)
    for expert in range(3):
        one = {group: torch.zeros_like(own) for group, own in parametrization.values().items()}
        for own in one.values():
            own[expert] = 1.0
        parametrization.load_values(one)
        for name in vectors:
            tau = raw[name].dense()[expert].double()
            off = parametrization(name, vectors[name]).detach().double() - tau
            # the decomposition, which is off by some roundings of its norm, and as many products as there are components
            assert off.norm() <= (16 if tau.dim() > 1 else 0) * UNIT * tau.norm() * max(tau.shape, default=1) ** 0.5, (
                name
            )


def test_one_number_for_all_components_is_layer_wise(vectors):
    layers, parts = LayerWise(vectors, init=0.4), ComponentWise(vectors, init=0.4)
    for name in vectors:
        size = 0.4 * vectors[name].dense().abs().sum(dim=0).max()
        off = (layers(name, vectors[name]) - parts(name, vectors[name])).abs().max()
        assert off <= gamma(40) * 4 * size


STORAGES = [Resident(), Disk(), Resident("bfloat16"), LowBit(8), LowBit(4), Pinned()]


@pytest.mark.parametrize("storage", STORAGES, ids=str)
def test_what_is_merged_is_what_is_exported(vectors, storage):
    """Factors are exact in every storage; what is no matrix is rounded as any delta is."""
    placed = storage.place(vectors, CPU)
    parametrization = ComponentWise(vectors)
    randomised(parametrization)
    exported = dict(merged_tensors(Coefficients(vectors, parametrization), torch.float32))
    for name in vectors:
        update = torch.cat([own for _, own in updates(parametrization, name, placed[name])]).view(SHAPES[name])
        found = merged_tensor(placed.base_tensor(name), update, torch.float32)
        if len(SHAPES[name]) > 1 or storage.rounding == "none":
            assert torch.equal(found, exported[name]), name


def test_rows_of_a_part_are_those_of_the_whole(vectors):
    """As a process has them that holds some rows of a sharded copy."""
    parametrization = ComponentWise(vectors)
    randomised(parametrization)
    whole = parametrization("matrix", vectors["matrix"]).detach()
    parts = [
        own for rows in (slice(0, 14), slice(14, 35))
        for _, own in updates(parametrization, "matrix", vectors["matrix"], part=rows)
    ]  # fmt: skip
    assert torch.allclose(torch.cat(parts).view(5, 7), whole, rtol=0, atol=1e-5)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_threads_are_in_no_bit_of_what_is_merged(tmp_path, threads):
    """Nor in any of an export; a product of all components in one call differs here."""
    shapes = {"a": (64, 333), "one": (300, 1)}
    vectors = with_components(tmp_path / "c.safetensors", plain(shapes, [str(number) for number in range(13)]))
    parametrization, found = ComponentWise(vectors), []
    randomised(parametrization)
    for count in (1, 2):
        threads(count)
        found.append(dict(merged_tensors(Coefficients(vectors, parametrization), torch.float32)))
    assert all(torch.equal(found[0][name], found[1][name]) for name in shapes)


def test_experts_may_have_other_ranks(tmp_path):
    """Of a matrix that an expert has fewer components of, the others' numbers are not its."""
    given = plain({"w": (6, 5)}, ("one", "two"))
    path = save_components(tmp_path / "c.safetensors", given)
    from safetensors.torch import load_file, save_file

    from adamerge.io.safetensors_file import TensorFile

    held = load_file(path)
    held["two/factors/w"] = held["two/factors/w"][:, :2].contiguous()
    save_file(held, path, dict(TensorFile(path).metadata))
    vectors = TaskVectors(given.base, given.checkpoints, components=path)
    parametrization = ComponentWise(vectors, init=1.0)
    update = parametrization("w", vectors["w"])
    assert torch.allclose(update, vectors["w"].dense().sum(dim=0), atol=1e-6)
    update.square().sum().backward()
    gradient = parametrization.w[0].grad
    assert gradient.shape == (2, 5) and gradient[0].all() and gradient[1, :2].all() and not gradient[1, 2:].any()


def test_dense_experts_are_refused_and_told_what_to_run_first(vectors):
    with pytest.raises(ConfigError, match="'conv' has no components") as refused:
        ComponentWise(plain())
    assert "adamerge.Components" in str(refused.value) and '"{task_vectors}"' in str(refused.value)
    models = vectors.base, vectors.checkpoints
    with pytest.raises(ConfigError, match="got transforms after that stage"):
        ComponentWise(TaskVectors(*models, [Ties()], components=vectors.components.location))
    scaled = TaskVectors(*models, [Scale({"two": -0.5})], components=vectors.components.location)
    assert isinstance(scaled["matrix"], LowRankDeltas), "scales keep factors"
    wanted = 0.3 * torch.einsum("k,kij->ij", torch.tensor([1.0, -0.5, 1.0]), vectors["matrix"].dense())
    assert torch.allclose(ComponentWise(scaled)("matrix", scaled["matrix"]), wanted, atol=1e-6)


def test_components_that_are_not_written_yet_are_as_many_as_there_can_be():
    given = plain()
    awaited = TaskVectors(given.base, given.checkpoints, components="{task_vectors}")
    counts = {name: own.shape[1] for name, own in ComponentWise(awaited).values().items()}
    assert counts == {"conv": 3, "matrix": 5, "row": 1, "vector": 6, "number": 1}
