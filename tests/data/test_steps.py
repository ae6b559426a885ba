"""Steps: sequences of any length, labels that are the samples' own tokens, and samples decoded once."""

import datasets
import pytest
import torch

from adamerge.backbones import IGNORED
from adamerge.data.steps import Classes, Labelled, Samples, Steps, Tokens, labelled_batch
from adamerge.errors import DataError


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
    steps = Steps({"letters": samples}, {"letters": Tokens(samples, following)}, 3, 0, 5)
    batch = steps[0]["letters"]
    order = batch.indices.tolist()
    assert sorted(order) == [0, 1, 2] and batch.step == 0 and steps[4]["letters"].step == 4
    inputs, labels = batch.inputs["input_ids"][order.index(0)], batch.labels[order.index(0)]
    assert inputs.tolist() == [97, 98, 99] and labels.tolist() == [98, 99, IGNORED]
    assert batch.labels[order.index(1)].tolist() == [IGNORED] * 3
    assert batch.inputs["input_ids"][order.index(1)].tolist() == [100, 0, 0]


def test_unlabelled_steps_have_none(rows):
    steps = Steps({"letters": Samples(rows, ["text"], letters, "letters")}, None, 2, 0, 1)
    assert steps[0]["letters"].labels is None


def test_several_columns_are_one_sample(rows):
    seen = []
    samples = Samples(rows, ["text", "other"], lambda row: seen.append(row) or torch.zeros(1), "letters")
    assert seen == [{"text": "abc", "other": "x"}] and len(samples) == 3


def test_a_sample_is_decoded_once(rows):
    seen = []
    samples = Samples(rows, ["text"], lambda text: seen.append(text) or letters(text), "letters")
    for _ in range(3):
        assert samples[1]["input_ids"].tolist() == [100]
    assert seen == ["abc", "d"]


def test_shared_samples_are_decoded_once_and_seen_by_all(rows):
    seen = []
    samples = Samples(
        rows, ["text"], lambda text: seen.append(text) or torch.ones(2) * len(text), "letters", shared=True
    )
    assert [samples[i].tolist() for i in (0, 2, 2, 0)] == [[3, 3], [2, 2], [2, 2], [3, 3]]
    assert seen == ["abc", "ef"] and samples[0].is_shared() and samples[2].is_shared()


def test_pictures_must_have_one_shape(rows):
    samples = Samples(rows, ["text"], lambda text: torch.zeros(len(text)), "letters")
    with pytest.raises(DataError, match="letters: row 1 has another shape"):
        samples[1]


def test_evaluation_batches(rows):
    samples = Samples(rows, ["text"], letters, "letters")
    dataset = Labelled(samples, Classes(rows["label"]))
    batch = labelled_batch([dataset[0], dataset[1]])
    assert batch.labels.tolist() == [0, 1] and batch.inputs["input_ids"].shape == (2, 3) and len(dataset) == 3
