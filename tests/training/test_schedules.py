"""Schedules: the rates of every shipped method at other lengths and rates, by formulas written here, and what is refused."""

import importlib
import math
from functools import partial

import pytest
import torch
import yaml
from lightning import Trainer
from modules import bilevel, descending
from running import METHODS
from torch import nn
from torch.optim import SGD, Adam, lr_scheduler
from toys import QUIET, ToyLanguage, toy_vectors

from adamerge.errors import ConfigError
from adamerge.parametrizations import Concrete, LayerWise
from adamerge.training import CosineDecay, CosineRestarts
from adamerge.training.schedules import scheduled

pytestmark = pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")

LEARNED = [path for path in sorted(METHODS.rglob("*.yaml")) if "trainer" in yaml.safe_load(path.read_text())]
ENDS = {  # of those that are not constant: the share of the rate after the last step, and where waves begin, as shares
    "auto": (0.0, [0]),
    "auto_layer_wise": (0.0, [0]),
    "atlas_fewshot": (0.0, [0]),
    "atlas_ufm": (0.0, [0]),
    "expert_merging": (0.1, [0, 1 / 3]),
    "expert_merging_released": (0.1 + 0.9 * (1 + math.cos(0.14 * math.pi)) / 2, [0]),
    "1_expert_merging": (0.1, [0]),
    "2_chunks": (0.1, [0]),
    "2_strength": (0.0, [0]),
}


def part(spec):
    """What a configuration describes, as a factory."""
    module, _, name = spec["class_path"].rpartition(".")
    return partial(getattr(importlib.import_module(module), name), **spec.get("init_args", {}))


def rates_of(module, steps: int) -> list[list[float]]:
    """Of each optimiser: the rate of every step, and the one that would come after the last."""
    module.trainer = Trainer(max_steps=steps, max_epochs=1, **QUIET)
    optimizers, made = module.configure_optimizers()
    schedulers = [one["scheduler"] if isinstance(one, dict) else one for one in made]
    found = [[optimizer.param_groups[0]["lr"]] for optimizer in optimizers]
    for _ in range(steps):
        for scheduler in schedulers:
            scheduler.step()
        for rates, optimizer in zip(found, optimizers, strict=True):
            rates.append(optimizer.param_groups[0]["lr"])
    return found


def search_of(path) -> dict:
    """The arguments of a shipped method's search."""
    return yaml.safe_load(path.read_text())["model"]["search"]["init_args"]


def test_the_table_names_what_is_shipped():
    scheduled_ones = {path.stem for path in LEARNED if "schedule" in search_of(path)}
    assert len(LEARNED) >= 17 and scheduled_ones == ENDS.keys()


@pytest.mark.parametrize("times", [0.1, 1, 10])
@pytest.mark.parametrize("path", LEARNED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_rates_of_a_shipped_method_fall_where_they_should_and_end_where_they_say(path, times):
    """At its own number of steps and rate, a tenth, and ten times as much of both."""
    config = yaml.safe_load(path.read_text())
    given, steps = search_of(path), max(1, round(times * config["trainer"]["max_steps"]))
    arguments = {key: part(given[key]) for key in ("optimizer",) if key in given}
    if "schedule" in given:
        arguments["schedule"] = part(given["schedule"])()
    nested = config["model"]["search"]["class_path"] == "adamerge.Bilevel"
    wanted = {"lr": times * given["lr"]} | ({"inner_lr": times * given["inner_lr"]} if nested else {})
    make, made = (bilevel, partial(Concrete, inner=LayerWise)) if nested else (descending, LayerWise)
    module = make(ToyLanguage(), toy_vectors(), made, **wanted, **arguments)
    module.search.check(steps, batch_size=2)
    every = rates_of(module, steps)
    assert [rates[0] for rates in every] == [wanted[key] for key in (("inner_lr", "lr") if nested else ("lr",))]
    if path.stem not in ENDS:
        assert all(set(rates) == {rates[0]} for rates in every), "constant"
        return
    (rates,), (end, waves) = every, ENDS[path.stem]
    starts = {round(steps * share) for share in waves}
    assert rates[-1] == pytest.approx(end * rates[0], rel=1e-12, abs=1e-15)
    for step in range(1, steps + 1):
        if step in starts:
            assert rates[step] == rates[0] > rates[step - 1]
        else:
            assert rates[step] < rates[step - 1], step


def test_the_waves_are_those_of_torch_at_the_length_that_its_numbers_are_for():
    """Independent of ours: torch's schedulers, given the numbers that fit."""
    for ours, theirs, steps in (
        (CosineDecay(), partial(lr_scheduler.CosineAnnealingLR, T_max=20), 20),
        (CosineDecay(0.1), partial(lr_scheduler.CosineAnnealingLR, T_max=20, eta_min=0.05), 20),
        (CosineRestarts(2, 2.0, 0.1), partial(lr_scheduler.CosineAnnealingWarmRestarts, T_0=10, T_mult=2, eta_min=0.05), 30),
        (CosineRestarts(3, 1.0), partial(lr_scheduler.CosineAnnealingWarmRestarts, T_0=10), 30),
        (CosineDecay(0.1, 0.14), partial(lr_scheduler.CosineAnnealingWarmRestarts, T_0=50, eta_min=0.05), 7),
    ):  # fmt: skip
        optimizer = SGD([nn.Parameter(torch.zeros(1))], 0.5)
        scheduler = theirs(optimizer)
        for step in range(steps):
            assert 0.5 * ours.share(step, steps) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9, abs=1e-12)
            scheduler.step()


def test_by_hand():
    assert [CosineDecay().share(step, 4) for step in (0, 2, 4)] == pytest.approx([1, 0.5, 0], abs=1e-15)
    assert CosineDecay(0.2).share(1, 3) == pytest.approx(0.2 + 0.8 * 0.75)  # cos 60 degrees is 1/2
    assert CosineDecay(0.2).share(9, 3) == pytest.approx(0.2), "and stays there"
    waves = [CosineRestarts(2, 3.0).share(step, 8) for step in range(9)]
    assert waves[0] == waves[2] == 1 and waves[1] == pytest.approx(0.5) and waves[5] == pytest.approx(0.5)
    assert waves[8] == 0
    assert [CosineRestarts(4).share(step, 1) for step in (0, 1)] == [1, 0], "a fit shorter than its waves"


@pytest.mark.parametrize(
    "made",
    [partial(CosineDecay, floor=1.0), partial(CosineDecay, floor=-0.1), partial(CosineDecay, through=0.0),
     partial(CosineDecay, through=1.5), partial(CosineRestarts, periods=0), partial(CosineRestarts, growth=0.0),
     partial(CosineRestarts, floor=2.0)],
)  # fmt: skip
def test_numbers_out_of_range_are_refused(made):
    with pytest.raises(ConfigError):
        made()


@pytest.mark.parametrize(
    ("schedule", "named"),
    [
        (partial(lr_scheduler.CosineAnnealingLR, T_max=100), "T_max=100"),
        (partial(lr_scheduler.CosineAnnealingLR, T_max=10), "T_max=10"),
        (partial(lr_scheduler.CosineAnnealingLR, T_max=20, eta_min=0.05), "eta_min=0.05"),
        (partial(lr_scheduler.CosineAnnealingWarmRestarts, T_0=50), "T_0=50"),
        (partial(lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=30), "total_steps=30"),
        (partial(lr_scheduler.LinearLR, total_iters=21), "total_iters=21"),
        (partial(lr_scheduler.StepLR, step_size=30), "step_size=30"),
        (partial(lr_scheduler.MultiStepLR, milestones=[5, 40]), "milestone 40"),
        (lr_scheduler.ReduceLROnPlateau, "ReduceLROnPlateau"),
    ],
)
def test_one_of_torchs_that_cannot_be_what_it_says_is_refused(schedule, named):
    """In a fit of 20 steps at a rate of 0.01; before the fit, and in it."""
    with pytest.raises(ConfigError) as refusal:
        scheduled(SGD([nn.Parameter(torch.zeros(1))], 0.01), schedule, 20, "model.search.schedule")
    assert named in refusal.value.what and "model.search.schedule" in refusal.value.what
    module = descending(ToyLanguage(), toy_vectors(), LayerWise, lr=0.01, schedule=schedule)
    with pytest.raises(ConfigError, match="model.search.schedule"):
        module.search.check(20, batch_size=2)
    made = partial(Concrete, inner=LayerWise)
    module = bilevel(ToyLanguage(), toy_vectors(), made, inner_lr=0.01, inner_schedule=schedule)
    with pytest.raises(ConfigError, match="model.search.inner_schedule"):
        module.search.check(20, batch_size=2)


@pytest.mark.parametrize(
    "schedule",
    [partial(lr_scheduler.CosineAnnealingLR, T_max=20), partial(lr_scheduler.StepLR, step_size=5),
     partial(lr_scheduler.ExponentialLR, gamma=0.9), partial(lr_scheduler.LinearLR, total_iters=20),
     partial(lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=20), partial(lr_scheduler.MultiStepLR, milestones=[5])],
)  # fmt: skip
def test_one_of_torchs_that_goes_with_the_fit_is_taken(schedule):
    descending(ToyLanguage(), toy_vectors(), LayerWise, lr=0.01, schedule=schedule).search.check(20, batch_size=2)


def test_both_rates_of_a_bilevel_search_follow_their_own_schedule():
    made = partial(Concrete, inner=LayerWise)
    module = bilevel(
        ToyLanguage(), toy_vectors(), made, lr=0.1, inner_lr=2.0, optimizer=Adam,
        schedule=CosineDecay(), inner_schedule=CosineRestarts(2, 1.0, 0.5),
    )  # fmt: skip
    inner, outer = rates_of(module, 4)
    assert outer == pytest.approx([0.1 * (1 + math.cos(math.pi * step / 4)) / 2 for step in range(5)], abs=1e-12)
    assert inner == pytest.approx([2.0, 1.5, 2.0, 1.5, 1.0])


def test_a_longer_fit_goes_on_at_the_rate_that_it_would_have_had():
    """Of a checkpoint's schedule the step counts, not the rate that it ended with."""
    optimizer = SGD([nn.Parameter(torch.zeros(1))], 0.5)
    short = scheduled(optimizer, CosineDecay(), 10, "")
    for _ in range(10):
        short.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-15)
    again = SGD([nn.Parameter(torch.zeros(1))], 0.5)
    long = scheduled(again, CosineDecay(), 40, "")
    again.load_state_dict(optimizer.state_dict())
    long.load_state_dict(short.state_dict())
    assert again.param_groups[0]["lr"] == long.get_last_lr()[0] == pytest.approx(0.25 * (1 + math.sqrt(0.5)))
    long.step()
    assert again.param_groups[0]["lr"] == pytest.approx(0.25 * (1 + math.cos(math.pi * 11 / 40)))
