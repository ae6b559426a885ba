"""Parts from data: made as the parser of a fit makes them, and errors that name the key."""

from functools import partial

import pytest
import torch
from adamerge.runs.instantiate import find_class, make_part

from adamerge.errors import ConfigError
from adamerge.parametrizations import Concrete, HardMask, LayerWise, Parametrization
from adamerge.parametrizations.constraints import Constraint, Projection
from adamerge.task_vectors.storage import Disk, Resident, Storage
from adamerge.task_vectors.task_vectors import TaskVectors
from adamerge.transforms import Scale, Ties, Transform


def test_a_name_or_a_description():
    assert isinstance(make_part("Disk", Storage, "k"), Disk)
    assert isinstance(make_part("adamerge.storage.Disk", Storage, "k"), Disk)
    found = make_part({"class_path": "adamerge.Resident", "init_args": {"dtype": "float16"}}, Storage, "k")
    assert isinstance(found, Resident) and found.dtype == "float16"
    scale = make_part({"class_path": "Scale", "init_args": {"factors": {"a": -1}}}, Transform, "k")
    assert isinstance(scale, Scale) and scale.factors == {"a": -1.0}
    assert make_part({"class_path": "Ties", "init_args": {"keep": "2e-1"}}, Transform, "k").keep == 0.2
    assert isinstance(make_part({"class_path": "Ties", "init_args": None}, Transform, "k"), Ties)


def test_parametrizations_wait_for_their_task_vectors_also_inside():
    spec = {
        "class_path": "adamerge.parametrizations.Concrete",
        "init_args": {
            "inner": {
                "class_path": "LayerWise",
                "init_args": {"init": 0.4, "constraint": {"class_path": "adamerge.constraints.Projection"}},
            },
            "mask": {"class_path": "HardMask"},
        },
    }
    factory = make_part(spec, Parametrization, "k")
    assert isinstance(factory, partial)
    made = factory(TaskVectors({"w": torch.zeros(3)}, {"one": {"w": torch.ones(3)}}))
    assert isinstance(made, Concrete) and isinstance(made.mask, HardMask) and isinstance(made.inner, LayerWise)
    assert made.inner.init == 0.4 and isinstance(made.inner.constraint, Projection)


@pytest.mark.parametrize(
    ("spec", "kind", "message"),
    [
        ("adamerge.task_vectors.storage.Nothing", Storage, "there is no class adamerge.task_vectors.storage.Nothing"),
        ("Nothing", Storage, "there is no class Nothing"),
        ("no.such.module.X", Storage, "no class no.such"),
        ("Ties", Storage, "Ties is not a Storage"),
        ("load_coefficients", Storage, "is not a class"),
        (3, Storage, "no part is described"),
        ({"init_args": {}}, Storage, "no part is described"),
        ({"class_path": "Resident", "init_args": {"dtyp": 1}}, Storage, "no argument 'dtyp'.*did you mean 'dtype'"),
        ({"class_path": "Resident", "init_args": {"dtype": "int3"}}, Storage, "no dtype 'int3'"),
        ({"class_path": "Concrete"}, Parametrization, "Concrete needs 'inner'"),
        ({"class_path": "Scale", "init_args": {"factors": 3}}, Transform, "Scale does not take"),
    ],
    ids=str,
)
def test_errors_name_the_key(spec, kind, message):
    with pytest.raises(ConfigError, match="(?s)" + message):
        make_part(spec, kind, "model.part")


def test_a_text_where_a_number_belongs_is_an_error_with_the_key():
    factory = make_part({"class_path": "LayerWise", "init_args": {"init": "many"}}, Parametrization, "model.part")
    with pytest.raises(ConfigError, match="model.part: LayerWise does not take"):
        factory(TaskVectors({"w": torch.zeros(3)}, {"one": {"w": torch.ones(3)}}))


def test_only_what_is_named_is_imported():
    assert find_class("adamerge.constraints.Projection", "k") is Projection and issubclass(Projection, Constraint)
