"""Steps: batches of sequences of any length, with labels that are the samples' own tokens or without."""

import datasets
import pytest
import torch

from adamerge.backbones import IGNORED
from adamerge.data.batch_order import Labelled, Steps, labelled_batch
from adamerge.data.labels import Classes, Tokens
from adamerge.data.samples import Samples


def letters(text):
    return {"input_ids": torch.tensor([ord(letter) for letter in text])}


def following(sample):
    ids = sample["input_ids"]
    return torch.cat([ids[1:], torch.tensor([IGNORED])])


@pytest.fixture
def rows():
    return datasets.Dataset.from_dict({"text": ["abc", "d", "ef"], "label": [0, 1, 1], "other": ["x", "y", "z"]})


def test_labels_of_language_are_the_next_tokens_and_padding_is_ignored(rows):
    samples = Samples(rows, ["text"], letters, "letters")
    steps = Steps({"letters": samples}, {"letters": Tokens(samples, following)}, batch_size=3, seed=0, total=5)
    batch = steps[0]["letters"]
    order = batch.indices.tolist()
    assert sorted(order) == [0, 1, 2] and batch.step == 0 and steps[4]["letters"].step == 4
    inputs, labels = batch.inputs["input_ids"][order.index(0)], batch.labels[order.index(0)]
    assert inputs.tolist() == [97, 98, 99] and labels.tolist() == [98, 99, IGNORED]
    assert batch.labels[order.index(1)].tolist() == [IGNORED] * 3
    assert batch.inputs["input_ids"][order.index(1)].tolist() == [100, 0, 0]
    assert batch.lengths["input_ids"].tolist() == [(3, 1, 2)[number] for number in order]


def test_unlabelled_steps_have_none(rows):
    steps = Steps({"letters": Samples(rows, ["text"], letters, "letters")}, None, batch_size=2, seed=0, total=1)
    assert steps[0]["letters"].labels is None and len(steps[0]["letters"].lengths["input_ids"]) == 2


def test_evaluation_batches(rows):
    samples = Samples(rows, ["text"], letters, "letters")
    dataset = Labelled(samples, Classes(rows["label"]))
    batch = labelled_batch([dataset[0], dataset[1]])
    assert batch.labels.tolist() == [0, 1] and batch.inputs["input_ids"].shape == (2, 3) and len(dataset) == 3
