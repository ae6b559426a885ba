"""Classes described from their sources: the same as what importing them would say."""

import inspect

import pytest

import adamerge
from adamerge.runs.class_descriptions import described, kinds_of

CLASSES = [name for name in adamerge.__all__ if isinstance(getattr(adamerge, name), type)]


@pytest.mark.parametrize("name", CLASSES)
def test_arguments_are_those_of_the_signature(name):
    kind = getattr(adamerge, name)
    found = described(name)
    later = {"task_vectors"} if issubclass(kind, adamerge.Parametrization) else set()
    later |= {"args", "kwargs"}  # of a torch module without a constructor of its own
    expected = {key: one for key, one in inspect.signature(kind).parameters.items() if key not in later}
    assert {one.name for one in found.arguments} == expected.keys()
    for one in found.arguments:
        assert (one.default is None) == (expected[one.name].default is inspect.Parameter.empty), one
        assert one.told, f"{name} says nothing of {one.name}"
    assert found.told and inspect.cleandoc(kind.__doc__).startswith(found.told)


@pytest.mark.parametrize(
    "base", ["Objective", "Parametrization", "Constraint", "Storage", "Copy", "Backbone", "Calibration", "Solver"]
)
def test_kinds_are_the_public_subclasses(base):
    parent = getattr(adamerge, base)
    expected = {name for name in CLASSES if issubclass(getattr(adamerge, name), parent)}
    concrete = {name for name in expected if not inspect.isabstract(getattr(adamerge, name))}
    assert concrete - {base} <= {*kinds_of(base)} <= concrete


def test_what_the_package_does_not_define_is_not_described():
    for path in ("Adam", "torch.optim.Adam", "mypaper.Entropy", "adamerge.objectives.Entrpy", ""):
        assert described(path) is None, path
    assert described("adamerge.objectives.Entropy") == described("Entropy")


def test_a_field_of_a_task_has_its_default_and_its_words():
    fields = {one.name: one for one in described("LanguageTask").arguments}
    assert (
        fields["dataset"].default is None and fields["text"].default == "'{text}'" and fields["words"].default == "{}"
    )
    assert fields["messages"].told.startswith("column of a chat")


def test_a_part_is_found_in_the_type():
    parts = {one.name: one.part for one in described("Merging").arguments}
    assert (
        parts["parametrization"] == "Parametrization"
        and parts["objective"] == "Objective"
        and parts["micro_batch"] is None
    )
    assert {one.name: one.part for one in described("ImageCalibration").arguments}["tasks"] == "ImageTask"
