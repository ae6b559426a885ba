"""Outputs: means and crops over the positions that count, and rows of what the network made."""

import torch

from adamerge.backbones import Encoded, Output, masked_mean


def test_a_mean_is_over_the_positions_that_count():
    """And 0 where none is, whatever stands there."""
    values = torch.tensor([[1.0, 2.0, 6.0], [4.0, torch.nan, 9.0], [torch.inf, 1.0, 1.0]])
    mask = torch.tensor([[True, True, False], [True, False, False], [False, False, False]])
    assert masked_mean(values, mask).tolist() == [1.5, 4.0, 0.0]


def test_padding_that_other_tasks_asked_for_is_cropped():
    mask = torch.tensor([[True, True, False, False]])
    output = Output(torch.arange(8.0).view(1, 4, 2), Encoded(torch.zeros(1, 4, 3), mask=mask))
    assert output.cropped(2).tolist() == [[[0, 1], [2, 3]]]
    assert output.mean(torch.tensor([[1.0, 5.0]])).tolist() == [3.0]


def test_one_prediction_per_sample_is_neither_averaged_nor_cropped():
    output = Output(torch.arange(4.0).view(2, 2), Encoded(torch.zeros(2, 3)))
    assert output.mask is None and output.cropped(1) is output.logits
    values = torch.tensor([1.0, 2.0])
    assert output.mean(values) is values


def test_some_of_the_samples_keep_their_states_and_masks():
    numbers = torch.arange(3)
    encoded = Encoded(numbers[:, None], (numbers[:, None, None] + 10,), numbers[:, None] > 0, numbers[:, None] > 1)
    part = encoded.rows(slice(1, 3))
    assert part.features.tolist() == [[1], [2]] and part.hidden[0].tolist() == [[[11]], [[12]]]
    assert part.mask.tolist() == [[True], [True]] and part.hidden_mask.tolist() == [[False], [True]]
    alone = Encoded(numbers[:, None]).rows(slice(0, 1))
    assert alone.mask is None and alone.hidden_mask is None and alone.hidden == ()
