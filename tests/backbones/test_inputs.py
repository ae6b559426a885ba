"""Inputs: tensors or tensors by name are stacked, joined, cut and moved alike; sequences are padded at their end."""

import torch

from adamerge.backbones.inputs import count, join, moved, packed, pad, pieces, rows, stack, stack_tensors


def words(*numbers):
    return {"input_ids": torch.tensor(numbers), "attention_mask": torch.ones(len(numbers), dtype=torch.long)}


def test_images_are_stacked_as_they_are():
    images = [torch.full((3, 2, 2), value) for value in (1, 2)]
    batch = stack(images)
    assert batch.shape == (2, 3, 2, 2) and count(batch) == 2
    assert torch.equal(rows(batch, slice(1, 2))[0], images[1])


def test_sequences_are_padded_to_the_longest_with_zeros():
    batch = stack([words(5, 6, 7), words(8)])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert count(batch) == 2 and rows(batch, slice(0, 1))["input_ids"].tolist() == [[5, 6, 7]]


def test_batches_of_several_tasks_are_joined_and_padded_once_more():
    joint = join([stack([words(1, 2)]), stack([words(3, 4, 5, 6), words(7)])])
    assert joint["input_ids"].tolist() == [[1, 2, 0, 0], [3, 4, 5, 6], [7, 0, 0, 0]]
    assert torch.equal(join([torch.ones(1, 3, 2, 2), torch.zeros(2, 3, 2, 2)])[:, 0, 0, 0], torch.tensor([1.0, 0, 0]))


def test_a_single_batch_is_not_copied():
    batch = torch.ones(2, 3)
    assert join([batch]) is batch


def test_labels_are_padded_with_what_is_asked():
    assert stack_tensors([torch.tensor([1, 2]), torch.tensor([3])], -100).tolist() == [[1, 2], [3, -100]]
    assert stack_tensors([torch.tensor(4), torch.tensor(5)], -100).tolist() == [4, 5]
    assert pad(torch.ones(1, 2), 3, 7).tolist() == [[1, 1], [7, 7], [7, 7]]


def test_everything_moves():
    meta = torch.device("meta")
    assert moved(torch.ones(1), meta).is_meta and all(value.is_meta for value in moved(words(1), meta).values())


def test_pieces_are_padded_in_a_batch_and_packed_for_the_network():
    samples = [words(1) | pieces({"patches": torch.full((n, 2), n), "grid": torch.tensor([[n, 1]])}) for n in (2, 3, 1)]
    batch = join([stack(samples[:1]), stack(samples[1:])])
    assert batch["patches"].shape == (3, 3, 2) and batch["patches.count"].tolist() == [2, 3, 1]
    assert batch["patches"][:, :, 0].tolist() == [[2, 2, 0], [3, 3, 3], [1, 0, 0]]
    assert batch["grid"].shape == (3, 1, 2) and count(batch) == 3
    found = packed(batch)
    assert found["patches"].tolist() == [[2, 2], [2, 2], [3, 3], [3, 3], [3, 3], [1, 1]]
    assert found["grid"].tolist() == [[2, 1], [3, 1], [1, 1]]
    assert found.keys() == {"input_ids", "attention_mask", "patches", "grid"}
    assert packed(rows(batch, slice(2, 3)))["patches"].tolist() == [[1, 1]]
    assert packed(rows(batch, torch.tensor([2, 0])))["patches"].tolist() == [[1, 1], [2, 2], [2, 2]]


def test_pieces_that_are_zero_are_no_padding():
    batch = stack([pieces({"patches": torch.zeros(2, 1)}), pieces({"patches": torch.ones(3, 1)})])
    assert packed(batch)["patches"][:, 0].tolist() == [0, 0, 1, 1, 1]


def test_what_has_no_pieces_is_packed_as_it_is():
    batch = stack([words(5, 6), words(7)])
    assert packed(batch).keys() == batch.keys()
    assert all(packed(batch)[name] is value for name, value in batch.items())
