"""What a solver sees: inputs under each expert and under the merge so far, as the formulas of the network have them."""

from __future__ import annotations

import pytest
import torch
from rounding import allowed_each
from toy_points import INPUTS, TASKS, ToyPoints
from toy_residual import INNER, WIDTH, ToyResidual, entering, vectors, weights

from adamerge.training.costs import Costs
from adamerge.training.solver_inputs import SampledInputs

ROUNDINGS = INPUTS + 3 * WIDTH + INNER + 8
BATCH = 8


def made(samples=20, rows=40, **settings):
    backbone, data = ToyResidual(), ToyPoints(rows=rows, eval_batch_size=BATCH, **settings)
    data.serve(backbone)
    return SampledInputs(backbone, vectors(), data, samples=samples, device=torch.device("cpu"))


def near(entered, group, model, points):
    """Whether what entered is that of a model, in float64, but for the roundings of a network in fp32."""
    entered = list(entered)

    def reference(disturb):
        own = {name: disturb(value.double()) for name, value in model.items()}
        inputs, stream = entering(own, points.double())[group[-1].weight]
        return {"inputs": inputs} | ({} if stream is None else {"stream": stream})

    exact = allowed_each(reference, ROUNDINGS)
    found = {"inputs": torch.cat([one.inputs for one in entered])}
    if group[-1].streams:
        found["stream"] = torch.cat([one.streams[group[-1].weight] for one in entered])
    assert found.keys() == exact.keys()
    return all((found[name].double() - value).abs().max() <= bound for name, (value, bound) in exact.items())


def test_inputs_of_experts_and_of_the_merge_so_far():
    inputs = made()
    base, experts = weights()
    written = {}
    inputs.begin(lambda name: (lambda: written[name]) if name in written else None)
    points = {task: torch.cat(batches) for task, batches in inputs._batches.items()}
    assert inputs.tasks == list(TASKS) and inputs.counts == dict.fromkeys(TASKS, 20)
    for group in inputs.groups:
        for task in TASKS:
            entered = list(inputs.of_expert(group, task))
            assert [len(one.inputs) for one in entered] == [8, 8, 4]
            assert near(entered, group, experts[task], points[task])
            merged = {name: value + written.get(name, 0) for name, value in base.items()}
            assert near(inputs.of_merge(group, task), group, merged, points[task])
            if written:
                assert not near(inputs.of_merge(group, task), group, base, points[task])
        for one in group:
            written |= {name: 0.3 * torch.ones_like(base[name]) for name in (one.weight, one.bias) if name}
    assert len(written) == 8


def test_passes_may_take_turns():
    inputs = made()
    group, points = inputs.groups[1], torch.cat(inputs._batches["one"])
    own, merged = [], []
    for one, other in zip(inputs.of_expert(group, "one"), inputs.of_merge(group, "one"), strict=True):
        own.append(one)
        merged.append(other)
    base, experts = weights()
    assert near(own, group, experts["one"], points) and near(merged, group, base, points)


@pytest.mark.parametrize(("samples", "rows", "count"), [(20, 40, 20), (200, 40, 40)])
def test_so_many_samples_each_once_drawn_by_the_seed(samples, rows, count):
    one, again, other = made(samples, rows), made(samples, rows), made(samples, rows, seed=1)
    for task in TASKS:
        points = torch.cat(one._batches[task])
        assert len(points) == count == len(points.unique(dim=0))
        assert torch.equal(points, torch.cat(again._batches[task]))
        assert not torch.equal(points, torch.cat(other._batches[task]))
    assert one.protocol["solver_samples"] == dict.fromkeys(TASKS, count)
    assert one.protocol["labelled"] is False and "labels never read" in one.protocol["calibration_split"]


def test_a_network_in_bf16_is_seen_in_fp32():
    backbone, data = ToyResidual("bfloat16"), ToyPoints()
    data.serve(backbone)
    inputs = SampledInputs(backbone, vectors(), data, samples=4, device=torch.device("cpu"))
    (entered,) = inputs.of_merge(inputs.groups[2], "one")
    assert entered.inputs.dtype == entered.streams["down.weight"].dtype == torch.float32


def test_passes_are_counted_and_end_where_they_can(monkeypatch):
    inputs, costs = made(), Costs()
    costs.watch(inputs.merged)
    list(inputs.of_expert(inputs.groups[0], "one"))
    list(inputs.of_merge(inputs.groups[0], "one"))
    assert costs.passes == {"merged": 20, "experts": 20, "validation": 0}
    monkeypatch.setattr(torch, "tanh", lambda values: pytest.fail("the pass went on"))
    list(inputs.of_merge(inputs.groups[0], "one"))
