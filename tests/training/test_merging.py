"""A merging is plain: numbers are checked, nothing is opened, and no trainer is loaded for it."""

import inspect

import pytest
from running import child

from adamerge import Bilevel, Descent, LayerWise, Merging
from adamerge.errors import ConfigError
from adamerge.runs.class_descriptions import described

HEAVY = {"lightning", "pytorch_lightning", "torchmetrics", "datasets", "open_clip", "transformers", "wandb"}


FILES = ("merging", "search", "descent", "bilevel", "schedules", "learning_rate")


def test_what_is_configured_loads_no_trainer_and_no_data(tmp_path):
    every = ", ".join(f"adamerge.training.{file}" for file in FILES)
    done = child(["-c", f"import sys, {every}\nprint(*sys.modules)"], tmp_path)
    loaded = set(done.stdout.split())
    assert "torch" in loaded and not loaded & HEAVY


def test_every_field_is_told_of_once():
    fields = [*inspect.signature(Merging).parameters]
    about = described("Merging")
    told = [one.name for one in about.arguments]  # by name alone, in an order of their own: what is merged, then how
    assert sorted(told) == sorted(fields) and all(one.told for one in about.arguments)
    assert told[:5] == ["backbone", "task_vectors", "parametrization", "objective", "search"]


def test_its_arguments_are_given_by_name():
    with pytest.raises(TypeError, match="positional"):
        Merging(1, 2, 3)


def test_it_descends_where_no_search_is_given():
    one, other = (Merging(backbone=1, task_vectors=2, parametrization=LayerWise) for _ in range(2))
    assert type(one.search) is Descent and one.search is not other.search and one.search.lr == 1e-3


@pytest.mark.parametrize(
    ("made", "named"),
    [
        (lambda: Merging(backbone=1, task_vectors=2, parametrization=3, micro_batch=0), "model.micro_batch must be"),
        (lambda: Descent(lr=0.0), "model.search.lr must be positive, got 0.0"),
        (lambda: Descent(lr=float("nan")), "model.search.lr must be positive"),
        (lambda: Bilevel(lr=float("inf")), "model.search.lr must be positive, got inf"),
        (lambda: Bilevel(inner_lr=-1.0), "model.search.inner_lr must be positive, got -1.0"),
    ],
)  # fmt: skip
def test_numbers_out_of_range_are_refused(made, named):
    with pytest.raises(ConfigError, match=named):
        made()
