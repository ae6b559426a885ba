"""Names of held coefficients: to plain data and back, whatever a file says."""

import torch

from adamerge.parametrizations.held_names import held_masks, held_names


def test_names_lead_back_to_masks():
    held = {"a": torch.tensor([[True, False], [True, False]]), "b": torch.tensor([[False, True], [False, False]])}
    held["c"] = torch.zeros(2, 1, dtype=torch.bool)
    named = held_names(held, ["x", "y"])
    assert named == {"held": {"a": [0], "b": {"x": [1]}}}
    masks = held_masks(named, {name: torch.zeros(mask.shape) for name, mask in held.items()}, ["x", "y"])
    assert masks.keys() == {"a", "b"} and all(torch.equal(masks[name], held[name]) for name in masks)
    assert held_masks({"held": {"other": [0], "a": [7, "x", -1]}}, {"a": torch.zeros(2, 1)}, ["x", "y"])["a"].sum() == 0
    assert held_masks({"held": "all"}, {}, []) == {}
