"""Overlap: rows that hold the same in calibration and test are counted, whatever their labels and wherever they lie."""

import json

import datasets
import pytest
from PIL import Image

from adamerge.data import ImageCalibration, ImageTask, LanguageCalibration, LanguageTask, TextCalibration, TextTask
from adamerge.data.overlap import contents, overlap


def texts(folder, calibration: list[str], test: list[str], pairs: list[str] | None = None) -> TextCalibration:
    """Splits as they are; labels alternate, so that equal texts have different ones."""

    def rows(values: list[str], first: int) -> datasets.Dataset:
        labels = [(first + i) % 2 for i in range(len(values))]
        columns = {"text": values, "other": pairs or values, "label": labels}
        features = {"label": datasets.ClassLabel(names=["no", "yes"])}
        strings = dict.fromkeys(("text", "other"), datasets.Value("string"))
        return datasets.Dataset.from_dict(columns, datasets.Features(strings | features))

    splits = {
        "calibration": rows(calibration, 0),
        "validation": rows(["v"] * len(pairs or "v"), 0),
        "test": rows(test, 1),
    }
    datasets.DatasetDict(splits).save_to_disk(folder)
    return TextCalibration(tasks={"one": TextTask(str(folder), pair_column="other" if pairs else None)})


def test_nothing_is_shared(tmp_path):
    assert overlap(texts(tmp_path / "a", ["a", "b"], ["c", "d"]), "test") == {}


def test_each_sample_that_was_calibrated_on_counts(tmp_path):
    """Two of four, one of them twice; labels differ and do not matter."""
    assert overlap(texts(tmp_path / "a", ["a", "b"], ["b", "c", "b", "a"]), "test") == {"one": 3}


def test_of_a_pair_both_count(tmp_path):
    """The same two columns in both splits, but for the first text of one row."""
    assert overlap(texts(tmp_path / "a", ["a", "b"], ["a", "c"], pairs=["x", "y"]), "test") == {"one": 1}


def test_only_what_is_calibrated_on_counts(tmp_path):
    data = texts(tmp_path / "a", ["a", "b", "c"], ["a", "b", "c"])
    data.calibration_samples = 2
    assert overlap(data, "test") == {"one": 2}


def test_without_calibration_data_there_is_nothing_to_share():
    data = TextCalibration(tasks={"one": TextTask("nowhere", classnames=["a"])})
    data.load = lambda task: {"test": datasets.Dataset.from_dict({"text": ["a"], "label": [0]})}
    assert overlap(data, "test") == {} and overlap(data, "validation") == {}


@pytest.mark.parametrize("embedded", [True, False])
def test_images_are_compared_as_files_hold_them(embedded, tmp_path):
    """In the data set itself, or in files of different names that it points to."""
    for name, colour in {"a": "red", "b": "red", "c": "blue", "d": "green"}.items():
        Image.new("RGB", (4, 4), colour).save(tmp_path / f"{name}.png")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["one"])})

    def rows(*names: str) -> datasets.Dataset:
        paths = [tmp_path / f"{name}.png" for name in names]
        images = [{"bytes": path.read_bytes(), "path": None} if embedded else str(path) for path in paths]
        return datasets.Dataset.from_dict({"image": images, "label": [0] * len(names)}, features)

    splits = {"calibration": rows("a", "c"), "validation": rows("d"), "test": rows("b", "d")}
    data = ImageCalibration(tasks={"one": ImageTask("nowhere", ["{}"])})
    data.load = lambda task: splits
    assert overlap(data, "test") == {"one": 1}
    assert overlap(data, "validation") == {}


def test_other_contents_are_told_by_their_hash(tmp_path):
    """As many rows of other words are other data, and the same rows the same."""
    found = []
    for word in ("one", "two", "one"):
        path = tmp_path / f"{len(found)}.jsonl"
        path.write_text("".join(json.dumps({"text": f"{word} {n}"}) + "\n" for n in range(40)))
        found.append(contents(LanguageCalibration(tasks={"a": LanguageTask(str(path))})))
    assert found[0] == found[2] != found[1] and found[0].keys() == {"a"}
