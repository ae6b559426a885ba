"""Places of the merged copy: views find their gradient in their owner's, and a part is cut out of the whole."""

from __future__ import annotations

import torch
from torch import nn

from adamerge.backbones.structure import owner
from adamerge.merging.block_copy import BlockCopy
from adamerge.merging.copies import Place, WholeCopy
from adamerge.merging.sharded_copy import ShardedCopy


def test_a_view_finds_its_gradient_in_its_owners():
    fused = nn.Parameter(torch.zeros(4, 6))
    with torch.no_grad():
        view = fused[2:, 3:].t()
    fused.grad = torch.arange(24.0).view(4, 6)
    place = Place(view)
    assert place.is_parameter and owner(view) is fused
    assert torch.equal(place.gradient, fused.grad[2:, 3:].t())
    fused.grad = torch.arange(24.0).view(6, 4).t()  # as autograd may lay it out
    assert torch.equal(place.gradient, fused.grad[2:, 3:].t())
    place.forget()
    assert fused.grad is None and place.gradient is None


def test_a_parameter_has_its_own():
    parameter = nn.Parameter(torch.zeros(3))
    parameter.grad = torch.ones(3)
    assert Place(parameter).gradient is parameter.grad
    assert not Place(torch.zeros(3)).is_parameter


def test_a_part_is_cut_out_of_the_flattened_tensor():
    place = Place(torch.zeros(2, 3))
    whole = torch.arange(12.0).view(4, 3)
    assert torch.equal(place.cut(whole[:2]), whole[:2])
    place.part = slice(6, 12)
    assert torch.equal(place.cut(whole), whole[2:])


def test_a_whole_copy_is_always_there():
    network = nn.Linear(2, 2)
    copy, tensors = WholeCopy(), dict(network.named_parameters())
    assert copy.ready and not copy.collective and not copy.transient(network, tensors, print, print)
    assert {name: place.tensor for name, place in copy.places(network, tensors, torch.device("cpu")).items()} == tensors


def test_a_whole_copy_moves_all_of_the_network():
    network = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    WholeCopy().move(network, torch.device("meta"))
    assert all(tensor.is_meta for tensor in network.state_dict().values())


def test_a_copy_says_whether_all_weights_stay_and_how_it_exists_alone():
    """What activation checkpointing asks, and what one process that scores a run of several asks."""
    copies = {type(copy): copy for copy in (WholeCopy(), BlockCopy(), ShardedCopy())}
    assert [copy.whole for copy in copies.values()] == [True, False, False]
    assert [type(copy.alone()) for copy in copies.values()] == [WholeCopy, BlockCopy, BlockCopy]


def test_a_place_takes_its_part_of_a_whole_tensor_without_a_graph():
    place = Place(nn.Parameter(torch.zeros(2, 3)))
    place.part = slice(6, 12)
    place.fill(torch.arange(12.0).view(4, 3))
    assert place.tensor.tolist() == [[6, 7, 8], [9, 10, 11]] and place.tensor.grad_fn is None
