"""Samples: each decoded once, also where several processes decode."""

import datasets
import pytest
import torch

from adamerge.data.samples import Samples
from adamerge.errors import DataError


def letters(text):
    return {"input_ids": torch.tensor([ord(letter) for letter in text])}


@pytest.fixture
def rows():
    return datasets.Dataset.from_dict({"text": ["abc", "d", "ef"], "label": [0, 1, 1], "other": ["x", "y", "z"]})


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
