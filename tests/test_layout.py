"""Layout: what stands in an exported folder."""

import dataclasses

import pytest

from adamerge.layout import Layout


def test_it_compares_by_content_and_cannot_be_changed():
    assert Layout() == Layout("model.safetensors", {})
    assert Layout("a", {"x": "1"}) != Layout("a", {"x": "2"})
    assert Layout().files is not Layout().files
    with pytest.raises(dataclasses.FrozenInstanceError):
        Layout().weights = "other"
