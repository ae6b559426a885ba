"""The structure of a network: its outermost blocks, who uses which parameter, what is gathered, whose memory a view is in."""

from __future__ import annotations

import torch
from torch import nn

from adamerge.backbones.structure import outermost, owner, prevailing_dtype, users, whole_modules


def test_a_list_of_lists_is_as_its_members_are_called():
    parts = [nn.Linear(1, 1) for _ in range(4)]
    stages = nn.ModuleList([nn.ModuleList(parts[:2]), nn.ModuleDict({"x": parts[2]}), parts[3]])
    assert outermost(nn.Sequential(stages)) == parts


def test_blocks_are_members_of_the_outermost_lists():
    inner = nn.ModuleList([nn.Linear(1, 1)])
    network = nn.Sequential(nn.ModuleList([nn.Sequential(inner), nn.Linear(1, 1)]), nn.ModuleDict({"x": inner}))
    assert outermost(network) == [network[0][0], network[0][1], inner[0]]


def test_a_view_is_owned_by_the_parameter_that_it_looks_into():
    parameter = nn.Parameter(torch.zeros(4, 2))
    assert owner(parameter) is parameter and owner(parameter[1:].t()) is parameter


def test_a_parameter_is_used_by_its_blocks_and_by_modules_beside_them():
    network = nn.ModuleDict({"embed": nn.Embedding(3, 2), "layers": nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])})
    network["layers"][1].bias = network["layers"][0].bias
    modules = list(network.modules())
    at = users(network)
    assert at[id(network["layers"][0].weight)] == {0} and at[id(network["layers"][1].weight)] == {1}
    assert at[id(network["layers"][0].bias)] == {0, 1}  # shared by two blocks
    assert at[id(network["embed"].weight)] == {~modules.index(network["embed"])}


def test_what_is_gathered_at_once_is_each_block_and_each_module_of_none_that_has_parameters():
    network = nn.ModuleDict({"embed": nn.Embedding(3, 2), "layers": nn.ModuleList([nn.Sequential(nn.Linear(2, 2))])})
    network["act"] = nn.GELU()
    assert whole_modules(network) == [network["layers"][0], network["embed"]]


def test_the_prevailing_dtype_is_that_of_most_elements_not_of_most_tensors():
    small = [torch.zeros(2), torch.zeros(3)]
    assert prevailing_dtype([*small, torch.zeros(6, dtype=torch.bfloat16)]) is torch.bfloat16
    assert prevailing_dtype([*small, torch.zeros(4, dtype=torch.bfloat16)]) is torch.float32
