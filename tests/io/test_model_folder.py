"""Layout: what stands in an exported folder."""

import dataclasses

import pytest

from adamerge.io.model_folder import Layout


def test_it_compares_by_content_and_cannot_be_changed():
    assert Layout() == Layout("model.safetensors", {})
    assert Layout("a", {"x": "1"}) != Layout("a", {"x": "2"})
    assert Layout().files is not Layout().files
    with pytest.raises(dataclasses.FrozenInstanceError):
        Layout().weights = "other"


def test_heads_are_found_by_pattern_and_lists_are_kept_as_tuples():
    layout = Layout(copied=["a"], heads=["classifier.*", "*.pooler.*"])
    assert layout == Layout(copied=("a",), heads=("classifier.*", "*.pooler.*"))
    assert layout.is_head("classifier.weight") and layout.is_head("bert.pooler.bias")
    assert not layout.is_head("bert.classifier.weight") and not Layout().is_head("classifier.weight")
