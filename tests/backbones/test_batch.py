"""Batches: without labels unless they are given, and cut with all that belongs to their samples."""

import torch

from adamerge.backbones import Batch, Encoded, Teacher


def test_a_batch_has_no_labels_unless_they_are_given():
    assert Batch(torch.zeros(1)).labels is None


def test_some_of_the_samples_keep_what_is_theirs_and_what_is_all_samples():
    numbers = torch.arange(4)
    teacher = Teacher(numbers[:, None] + 10, numbers[:, None] + 20, (numbers[:, None, None] + 30,))
    batch = Batch(
        {"x": numbers}, numbers + 1, teacher, numbers + 2, 7, numbers[:, None] + 3, torch.ones(2), numbers == 1,
        {"x": numbers + 4},
    )  # fmt: skip
    part = batch.rows(slice(1, 3))
    assert part.inputs["x"].tolist() == [1, 2] and part.labels.tolist() == [2, 3] and part.indices.tolist() == [3, 4]
    assert part.teacher.logits.tolist() == [[11], [12]] and part.teacher.classes.tolist() == [[21], [22]]
    assert part.teacher.hidden[0].tolist() == [[[31]], [[32]]]
    assert part.targets.tolist() == [[4], [5]] and part.step == 7 and part.marginal is batch.marginal
    assert part.agreed.tolist() == [True, False] and part.lengths["x"].tolist() == [5, 6]
    order = torch.tensor([2, 0])
    other = batch.chosen(order, order)
    assert other.inputs["x"].tolist() == [2, 0] and other.teacher.classes.tolist() == [[22], [20]]
    assert other.lengths["x"].tolist() == [6, 4] and other.indices.tolist() == [4, 2]
    alone = Batch(numbers).rows(slice(2))
    assert alone.inputs.tolist() == [0, 1] and set(alone[1:]) == {None, 0}


def test_labels_and_teacher_end_where_a_pass_ends():
    """Of positions, not of classes: two samples of five positions, of which three are in the pass."""
    positions = torch.arange(10).view(2, 5)
    teacher = Teacher(positions[..., None], positions[..., None], (positions[..., None] + 10,))
    batch = Batch(positions, positions + 20, teacher)
    states = (torch.zeros(2, 3, 4),)
    found = batch.within(Encoded(torch.zeros(2, 3, 4), states, torch.ones(2, 3), torch.ones(2, 3)))
    assert found.labels.tolist() == [[20, 21, 22], [25, 26, 27]]
    assert found.teacher.logits[..., 0].tolist() == found.teacher.classes[..., 0].tolist() == [[0, 1, 2], [5, 6, 7]]
    assert found.teacher.hidden[0][..., 0].tolist() == [[10, 11, 12], [15, 16, 17]]
    classes = Batch(positions, torch.tensor([1, 2]), Teacher(positions, None, teacher.hidden))
    found = classes.within(Encoded(torch.zeros(2, 4), states, None, torch.ones(2, 3)))
    assert found.labels.tolist() == [1, 2] and found.teacher.logits.shape == (2, 5)
    assert found.teacher.hidden[0].shape == (2, 3, 1)
