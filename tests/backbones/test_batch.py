"""Batches: without labels unless they are given, and cut with all that belongs to their samples."""

import torch

from adamerge.backbones import Batch, Teacher


def test_a_batch_has_no_labels_unless_they_are_given():
    assert Batch(torch.zeros(1)).labels is None


def test_some_of_the_samples_keep_what_is_theirs_and_what_is_all_samples():
    numbers = torch.arange(4)
    teacher = Teacher(numbers[:, None] + 10, numbers[:, None] + 20, (numbers[:, None, None] + 30,))
    batch = Batch({"x": numbers}, numbers + 1, teacher, numbers + 2, 7, numbers[:, None] + 3, torch.ones(2))
    part = batch.rows(slice(1, 3))
    assert part.inputs["x"].tolist() == [1, 2] and part.labels.tolist() == [2, 3] and part.indices.tolist() == [3, 4]
    assert part.teacher.logits.tolist() == [[11], [12]] and part.teacher.classes.tolist() == [[21], [22]]
    assert part.teacher.hidden[0].tolist() == [[[31]], [[32]]]
    assert part.targets.tolist() == [[4], [5]] and part.step == 7 and part.marginal is batch.marginal
    alone = Batch(numbers).rows(slice(2))
    assert alone.inputs.tolist() == [0, 1] and set(alone[1:]) == {None, 0}
