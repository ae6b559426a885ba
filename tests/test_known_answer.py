"""One toy problem with a known answer: the outputs of a model merged with planted coefficients give them back."""

import pytest
import torch
from torch import Tensor, nn

from adamerge.backbones import Backbone, Encoded
from adamerge.io.model_folder import Layout
from adamerge.merging.merged_model import MergedModel
from adamerge.parametrizations import BlockWise, ChunkWise, ElementWise, LayerWise, RowColumnWise, TaskWise
from adamerge.parametrizations.constraints import Free, Projection, Sigmoid
from adamerge.task_vectors.task_vectors import TaskVectors


class Regressor(Backbone):
    """Two layers of floats to floats."""

    def __init__(self) -> None:
        self.network = nn.Sequential()
        self.network.layers = nn.ModuleList([nn.Linear(5, 24), nn.Linear(24, 16)])
        self.heads = {}

    def tensors(self) -> dict[str, Tensor]:
        return self.network.state_dict(keep_vars=True)

    def build_heads(self, tasks: object, experts: object) -> None:
        return

    def layout(self) -> Layout:
        return Layout()

    def preprocess(self, sample: Tensor) -> Tensor:
        return sample

    def encode(self, inputs: Tensor, hidden: object = ()) -> Encoded:
        first, second = self.network.layers
        return Encoded(second(torch.tanh(first(inputs))))


NAMES = ["layers.0.bias", "layers.0.weight", "layers.1.bias", "layers.1.weight"]
# the groups of each kind, and for each tensor the group of its first and of its second half
GROUPS = {
    TaskWise: dict.fromkeys(NAMES, ("model", 0, 0)),
    BlockWise: {name: (name[:8], 0, 0) for name in NAMES},
    LayerWise: {name: (name, 0, 0) for name in NAMES},
    ChunkWise: {name: (name, 0, 1) for name in NAMES},
}


def planted(kind: type, experts: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    widths: dict[str, int] = {}
    for group, first, second in GROUPS[kind].values():
        widths[group] = max(first, second) + 1
    return {g: 0.1 + 0.8 * torch.rand(experts, n, generator=generator, dtype=torch.float64) for g, n in widths.items()}


def solved(merged: MergedModel, inputs: Tensor, target: Tensor, steps: int) -> tuple[float, float]:
    """Sets the coefficients to those of the least squares; returns the loss before and after."""
    optimizer = torch.optim.LBFGS(
        merged.parametrization.parameters(), max_iter=steps, history_size=30, tolerance_grad=1e-9, tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure() -> Tensor:
        optimizer.zero_grad()
        merged.merge()
        loss = (merged(inputs).features - target).pow(2).mean()
        loss.backward()
        scalar = merged.pull_back(loss.detach())
        scalar.backward()
        return scalar

    start = float(closure().detach())
    optimizer.step(closure)
    return start, float(closure().detach())


@pytest.mark.parametrize("constraint", [Free(), Projection(), Sigmoid()], ids=lambda c: type(c).__name__)
@pytest.mark.parametrize("kind", [TaskWise, BlockWise, LayerWise, ChunkWise])
def test_planted_coefficients_are_recovered(kind, constraint):
    torch.manual_seed(3)
    torch.set_num_threads(1)
    backbone = Regressor()
    base = {name: value.clone() for name, value in backbone.network.state_dict().items()}
    experts = {f"e{k}": {n: v + 0.4 * torch.randn_like(v) for n, v in base.items()} for k in range(3)}
    answer = planted(kind, 3)

    inputs = torch.randn(128, 5)
    theta = {}
    for name in NAMES:
        tau = torch.stack([e[name].double() - base[name].double() for e in experts.values()]).view(3, -1)
        group, first, second = GROUPS[kind][name]
        half = tau.shape[1] // 2
        columns = [answer[group][:, first]] * half + [answer[group][:, second]] * (tau.shape[1] - half)
        theta[name] = base[name].double() + (torch.stack(columns, dim=1) * tau).sum(dim=0).view(base[name].shape)
    hidden = torch.tanh(inputs.double() @ theta["layers.0.weight"].T + theta["layers.0.bias"])
    target = (hidden @ theta["layers.1.weight"].T + theta["layers.1.bias"]).float()

    vectors = TaskVectors(base, experts)
    parametrization = kind(vectors, init=0.3, constraint=constraint)
    merged = MergedModel(backbone, vectors, parametrization)
    start, _ = solved(merged, inputs, target, 500)
    parametrization.project_()
    found = {group: value.detach().double() for group, value in parametrization.coefficients().items()}
    assert start > 1e-2
    assert found.keys() == answer.keys()
    for group, value in answer.items():
        assert (found[group] - value).abs().max() < 1e-3, group


@pytest.mark.parametrize("kind", [RowColumnWise, pytest.param(ElementWise, marks=pytest.mark.slow)])
def test_planted_rows_columns_and_elements_are_recovered(kind):
    """Of rows and columns, what they add up to: a number that all rows gain and all columns lose changes nothing.

    A vector has as many unknowns an element as experts, and of elements a matrix has, too: what they add up to is found.
    """
    torch.manual_seed(3)
    torch.set_num_threads(1)
    backbone, experts = Regressor(), 3 if kind is RowColumnWise else 1
    base = {name: value.clone() for name, value in backbone.network.state_dict().items()}
    # no delta is near 0, where its coefficient could be anything
    models = {
        f"e{k}": {n: v + torch.randn_like(v).sign() * (0.2 + 0.4 * torch.rand_like(v)) for n, v in base.items()}
        for k in range(experts)
    }
    vectors = TaskVectors(base, models, include=["layers.1.*"])
    generator, theta, answer = torch.Generator().manual_seed(7), {}, {}
    for name in vectors:
        shape = base[name].shape
        tau = torch.stack([own[name].double() - base[name].double() for own in models.values()])
        if kind is RowColumnWise and len(shape) == 2:
            rows, columns = (torch.rand(experts, n, generator=generator, dtype=torch.float64) for n in shape)
            answer[name] = rows.unsqueeze(2) + columns.unsqueeze(1) - 0.5
        else:
            answer[name] = torch.rand(experts, *shape, generator=generator, dtype=torch.float64)
        theta[name] = base[name].double() + (answer[name] * tau).sum(dim=0)
    inputs = 3 * torch.randn(512, 5)
    hidden = torch.tanh(inputs.double() @ base["layers.0.weight"].double().T + base["layers.0.bias"].double())
    target = (hidden @ theta["layers.1.weight"].T + theta["layers.1.bias"]).float()
    parametrization = kind(vectors, init=0.3)
    merged = MergedModel(backbone, vectors, parametrization)
    start, end = solved(merged, inputs, target, 400)
    values = {group: value.double() for group, value in parametrization.values().items()}
    assert start > 1e-2 and end < 1e-8
    for name, wanted in answer.items():
        if f"{name}/rows" in values:
            found = values[f"{name}/rows"].unsqueeze(2) + values[f"{name}/columns"].unsqueeze(1)
            assert (found - wanted).abs().max() < 1e-2, name
        elif kind is ElementWise:
            tau = (models["e0"][name] - base[name]).double()
            assert ((values[name].view_as(wanted) - wanted) * tau).abs().max() < 1e-3, name
        assert (merged.backbone.tensors()[name].double() - theta[name]).abs().max() < 2e-3, name


def test_a_wrong_gradient_would_not_find_them():
    """The test above has teeth: coefficients half-way between start and answer are a thousand tolerances away."""
    for kind in GROUPS:
        assert min(float((value - 0.3).abs().max()) for value in planted(kind, 3).values()) > 0.1
