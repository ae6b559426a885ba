"""Lengths: what of a batch is padding is known from its samples, and left out as if the rest were stacked alone."""

import torch

from adamerge.backbones.inputs import pieces, stack
from adamerge.backbones.lengths import lengths_of, longest_first, padded, positions_of, shortened


def words(length, target=None):
    sample = {"input_ids": torch.arange(1, length + 1), "attention_mask": torch.ones(length, dtype=torch.long)}
    return sample if target is None else sample | {"decoder_input_ids": torch.arange(1, target + 1)}


def test_lengths_are_those_of_each_input_before_it_is_padded():
    lengths = lengths_of([words(3, 2), words(5, 2), words(1, 4)])
    assert {name: each.tolist() for name, each in lengths.items()} == {
        "input_ids": [3, 5, 1], "attention_mask": [3, 5, 1], "decoder_input_ids": [2, 2, 4],
    }  # fmt: skip
    assert all(each.dtype == torch.int64 and each.device.type == "cpu" for each in lengths.values())


def test_samples_of_one_length_and_images_have_none():
    assert lengths_of([words(3), words(3)]) is None
    assert lengths_of([torch.zeros(3, 2, 2), torch.ones(3, 2, 2)]) is None
    assert lengths_of([words(4)]) is None


def test_numbers_and_pieces_are_not_padded():
    samples = [words(n) | {"kind": torch.tensor(n)} | pieces({"patches": torch.zeros(5 - n, 2)}) for n in (1, 2)]
    assert padded(samples[0], 1) == padded(stack(samples), 2) == ["input_ids", "attention_mask"]
    assert lengths_of(samples).keys() == {"input_ids", "attention_mask"}
    assert padded(torch.zeros(2, 3), 2) == []


def test_a_shortened_batch_is_what_its_samples_are_stacked_alone():
    samples = [words(3, 2), words(5, 7), words(1, 4), words(2, 4)]
    batch, lengths = stack(samples), lengths_of(samples)
    assert all(torch.equal(value, batch[name]) for name, value in shortened(batch, lengths).items())
    some = {name: value[2:] for name, value in batch.items()}
    found = shortened(some, {name: each[2:] for name, each in lengths.items()})
    expected = stack(samples[2:])
    assert found.keys() == expected.keys() and found["input_ids"].shape == (2, 2)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert shortened(batch, None) is batch and shortened(batch["input_ids"], lengths) is batch["input_ids"]


def test_positions_count_once_for_inputs_that_go_together():
    positions = positions_of(lengths_of([words(3, 2), words(5, 2), words(1, 4)]))
    assert sorted(positions.tolist()) == [[2, 2, 4], [3, 5, 1]]
    assert positions_of(lengths_of([words(3), words(5)])).tolist() == [[3, 5]]


def test_equals_stay_in_their_order():
    assert longest_first(torch.tensor([[2, 5, 2, 5, 9]])).tolist() == [4, 1, 3, 0, 2]
    assert longest_first(torch.tensor([[1, 4, 2], [6, 1, 5]])).tolist() == [0, 2, 1], "by all positions of a sample"
