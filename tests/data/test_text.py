"""Text classification tasks: columns, pairs, class names of the data set or of the configuration."""

import datasets
import pytest

from adamerge.data import TextCalibration, TextTask
from adamerge.errors import DataError


@pytest.fixture
def folder(tmp_path):
    text, label = datasets.Value("string"), datasets.ClassLabel(names=["no", "yes"])
    features = datasets.Features({"sentence": text, "other": text, "y": label})

    def rows(start, count):
        numbers = range(start, start + count)
        columns = {
            "sentence": [f"s{n}" for n in numbers],
            "other": [f"o{n}" for n in numbers],
            "y": [n % 2 for n in numbers],
        }
        return datasets.Dataset.from_dict(columns, features)

    datasets.DatasetDict({"train": rows(0, 40), "validation_matched": rows(100, 10)}).save_to_disk(tmp_path / "texts")
    return str(tmp_path / "texts")


def test_sentences(folder):
    task = TextTask(folder, ["about {}"], text_column="sentence", label_column="y", test="validation_matched")
    data = TextCalibration(tasks={"one": task})
    assert data.columns("one") == ("text",) and data.rows("one", "test")["text"][0] == "s100"
    assert data.tasks["one"].classnames == ("no", "yes") and data.tasks["one"].templates == ("about {}",)
    assert [len(data.rows("one", split)) for split in ("calibration", "validation", "train")] == [4, 4, 32]
    assert [int(label) for label in data.labels("one", "test")][:3] == [0, 1, 0]


def test_pairs(folder):
    task = TextTask(folder, text_column="sentence", pair_column="other", label_column="y", test="validation_matched")
    data = TextCalibration(tasks={"one": task})
    assert data.columns("one") == ("text", "pair")
    assert data.rows("one", "test").select_columns(["text", "pair"])[0] == {"text": "s100", "pair": "o100"}


def test_a_column_that_lacks_is_named(folder):
    with pytest.raises(DataError, match="has no column 'text'"):
        TextCalibration(tasks={"one": TextTask(folder)}).rows("one", "train")


def test_class_names_of_the_configuration_must_be_as_many(folder):
    task = TextTask(folder, classnames=["a", "b", "c"], text_column="sentence", label_column="y")
    with pytest.raises(DataError, match="3 class names for the classes"):
        TextCalibration(tasks={"one": task}).rows("one", "train")
